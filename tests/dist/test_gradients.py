"""The gradients of 2 and 4 ranks against those of one process, and those against the pure loss."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import update_weights
from spawn import run_ranks, small_config
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterns_ray import distributed, losses
from clusterns_ray.clustering.kmeans import assign, member_statistics, update_centroids
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import Config, LossConfig
from clusterns_ray.data.prepare import prepare
from clusterns_ray.losses import clusterns_loss, info_nce
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.hard_negatives import CentroidNegatives
from clusterns_ray.training.objective import Objective
from clusterns_ray.training.parts import TrainingParts

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
WAYS = ("tree", "all_reduce")
TEMPERATURE = 0.2  # a colder one magnifies the rounding of float32
K, RATE, FIRST = 6, 0.5, 11
BATCH = 52  # no tensor of this model has two sides of 52
STEPS = {"full": 1, "odd": 5}  # 297 rows are 5 batches of 52, and one of 37: shards of 10, 9, 9 and 9 rows


class Case(NamedTuple):
    columns: str
    reduction: str
    update: str
    weight: float

    def loss(self) -> LossConfig:
        return LossConfig(
            temperature=TEMPERATURE,
            hard_negative_columns=self.columns,
            hard_negative_weight=self.weight,
            bml_weight=1.0,
            bml_alpha=0.05,
            bml_beta=0.2,
            bml_reduction=self.reduction,
        )


PLAIN = LossConfig(temperature=TEMPERATURE, bml_weight=0.0)
TAUGHT = PLAIN.model_copy(update={"teacher": "one", "distillation_weight": 2.0, "teacher_temperature": 0.2})
CLUSTERED = {
    f"{columns}-{reduction}-{update}": Case(columns, reduction, update, 1.5)
    for columns, reduction, update in product(
        ("batch", "own", "not_own_cluster"), ("all_pairs", "false_negatives"), ("mean", "sum")
    )
} | {"no_weight": Case("batch", "all_pairs", "mean", 0.0)}
CASES = ["plain", "taught", *CLUSTERED]
CACHED = "not_own_cluster-false_negatives-mean"
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def setup(tiny_model: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    storage = tmp_path_factory.mktemp("gradients")
    config = small_config(
        tiny_model,
        corpus_file,
        None,
        storage,
        data={"limit": 297, "order": "random"},
        train={"global_batch_size": BATCH},
    )
    return config, prepare(config).tokens_dir, storage


@pytest.fixture(scope="module")
def by_ranks(setup: tuple[Config, Path, Path]) -> dict[int, list[dict[str, Any]]]:
    """What every rank found, for 1, 2 and 4 ranks."""
    return {ranks: run_ranks(all_cases, ranks, *setup) for ranks in (1, 2, 4)}


# ---- on the ranks -----------------------------------------------------------------------------------------------


def make_run(config: Config, tokens_dir: Path, run_dir: Path, way: str = "tree", chunk: int | None = None) -> Any:
    train = config.train.model_copy(update={"reduction": way, "cache_chunk": chunk})
    config = config.model_copy(update={"train": train})
    return TrainingParts(RunContext(config, tokens_dir, None, run_dir), torch.device("cpu"))


def all_cases(config: Config, tokens_dir: Path, run_dir: Path) -> dict[str, Any]:
    """Gradients by case and batch, with those of the pure loss where this rank holds the whole batch."""
    runs = {way: make_run(config, tokens_dir, run_dir, way) for way in WAYS}
    run = runs["tree"]
    found: dict[str, Any] = {"gradients": {}, "pure": {}, "cached": {}}
    for batch, step in STEPS.items():
        for name in CASES:
            for way in WAYS:
                found["gradients"][way, name, batch] = step_gradients(runs[way], name, step)
            if distributed.world_size() == 1:
                found["pure"][name, batch] = pure_gradients(make_run(config, tokens_dir, run_dir), name, step)
    for rows in (13, 26):
        cached = {way: make_run(config, tokens_dir, run_dir, way, rows) for way in WAYS}
        found["cached"] |= {
            (way, rows, batch): step_gradients(cached[way], CACHED, step)
            for way in WAYS
            for batch, step in STEPS.items()
        }
    for way in WAYS:
        wrong = runs[way]
        found["unscaled", way] = step_gradients(wrong, "plain", 1, divide_by=distributed.world_size())
        found["own_rows_alone", way] = step_gradients(wrong, "plain", 1, keys=False)

    z1_bD, z2_bD = (z.detach() for z in run.views(run.batch(1)[1])[:2])
    found["views_apart"] = float((z1_bD - z2_bD).norm() / z1_bD.norm())
    layouts = {batch: run.batch(step)[0] for batch, step in STEPS.items()}
    found["shares"] = {batch: len(layout.canonical(layout.rank)) for batch, layout in layouts.items()}
    return found


def clustered_objective(case: Case, update: Any = "mean") -> Objective:
    return Objective(case.loss(), CentroidNegatives(case.loss(), Clustering(K, 1.0, RATE, update), FIRST))


def clustering_of(objective: Objective) -> Clustering:
    assert objective.hard_negatives is not None
    return objective.hard_negatives.clustering


def objective_of(run: TrainingParts, name: str) -> Objective:
    """The objective of a case; where it clusters, batch 0 has created the centroids."""
    if name in ("plain", "taught"):
        return Objective({"plain": PLAIN, "taught": TAUGHT}[name])
    case = CLUSTERED[name]
    objective = clustered_objective(case, case.update)
    layout, shards = run.batch(0)
    views = run.forward(layout, shards)
    objective(views.z1_BD, views.z2_BD, layout.rows_B)
    assert clustering_of(objective).started
    return objective


def step_gradients(run: TrainingParts, name: str, step: int, *, divide_by: int = 1, keys: bool = True) -> Gradients:
    """Of one case; without the gradients of the columns unless ``keys``."""
    objective = objective_of(run, name)
    layout, shards = run.batch(step)
    views = run.forward(layout, shards)
    z2_BD = views.z2_BD if keys else views.z2_BD.detach()
    teacher_BD = teacher(views.z1_BD) if name == "taught" else None
    loss = objective(views.z1_BD, z2_BD, layout.rows_B, None, teacher_BD).loss / divide_by
    return gradients_of(run, loss, views.backward)


def teacher(z1_BD: torch.Tensor) -> torch.Tensor:
    """Embeddings that rank otherwise than ``z1``, of each row alone."""
    directions = torch.randn(z1_BD.shape[1], 6, generator=torch.Generator().manual_seed(0), dtype=z1_BD.dtype)
    return z1_BD.detach() @ directions


def gradients_of(run: TrainingParts, loss: torch.Tensor, backward: Any = torch.Tensor.backward) -> Gradients:
    run.views.zero_grad(set_to_none=True)
    backward(loss)
    gradients = {name: p.grad for name, p in run.views.named_parameters() if p.grad is not None}
    return {name: (g.to_dense() if g.is_sparse else g).clone() for name, g in gradients.items()}


def pure_gradients(run: TrainingParts, name: str, step: int) -> Gradients:
    """From the pure functions over the whole batch in float64, behind the same float32 encoder."""
    z1_BD, z2_BD = (z.double() for z in run.views(run.batch(step)[1])[:2])
    if name == "plain":
        return gradients_of(run, info_nce(z1_BD, z2_BD, PLAIN.temperature))
    if name == "taught":
        return gradients_of(run, info_nce(z1_BD, z2_BD, TAUGHT.temperature) + 2 * divergence(z1_BD, z2_BD))
    case, loss = CLUSTERED[name], CLUSTERED[name].loss()
    centroids_KD = clustering_of(objective_of(run, name)).centroids_KD
    assert centroids_KD is not None
    centroids_KD, members_BD = centroids_KD.double(), z1_BD.detach()
    statistics = member_statistics(members_BD, assign(members_BD, centroids_KD)[0], K)
    moved_KD = update_centroids(centroids_KD, *statistics, RATE, case.update)
    known = set(inspect.signature(clusterns_loss).parameters)
    return gradients_of(run, clusterns_loss(z1_BD, z2_BD, moved_KD, **loss.model_dump(include=known)).loss)


def divergence(z1_BD: torch.Tensor, z2_BD: torch.Tensor) -> torch.Tensor:
    """From the teacher's ranking of the batch, row by row over the other rows."""
    scores_BB = normalize(z1_BD) @ normalize(z2_BD).T / TEMPERATURE
    taught_B6 = normalize(teacher(z1_BD.float()).double())
    taught_BB = taught_B6 @ taught_B6.T / TAUGHT.teacher_temperature
    found = []
    for i in range(len(z1_BD)):
        others = torch.arange(len(z1_BD)) != i
        p, q = taught_BB[i, others].softmax(dim=0), scores_BB[i, others].softmax(dim=0)
        found.append((p * (p / q).log()).sum())
    return torch.stack(found).mean()


