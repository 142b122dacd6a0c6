"""Runs what ``export`` wrote, by ONNX Runtime or OpenVINO; without optimum, and in place of torch's layers.

Shape suffixes: N sentences, B sentences of a batch, T tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.files import check_unchanged
from clusterns_ray.models.pretrained import read_config
from clusterns_ray.models.settings import ModelSettings, read_settings
from clusterns_ray.models.tokenization import load_tokenizer, tokenize

FILES = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
"""Where sentence-transformers looks for the graph of each backend."""

OUTPUT = "sentence_embedding"
"""The output of the graph that is the finished embedding."""

RunGraph = Callable[[dict[str, np.ndarray], str], np.ndarray]
"""Inputs by name and the name of an output to its value."""


@dataclass(frozen=True)
class ExportedEncoder:
    """Sentences to embeddings, as :class:`~clusterns_ray.models.encoder.Encoder` has them.

    >>> ExportedEncoder.load("minilm-int8").encode(["A first sentence.", "And a second."]).shape
    (2, 384)
    """

    tokenizer: Any
    settings: ModelSettings
    width: int
    run: RunGraph

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, exact: bool = False, threads: int = 0) -> ExportedEncoder:
        """Open what ``clusterns export`` wrote for ONNX Runtime or OpenVINO.

        Args:
            directory: that was exported to.
            exact: multiply in float32 what is not in int8; OpenVINO takes bfloat16 where the processor has it.
            threads: that the runtime uses; 0 leaves it to the runtime.

        Raises:
            ConfigError: the directory holds no graph, or its runtime is not installed.
            StorageError: it was changed or damaged after it was exported.
        """
        path = Path(directory).expanduser()
        backends = [backend for backend, file in FILES.items() if (path / file).is_file()]
        if not backends:
            raise ConfigError(
                f"{str(path)!r} holds none of {' and '.join(FILES.values())}.", "Name what `clusterns export` wrote."
            )
        check_unchanged(path)
        open_graph = {"onnx": _onnx, "openvino": _openvino}[backends[0]]
        try:
            run = open_graph(path / FILES[backends[0]], exact, threads)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{str(path)!r} needs {error.name}, which is not installed.", f"pip install {error.name}"
            ) from None
        width = read_config(str(path)).hidden_size
        return cls(load_tokenizer(str(path)), read_settings(str(path)), width, run)

    def encode(self, sentences: Sequence[str], *, batch_size: int = 16, width: int | None = None) -> np.ndarray:
        """Embed sentences, in the order given: float32 (N, D).

        Args:
            sentences: each is cut to the model's length.
            batch_size: small batches hold less padding, and more of them stays in the cache of a processor.
            width: one of ``--dims``; the full width if not given.
        """
        from clusterns_ray.models.encoder import length_batches, pad

        ids, _ = tokenize(sentences, self.tokenizer, self.settings.max_length or 512, self.settings.prompt)
        z_ND = np.empty((len(ids), width or self.width), dtype=np.float32)
        for rows in length_batches([len(row) for row in ids], batch_size):
            ids_BT, mask_BT = pad([ids[row] for row in rows], self.tokenizer.pad_token_id)
            inputs = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()}
            z_ND[rows] = self.run(inputs, OUTPUT if width is None else f"{OUTPUT}_{width}")
        return z_ND


def onnx_session(file: Path, threads: int) -> Any:
    """An ONNX file as ONNX Runtime runs it on the CPU, with so many threads; 0 leaves that to the runtime."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _onnx(file: Path, exact: bool, threads: int) -> RunGraph:
    session = onnx_session(file, threads)
    return lambda inputs, output: np.asarray(session.run([output], inputs)[0])


def _openvino(file: Path, exact: bool, threads: int) -> RunGraph:
    import openvino  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if exact:
        options["INFERENCE_PRECISION_HINT"] = "f32"
    request = openvino.Core().compile_model(file, "CPU", options).create_infer_request()
    return lambda inputs, output: request.infer(inputs)[output]
