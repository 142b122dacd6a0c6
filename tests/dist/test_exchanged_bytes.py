"""What ranks exchange in a step, call by call, against what `plan` says of it."""

from __future__ import annotations

from collections import Counter
from itertools import product
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

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
}


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
    "crops": {"data": {"positives": "crop"}},
    "twelve shards": {"train": {"shards": 12, "global_batch_size": 36}},
}
WAYS = ("tree", "all_reduce")


def exchanged_by_all(configs: list[Config], tokens_dirs: list[Path], run_dir: Path) -> list[list[tuple[str, int]]]:
    return [exchanged(config, tokens, run_dir) for config, tokens in zip(configs, tokens_dirs, strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_exchanges_what_the_plan_says(ranks: int, tiny_model: Path, corpus_file: Path, tmp_path: Path):
    configs: list[Config] = []
    for case, way in product(CASES, WAYS):
        sections = {name: dict(section) for name, section in CASES[case].items()}
        sections["clustering"] = {"start_cosine": 1.0, **sections.get("clustering", {})}
        sections["train"] = {**sections.get("train", {}), "reduction": way}
        if case == "teacher":
            sections["loss"] = {"teacher": str(tiny_model)}
        configs.append(small_config(tiny_model, corpus_file, None, tmp_path, **sections))
    tokens_dirs = [prepare(config).tokens_dir for config in configs]
    by_rank = run_ranks(exchanged_by_all, ranks, configs, tokens_dirs, tmp_path / "run")

    for config, found in zip(configs, by_rank[0], strict=True):
        exchanges = workload(config).exchanges(ranks)
        at_most = [exchange for exchange in exchanges if exchange.what == "gradients of tokens"]
        expected = Counter((exchange.kind, int(exchange.size)) for exchange in exchanges if exchange not in at_most)
        assert expected["all_gather", config.train.global_batch_size * 2 * WIDTH * 4] == 1
        rest = Counter(found) - expected
        assert not expected - Counter(found), config
        # Rows and ids of tokens; what is padded so that all workers have as many comes on top.
        assert bool(rest) is bool(at_most)
        for exchange in at_most:
            assert sorted(kind for kind, _ in rest.elements()) == ["all_gather"] * 2
            assert 0.2 < sum(size for _, size in rest.elements()) / exchange.size < 1.2
    assert all(Counter(found) == Counter(first) for other in by_rank for found, first in zip(other, by_rank[0]))
