"""``export``: an encoder as ONNX, OpenVINO or a directory of sentence-transformers, compared with the original.

The directory has the layout of sentence-transformers, whose backends ``onnx`` and ``openvino`` load it where optimum is
installed. Its graph also computes the finished embeddings, so that a program needs a tokenizer and a runtime alone.
Shape suffixes: N sentences, B sentences of a batch, T tokens, D width.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clusterns_ray.data.corpus import ReadCounts, list_sources, read_sentences
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation.sts import Pairs, check_holds_sets, pair_cosines, read_pairs, sets_in, spearman
from clusterns_ray.inference.exported import FILES, OUTPUT, ExportedEncoder
from clusterns_ray.io.events import OnEvent, notes_to
from clusterns_ray.io.files import check_writable, follow_umask, write_manifest
from clusterns_ray.io.paths import CORPORA, Named, check_path
from clusterns_ray.models.resolve import model_of, resolve_model

if TYPE_CHECKING:
    import torch

    from clusterns_ray.models.encoder import Encoder

PACKAGES = {
    "onnx": ("onnx", "onnxruntime"),
    "openvino": ("openvino",),
    "sentence-transformers": (),
}
"""What can be written, and the packages that each needs beyond the core."""

POOLINGS = ("cls", "mean", "last")
"""Poolings of the last layer's states alone, which is what the backends of sentence-transformers give."""

MOST = 1000
"""Sentences of a corpus that are compared."""
CALIBRATION = 300
"""Sentences by which OpenVINO's int8 takes the ranges of activations."""
ROUNDING = 1e-4
"""The largest difference of an embedding, relative to its length, that float32 may make; 1e-6 is usual."""
LARGEST_ONNX = 2**31 - 2**20
"""Bytes of an ONNX file, as protobuf has it."""

SENTENCES = (
    "Rain.",
    "A man is playing the guitar.",
    "The bank raised its interest rate by a quarter of a point, to 4.5 %, and shares fell.",
    "Wo steht das Haus, in dem Beethoven geboren wurde?",
    "In 1969 two astronauts walked on the Moon while a third one stayed in orbit.",
    "She's not sure (yet) whether e-mail #3 was sent to info@example.org.",
    "Proteins are chains of amino acids; their shape follows from the order of these.",
    "北京是中国的首都。",
)
"""Compared where the user gives none."""


class Score(NamedTuple):
    """Spearman x 100 over the pairs of one set."""

    original: float
    exported: float


@dataclass(frozen=True)
class Export:
    """What :func:`export_model` wrote, and how its embeddings differ from the original's."""

    path: Path
    bytes: int
    """of the weights"""
    sentences: int
    """that were compared"""
    mean_distance: float
    """of the cosine: 1 - cosine of an exported embedding and the original's"""
    max_distance: float
    scores: dict[str, Score]
    """by set, TASK/SUBSET"""
    widths: dict[int, dict[str, Score]]
    """the same for each width of ``dims``; the original's is at its full width"""


