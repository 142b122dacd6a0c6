"""The averaged gradients of 2 and 4 ranks against those of one process, and those against the pure loss."""

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

from clusterns_ray import distributed
from clusterns_ray.clustering.kmeans import assign, member_statistics, update_centroids
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import Config, LossConfig
from clusterns_ray.data.prepare import prepare
from clusterns_ray.losses import clusterns_loss, info_nce
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.hard_negatives import CentroidNegatives
from clusterns_ray.training.objective import Objective
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.views import CachedViews, chunked

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
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


def make_run(config: Config, tokens_dir: Path, run_dir: Path) -> TrainingParts:
    return TrainingParts(RunContext(config, tokens_dir, None, run_dir), torch.device("cpu"))


def all_cases(config: Config, tokens_dir: Path, run_dir: Path) -> dict[str, Any]:
    """Gradients by case and batch, with those of the pure loss where this rank holds the whole batch."""
    run = make_run(config, tokens_dir, run_dir)
    found: dict[str, Any] = {"gradients": {}, "pure": {}}
    for batch, step in STEPS.items():
        for name in CASES:
            objective = objective_of(run, name)
            found["gradients"][name, batch] = step_gradients(run, objective, step, taught=name == "taught")
            if distributed.world_size() == 1:
                found["pure"][name, batch] = pure_gradients(run, name, step)
    for batch, step in STEPS.items():
        found["cached"] = found.get("cached", {}) | {
            (rows, batch): cached_gradients(run, step, rows) for rows in (13, 26)
        }
    found["unscaled"] = step_gradients(run, objective_of(run, "plain"), 1, divide_by=distributed.world_size())
    gather, distributed.all_gather_rows = distributed.all_gather_rows, gather_with_gradient_of_own_rows_alone
    found["own_rows_alone"] = step_gradients(run, objective_of(run, "plain"), 1)
    distributed.all_gather_rows = gather

    z1_bD, z2_bD = (z.detach() for z in run.views(run.batch(1)[1])[:2])
    found["views_apart"] = float((z1_bD - z2_bD).norm() / z1_bD.norm())
    found["shares"] = {
        batch: len(z) for batch, step in STEPS.items() for z in [run.batch(step)[0].positive_b(run.device)]
    }
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
    with torch.no_grad():
        objective(*run.views(shards)[:2], layout)
    assert clustering_of(objective).started
    return objective


def step_gradients(
    run: TrainingParts, objective: Objective, step: int, *, divide_by: int = 1, taught: bool = False
) -> Gradients:
    layout, shards = run.batch(step)
    z1_bD, z2_bD, _ = run.model(shards)
    teacher_bD = teacher(z1_bD) if taught else None
    return gradients_of(run, objective(z1_bD, z2_bD, layout, None, teacher_bD).scaled_loss / divide_by)


def teacher(z1_bD: torch.Tensor) -> torch.Tensor:
    """Embeddings that rank otherwise than ``z1``, of each row alone."""
    directions = torch.randn(z1_bD.shape[1], 6, generator=torch.Generator().manual_seed(0), dtype=z1_bD.dtype)
    return z1_bD.detach() @ directions


def cached_gradients(run: TrainingParts, step: int, rows: int) -> Gradients:
    layout, shards = run.batch(step)
    views = CachedViews(run.model, chunked(shards, rows))
    objective = objective_of(run, CACHED)
    run.views.zero_grad(set_to_none=True)
    views.backward(objective(views.z1_bD, views.z2_bD, layout).scaled_loss)
    return {name: p.grad.clone() for name, p in run.views.named_parameters() if p.grad is not None}


def gradients_of(run: TrainingParts, loss: torch.Tensor) -> Gradients:
    run.views.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in run.views.named_parameters() if p.grad is not None}


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