# ---- comparisons ------------------------------------------------------------------------------------------------


def norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def distance(a: Gradients, b: Gradients) -> float:
    """Norm of the difference, relative to the norm of ``b``."""
    assert a.keys() == b.keys()
    return norm({name: a[name].double() - b[name].double() for name in b}) / norm(b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_equal_those_of_one_process(by_ranks, way: str, ranks: int, name: str):
    for batch in STEPS:
        alone = by_ranks[1][0]["gradients"][way, name, batch]
        assert norm(alone) > 1e-4
        for found in by_ranks[ranks]:
            assert distance(found["gradients"][way, name, batch], alone) < (TOLERANCE if way == "all_reduce" else 1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_one_process_equal_those_of_the_pure_loss(by_ranks, way: str, name: str):
    found = by_ranks[1][0]
    for batch in STEPS:
        assert norm(found["pure"][name, batch]) > 1e-4
        assert distance(found["gradients"][way, name, batch], found["pure"][name, batch]) < TOLERANCE


@pytest.mark.parametrize("rows", [13, 26])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_cached_gradients_equal_those_of_the_whole_batch(by_ranks, way: str, ranks: int, rows: int):
    for batch in STEPS:
        whole = by_ranks[1][0]["gradients"][way, CACHED, batch]
        for found in by_ranks[ranks]:
            assert distance(found["cached"][way, rows, batch], whole) < TOLERANCE


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_the_comparison_notices_wrong_scales_and_lost_gradients(by_ranks, way: str, ranks: int):
    alone = by_ranks[1][0]["gradients"][way, "plain", "full"]
    for found in by_ranks[ranks]:
        assert distance(found["unscaled", way], alone) == pytest.approx(1 - 1 / ranks, abs=1e-3)
        assert distance(found["own_rows_alone", way], alone) > 0.01


def test_the_cases_test_what_they_say(by_ranks):
    """Dropout is on, the odd batch is odd, every setting changes the gradient."""
    alone = by_ranks[1][0]
    assert alone["views_apart"] > 0.01
    for ranks in (2, 4):
        assert len({found["shares"]["full"] for found in by_ranks[ranks]}) == 1
        assert len({found["shares"]["odd"] for found in by_ranks[ranks]}) == 2
    for batch in STEPS:
        for first, second in (
            ("plain", "no_weight"),
            ("plain", "taught"),
            ("no_weight", "batch-all_pairs-mean"),
            ("batch-all_pairs-mean", "own-all_pairs-mean"),
            ("batch-all_pairs-mean", "not_own_cluster-all_pairs-mean"),
            ("batch-all_pairs-mean", "batch-false_negatives-mean"),
            ("batch-all_pairs-mean", "batch-all_pairs-sum"),
        ):
            gradients = alone["gradients"]
            assert distance(gradients["tree", first, batch], gradients["tree", second, batch]) > 1e-3, (
                first,
                second,
                batch,
            )


# ---- several steps ----------------------------------------------------------------------------------------------


def five_steps(config: Config, tokens_dir: Path, run_dir: Path) -> dict[str, Any]:
    run = make_run(config, tokens_dir, run_dir)
    run.warm_up_reducer()
    objective = clustered_objective(CLUSTERED["batch-all_pairs-mean"])
    centroids = []
    for step in range(6):
        layout, shards = run.batch(step)
        views = run.forward(layout, shards)
        loss = objective(views.z1_BD, views.z2_BD, layout.rows_B).loss
        update_weights(run.optimizer, loss, 1e-3, views.backward)
        assert clustering_of(objective).centroids_KD is not None
        centroids.append(clustering_of(objective).centroids_KD.clone())
    return {"centroids": centroids, "weights": [p.detach().clone() for p in run.views.parameters()]}


@pytest.mark.parametrize("ranks", [2, 4])
def test_centroids_and_weights_are_bit_identical_on_all_ranks(setup: tuple[Config, Path, Path], ranks: int):
    results = run_ranks(five_steps, ranks, *setup)
    first = results[0]
    moves = [float((b - a).norm()) for a, b in pairwise(first["centroids"])]
    assert len(moves) == 5 and min(moves) > 1e-3
    for other in results[1:]:
        for kind in ("centroids", "weights"):
            assert all(torch.equal(a, b) for a, b in zip(first[kind], other[kind], strict=True)), kind


# ---- memory -----------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """The shapes of every tensor that is made, forward and backward; not of row numbers and random words."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(leaf.shape)
            for leaf in tree_leaves(result)
            if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.int64
        }
        return result


def test_a_large_batch_goes_through_the_loss_in_blocks(
    setup: tuple[Config, Path, Path], monkeypatch: pytest.MonkeyPatch
):
    """No matrix of the batch by the batch is made, forward or backward; values and gradients are the same."""
    run = make_run(*setup)
    layout, shards = run.batch(1)
    views = run.forward(layout, shards)
    found = []
    for size in (losses.BLOCK, 13 * BATCH + 1):
        monkeypatch.setattr(losses, "BLOCK", size)
        objective = objective_of(run, CACHED)
        with Shapes() as shapes:
            step = objective(views.z1_BD, views.z2_BD, layout.rows_B)
            gradients = torch.autograd.grad(step.loss, [views.z1_BD, views.z2_BD])
        found.append((step.values, *gradients))
        quadratic = [shape for shape in shapes.seen if shape.count(BATCH) > 1 or BATCH**2 in shape]
        assert quadratic == ([] if size != 2**22 else [(BATCH, BATCH)])
    assert (13, BATCH) in shapes.seen
    for whole, in_blocks in zip(*found, strict=True):
        torch.testing.assert_close(in_blocks, whole, rtol=1e-5, atol=1e-7)