def export_model(
    model: Named,
    output: Named,
    *,
    to: str = "onnx",
    int8: bool = False,
    dims: Sequence[int] = (),
    corpus: Named | None = None,
    text_column: str = "text",
    sts: Named | None = None,
    sets: Sequence[str] = (),
    on_event: OnEvent = lambda event: None,
) -> Export:
    """Write an encoder for another runtime, and compare it with the original before it takes its place.

    Args:
        model: a run, or an encoder as of ``Encoder.load``.
        output: the directory, which must be new or empty.
        to: ``onnx``, ``openvino`` or ``sentence-transformers``.
        int8: multiply in 8-bit integers. ONNX Runtime measures activations as they come (dynamic quantisation);
            OpenVINO takes their ranges from ``corpus`` or ``sts`` (static quantisation, by nncf).
        dims: widths of further outputs of the graph, each the first values of the embedding at unit length.
        corpus: sentences to compare on, as of ``data.corpus.read_sentences``; the first :data:`MOST` are read.
        text_column: the column or field that holds the sentence.
        sts: a directory of graded pairs, on which both encoders are scored.
        sets: of these only the sets of these names, TASK/SUBSET.
        on_event: called with notes.

    Raises:
        ConfigError, DataError: the request cannot work, or the written model differs by more than rounding; then
            nothing is left behind.
    """
    note = notes_to(on_event)
    model, path = check_path("MODEL", model), Path(check_path("--output", output, ())).expanduser().absolute()
    corpus = None if corpus is None else check_path("--corpus", corpus, CORPORA)
    sts = None if sts is None else os.path.expanduser(check_path("--sts", sts, ()))
    _check(path, to, int8, dims, corpus, sts, sets)
    if (directory := Path(model).expanduser()).is_dir():
        model = str(model_of(directory))
    resolve_model(model, note)
    pairs = [read_pairs(sts, name) for name in sets or sets_in(sts)] if sts else []
    texts = list(dict.fromkeys(text for each in pairs for text in each.sentences()))
    if corpus is not None:
        read = list(read_sentences(corpus, text_column=text_column, limit=MOST, counts=ReadCounts()))
        if not read:
            raise DataError(f"--corpus is {corpus!r}, which has no sentence.", "Give text to compare on.")
        texts += read
    texts = list(dict.fromkeys(texts or SENTENCES))

    from clusterns_ray.models.encoder import Encoder

    encoder = Encoder.load(model)
    _check_encoder(encoder, model, to, dims)
    note(f"Encoding {len(texts):,} sentences with the original")
    # Whether rows are cut as they were is seen by one that is too long.
    compared = [*texts, " ".join(texts)[: 20 * encoder.max_length] if encoder.max_length < 10_000 else texts[0]]
    original_ND = encoder.encode(compared)
    calibration = encoder.tokenize(texts[:: -(-len(texts) // CALIBRATION)]) if int8 and to == "openvino" else []

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        note(f"Exporting to {to}" + (" in int8" if int8 else ""))
        _write(encoder, new, to, int8, dims, calibration)
        note(f"Encoding {len(texts):,} sentences with the exported encoder")
        exported: Any = Encoder.load(new) if to == "sentence-transformers" else ExportedEncoder.load(new, exact=True)
        exported_ND = exported.encode(compared)
        if not int8:
            _check_equal(original_ND, exported_ND, compared, to)
        result = _compare(path, _weight_bytes(new), compared, original_ND, exported_ND, pairs, dims)
        del exported  # its files may be mapped
        if path.is_dir():
            path.rmdir()  # empty, as was checked
        new.rename(path)
    return result


def _check(
    path: Path, to: str, int8: bool, dims: Sequence[int], corpus: str | None, sts: str | None, sets: Sequence[str]
) -> None:
    """Refuse what cannot work before torch is imported."""
    if to not in PACKAGES:
        raise ConfigError(f"--to is {to!r}; it must be one of {', '.join(PACKAGES)}.")
    packages = [*PACKAGES[to], *(["nncf"] if int8 and to == "openvino" else [])]
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        extra = "openvino" if to == "openvino" else "export"
        raise ConfigError(
            f"--to {to} needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed.",
            f'pip install "clusterns-ray[{extra}]"',
        )
    if to == "sentence-transformers" and int8:
        raise ConfigError(
            "--int8 goes with --to onnx or openvino: torch has no int8 layers that sentence-transformers would load.",
            "Leave --int8 out, or choose one of these.",
        )
    if to == "sentence-transformers" and dims:
        raise ConfigError(
            "--dims goes with --to onnx or openvino: sentence-transformers cuts embeddings itself.",
            f"Leave it out, and load with SentenceTransformer(DIRECTORY, truncate_dim={dims[0]}).",
        )
    if int8 and to == "openvino" and not (corpus or sts):
        raise ConfigError(
            "--int8 with --to openvino measures the ranges of activations on real sentences, and none were given.",
            "Give --corpus or --sts.",
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(
            f"-o is {str(path)!r}, which exists and is no empty directory.",
            "Choose a new one, or remove this.",
        )
    if not path.exists():
        check_writable(path, "-o")
    if sts is not None and not sets and not sets_in(sts):
        check_holds_sets(sts)
    if sets and sts is None:
        raise ConfigError(
            f"--dev is {sets[0]!r}, but there is no --sts.", "Give --sts DIRECTORY, which holds that set."
        )
    if corpus is not None:
        list_sources(corpus)


def _check_encoder(encoder: Encoder, name: str, to: str, dims: Sequence[int]) -> None:
    """Refuse an encoder whose embeddings the target cannot compute."""
    from clusterns_ray.models.backbone import has_decoder

    bad = [width for width in dims if not 0 < width < encoder.width]
    if bad:
        raise ConfigError(
            f"--dims has {bad[0]}, but embeddings of {name} have {encoder.width} values.",
            f"Give widths from 1 to {encoder.width - 1}.",
        )
    if to == "sentence-transformers":
        return
    prompt = encoder.prompt
    reason = None
    if encoder.denoise:
        reason = "it subtracts the state of its bare template (denoise), which is a second pass"
    elif encoder.pooling not in POOLINGS:
        reason = (
            f"its pooling is {encoder.pooling}, and the backends of sentence-transformers know {', '.join(POOLINGS)}"
        )
    elif prompt is not None and not prompt.endswith("{sentence}"):
        reason = f"its prompt {prompt!r} has text after the sentence, which sentence-transformers cannot add"
    elif has_decoder(encoder.backbone):
        reason = "it is an encoder-decoder, of which the backends of sentence-transformers read the encoder alone"
    if reason:
        raise ConfigError(f"{name} cannot be exported to {to}: {reason}.", "Use --to sentence-transformers.")
    size = sum(value.numel() * value.element_size() for value in encoder.backbone.state_dict().values())
    if to == "onnx" and size > LARGEST_ONNX:
        raise ConfigError(
            f"{name} cannot be exported to onnx: it has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2.",
            "Use --to openvino.",
        )


def _write(
    encoder: Encoder, path: Path, to: str, int8: bool, dims: Sequence[int], calibration: list[list[int]]
) -> None:
    encoder.save(path, weights=to == "sentence-transformers")
    if to != "sentence-transformers":
        file = path / FILES[to]
        file.parent.mkdir()
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            try:
                if to == "onnx":
                    _write_onnx(encoder, file, int8, dims)
                else:
                    _write_openvino(encoder, file, int8, dims, calibration)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                raise ConfigError(
                    f"{encoder.backbone.config.model_type} models cannot be exported to {to} by the libraries that are "
                    f"installed: {type(error).__name__}: {' '.join(str(error).split())[:200]}.",
                    "Use another --to, or other versions of torch and transformers.",
                ) from error
            finally:
                logging.disable(logging.NOTSET)
    follow_umask(path)
    write_manifest(path, exported_to=to, int8=int8, dims=list(dims))


def _graph(encoder: Encoder, dims: Sequence[int]) -> torch.nn.Module:
    """What is traced: token ids and their mask to token states, the embedding, and its prefixes."""
    import torch

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = encoder.backbone

        def forward(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> tuple[torch.Tensor, ...]:
            states_BTD = self.backbone(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state
            # In operations alone, as a Python number would become a constant of the graph.
            if encoder.pooling == "cls":
                z_BD = states_BTD[:, 0]
            elif encoder.pooling == "last":
                last_B11 = (attention_mask_BT.sum(dim=1, keepdim=True) - 1).unsqueeze(2)
                z_BD = states_BTD.gather(1, last_B11.expand(-1, -1, states_BTD.shape[2])).squeeze(1)
            else:
                weight_BT1 = attention_mask_BT.unsqueeze(-1).to(states_BTD.dtype)
                z_BD = (states_BTD * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
            if encoder.normalize:
                z_BD = torch.nn.functional.normalize(z_BD, dim=-1)
            return (states_BTD, z_BD, *(torch.nn.functional.normalize(z_BD[:, :width], dim=-1) for width in dims))

    return Graph().eval()


def _sample(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of which one is padded, so that neither number is special."""
    from clusterns_ray.models.encoder import pad

    return pad(encoder.tokenize([SENTENCES[2], SENTENCES[1]]), encoder.tokenizer.pad_token_id)


def _names(dims: Sequence[int]) -> list[str]:
    return ["last_hidden_state", OUTPUT, *(f"{OUTPUT}_{width}" for width in dims)]


def _write_onnx(encoder: Encoder, file: Path, int8: bool, dims: Sequence[int]) -> None:
    import torch

    encoder.backbone.set_attn_implementation("eager")  # of which ONNX Runtime fuses more
    outputs = _names(dims)
    batch_tokens = {0: "batch", 1: "tokens"}
    axes = {"input_ids": batch_tokens, "attention_mask": batch_tokens, "last_hidden_state": batch_tokens}
    full = file.with_name("full.onnx") if int8 else file
    torch.onnx.export(
        _graph(encoder, dims),
        _sample(encoder),
        str(full),
        input_names=["input_ids", "attention_mask"],
        output_names=outputs,
        dynamic_axes={**axes, **{name: {0: "batch"} for name in outputs[1:]}},
        opset_version=17,
        # The newer exporter, by torch.export, makes a graph that ONNX Runtime multiplies more slowly in int8.
        dynamo=False,
    )
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]

        quantize_dynamic(
            full,
            file,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        full.unlink()


def _write_openvino(
    encoder: Encoder, file: Path, int8: bool, dims: Sequence[int], calibration: list[list[int]]
) -> None:
    import openvino  # pyright: ignore[reportMissingImports]

    model = openvino.convert_model(_graph(encoder, dims), example_input=_sample(encoder))
    for place, name in zip(
        [*model.inputs, *model.outputs], ["input_ids", "attention_mask", *_names(dims)], strict=True
    ):
        place.get_tensor().set_names({name})
    if int8:
        import nncf  # pyright: ignore[reportMissingImports]

        rows = [np.array([ids]) for ids in calibration]
        dataset = nncf.Dataset([{"input_ids": ids_1T, "attention_mask": np.ones_like(ids_1T)} for ids_1T in rows])
        model = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(model, file, compress_to_fp16=False)


def _check_equal(original_ND: np.ndarray, exported_ND: np.ndarray, texts: Sequence[str], to: str) -> None:
    lengths_N = np.linalg.norm(original_ND, axis=1)
    difference_N = np.linalg.norm(exported_ND - original_ND, axis=1) / np.maximum(lengths_N, 1e-12)
    worst = int(np.nan_to_num(difference_N, nan=np.inf).argmax())
    if not difference_N[worst] <= ROUNDING:
        raise ConfigError(
            f"The encoder exported to {to} is not that of the model: the embedding of {texts[worst][:60]!r} differs by "
            f"{difference_N[worst]:.2g} of its length, and rounding explains at most {ROUNDING:g}. Nothing was kept.",
            "Use another --to, or other versions of torch and transformers.",
        )


def _compare(
    path: Path,
    size: int,
    texts: list[str],
    original_ND: np.ndarray,
    exported_ND: np.ndarray,
    pairs: list[Pairs],
    dims: Sequence[int],
) -> Export:
    unit_ND, other_ND = (
        z_ND / np.maximum(np.linalg.norm(z_ND, axis=1, keepdims=True), 1e-12)
        for z_ND in (original_ND.astype(np.float64), exported_ND.astype(np.float64))
    )
    distance_N = 1 - (unit_ND * other_ND).sum(axis=1)
    row = {text: number for number, text in enumerate(texts)}

    def scores_of(z_ND: np.ndarray) -> dict[str, float]:
        cosines = pair_cosines(pairs, lambda sentences: z_ND[[row[text] for text in sentences]])
        return {each.name: 100 * spearman(c, each.scores) for each, c in zip(pairs, cosines)}

    before = scores_of(original_ND) if pairs else {}

    def scores(width: int | None) -> dict[str, Score]:
        after = scores_of(exported_ND[:, :width]) if pairs else {}
        return {name: Score(before[name], after[name]) for name in before}

    return Export(
        path=path,
        bytes=size,
        sentences=len(texts) - 1,
        mean_distance=float(distance_N.mean()),
        max_distance=float(distance_N.max()),
        scores=scores(None),
        widths={width: scores(width) for width in dims},
    )


def _weight_bytes(path: Path) -> int:
    return sum(
        file.stat().st_size for pattern in ("*.safetensors", "*/*.onnx", "*/*.bin") for file in path.glob(pattern)
    )


def parse_dims(text: str) -> list[int]:
    """``256,128`` as numbers; none for an empty text."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--dims is {text!r}; it must be whole numbers with commas between them, such as 256,128.")
    return list(dict.fromkeys(map(int, parts)))


def describe_export(result: Export) -> list[str]:
    """What a terminal shows of it, in lines."""
    lines = [
        f"Cosine distance to the original over {result.sentences:,} sentences: mean {result.mean_distance:.2g}, "
        f"largest {result.max_distance:.2g}"
    ]
    for width, scores in [(None, result.scores), *result.widths.items()]:
        for name, (original, exported) in scores.items():
            at = f" at width {width}" if width else ""
            lines.append(f"{name}{at}: {exported:.2f}, the original {original:.2f} ({exported - original:+.2f})")
    return lines
