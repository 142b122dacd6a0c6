"""What ranks exchange in a step, call by call, against what `plan` says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import WIDTH, update_weights
from spawn import run_ranks, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterns_ray.config import Config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.ops.plan.workload import workload
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.parts import TrainingParts

pytestmark = pytest.mark.slow

KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "broadcast_": "broadcast"}


class Collectives(TorchDispatchMode):
    """Records every collective: its kind, and the bytes that are summed, or have been gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = [leaf for leaf in tree_leaves(args[:1]) if isinstance(leaf, torch.Tensor)]
            self.found.append((KINDS.get(name, name), sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def exchanged(config: Config, tokens_dir: Path, run_dir: Path) -> list[tuple[str, int]]:
    run = TrainingParts(RunContext(config, tokens_dir, None, run_dir), torch.device("cpu"))
    run.warm_up_reducer()
    recorder = Collectives()
    for step in range(2):  # the first one creates the centroids
        layout, shards = run.batch(step)
        recorder.found.clear()
        with recorder:
            views = run.forward(layout, shards)
            loss = run.objective(
                views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2, run.teacher_embeddings(layout, shards)
            )
            update_weights(run.optimizer, loss.loss, 1e-4, views.backward)
    return recorder.found


CASES: dict[str, dict[str, Any]] = {
    "clusters": {},
    "no clusters": {"clustering": {"num_clusters": 0}},
    "masked words": {"loss": {"mlm_weight": 0.1}},
    "clusters of the corpus": {
        "clustering": {"scope": "corpus", "num_clusters": 40, "start_cosine": 1.0, "refresh_rows": 7},
        "loss": {"bank_negatives": 3, "bml_reduction": "false_negatives"},
    },
    "teacher": {"loss": {"teacher": "TEACHER"}},
    "in chunks": {"train": {"cache_chunk": 8}},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_step_exchanges_what_the_plan_says(
    case: str, ranks: int, tiny_model: Path, corpus_file: Path, tmp_path: Path
):
    sections = {"clustering": {"start_cosine": 1.0}, **CASES[case]}
    if case == "teacher":
        sections["loss"] = {"teacher": str(tiny_model)}
    config = small_config(tiny_model, corpus_file, None, tmp_path, **sections)
    tokens_dir = prepare(config).tokens_dir
    results = run_ranks(exchanged, ranks, config, tokens_dir, tmp_path / "run")

    expected = Counter((exchange.kind, int(exchange.size)) for exchange in workload(config).exchanges())
    assert expected[("all_gather", 32 * WIDTH * 4)] == (2 if case in ("clusters of the corpus", "teacher") else 1)
    for found in results:
        assert Counter(found) == expected