def gather_with_gradient_of_own_rows_alone(rows: torch.Tensor) -> torch.Tensor:
    """The usual mistake: a plain all-gather, with this rank's own rows put back so that they carry gradients."""
    gathered = rows.new_empty(distributed.world_size() * len(rows), *rows.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, rows.detach().contiguous())
    chunks = list(gathered.chunk(distributed.world_size()))
    chunks[distributed.rank()] = rows
    return torch.cat(chunks)


# ---- comparisons ------------------------------------------------------------------------------------------------


def norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def distance(a: Gradients, b: Gradients) -> float:
    """Norm of the difference, relative to the norm of ``b``."""
    assert a.keys() == b.keys()
    return norm({name: a[name].double() - b[name].double() for name in b}) / norm(b)


@pytest.mark.parametrize("batch", STEPS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_averaged_gradients_equal_those_of_one_process(by_ranks, ranks: int, name: str, batch: str):
    alone = by_ranks[1][0]["gradients"][name, batch]
    assert norm(alone) > 1e-4
    for found in by_ranks[ranks]:
        assert distance(found["gradients"][name, batch], alone) < TOLERANCE


@pytest.mark.parametrize("batch", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_one_process_equal_those_of_the_pure_loss(by_ranks, name: str, batch: str):
    found = by_ranks[1][0]
    assert norm(found["pure"][name, batch]) > 1e-4
    assert distance(found["gradients"][name, batch], found["pure"][name, batch]) < TOLERANCE


@pytest.mark.parametrize("batch", STEPS)
@pytest.mark.parametrize("rows", [13, 26])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cached_gradients_equal_those_of_the_whole_batch(by_ranks, ranks: int, rows: int, batch: str):
    whole = by_ranks[1][0]["gradients"][CACHED, batch]
    for found in by_ranks[ranks]:
        assert distance(found["cached"][rows, batch], whole) < TOLERANCE


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_comparison_notices_wrong_scales_and_lost_gradients(by_ranks, ranks: int):
    alone = by_ranks[1][0]["gradients"]["plain", "full"]
    for found in by_ranks[ranks]:
        assert distance(found["unscaled"], alone) == pytest.approx(1 - 1 / ranks, abs=1e-3)
        assert distance(found["own_rows_alone"], alone) > 0.01


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
            assert distance(gradients[first, batch], gradients[second, batch]) > 1e-3, (first, second, batch)


# ---- several steps ----------------------------------------------------------------------------------------------


def five_steps(config: Config, tokens_dir: Path, run_dir: Path) -> dict[str, Any]:
    run = make_run(config, tokens_dir, run_dir)
    run.warm_up_reducer()
    objective = clustered_objective(CLUSTERED["batch-all_pairs-mean"])
    centroids = []
    for step in range(6):
        layout, shards = run.batch(step)
        update_weights(run.optimizer, objective(*run.model(shards)[:2], layout).scaled_loss, 1e-3)
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


def shapes_of_two_steps(config: Config, tokens_dir: Path, run_dir: Path) -> set[tuple[int, ...]]:
    """Of a step that creates the centroids, and of one that uses them."""
    run = make_run(config, tokens_dir, run_dir)
    objective = clustered_objective(CLUSTERED["not_own_cluster-false_negatives-mean"])
    with Shapes() as shapes:
        for step in range(2):
            layout, shards = run.batch(step)
            update_weights(run.optimizer, objective(*run.model(shards)[:2], layout).scaled_loss, 1e-3)
    assert clustering_of(objective).started
    return shapes.seen


def test_no_worker_makes_a_matrix_of_batch_by_batch(setup: tuple[Config, Path, Path]):
    def quadratic(shapes: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [shape for shape in shapes if shape.count(BATCH) > 1 or BATCH**2 in shape]

    assert quadratic(run_ranks(shapes_of_two_steps, 1, *setup)[0]) == [(BATCH, BATCH)]
    for shapes in run_ranks(shapes_of_two_steps, 4, *setup):
        assert (BATCH // 4, BATCH) in shapes
        assert not quadratic(shapes)
