"""The bank of the corpus: what is drawn from it, what is written into it, and the loss, each against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WIDTH, update_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterns_ray.clustering.bank import Bank, draw_negatives, list_members, mapped_zeros
from clusterns_ray.clustering.kmeans import cosine_matrix
from clusterns_ray.config import Config, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.data.sampler import permute, stream_key
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.losses import BankNegatives, bank_negative_logits, clusterns_loss_share, similar_mask
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.metrics import step_metrics
from clusterns_ray.training.objective import VALUE_NAMES, StepLoss
from clusterns_ray.training.parts import TrainingParts

CPU = torch.device("cpu")
B, K, M = 24, 40, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- drawing ------------------------------------------------------------------------------------------------------


def drawn_by_hand(
    cosines: list[list[float]], own: list[int], draws: list[list[int]], cluster: list[int]
) -> list[list[int]]:
    """Plain Python, from the words of the documentation."""
    found = []
    for cosine, slot, numbers in zip(cosines, own, draws):
        ranked = sorted(range(len(cosine)), key=lambda k: -cosine[k])
        pools = [[row for row, c in enumerate(cluster) if c == k and row != slot] for k in ranked[1:]]
        pool = next((pool for pool in pools if pool), [])
        found.append([pool[number % len(pool)] if pool else -1 for number in numbers])
    return found


@pytest.mark.parametrize("seed", range(6))
def test_drawn_rows_are_of_the_next_nearest_cluster_that_holds_another_row(seed: int) -> None:
    rows, k, n = 50, 9, 30
    cos_bK = torch.rand(rows, k, generator=generator(seed)) * 2 - 1
    own_b = torch.randint(-1, n, (rows,), generator=generator(seed + 100))
    draws_bM = torch.randint(0, 2**62, (rows, 4), generator=generator(seed + 200))
    # Of 9 clusters some are empty, some hold one row: so few of them are used.
    cluster_N = torch.randint(0, k, (n,), generator=generator(seed + 300)).clamp(max=3 + seed)
    cluster_N[0] = k - 1
    found = draw_negatives(cos_bK, own_b, draws_bM, list_members(cluster_N, k)).tolist()
    assert found == drawn_by_hand(cos_bK.tolist(), own_b.tolist(), draws_bM.tolist(), cluster_N.tolist())
    assert all(slot not in row for slot, row in zip(own_b.tolist(), found))


def test_every_row_of_the_pool_is_drawn_and_never_the_row_itself() -> None:
    cluster_N = torch.tensor([0, 1, 1, 1, 0, 1, 2])
    cos_bK = torch.tensor([[0.9, 0.8, 0.1]])
    draws_bM = torch.arange(1000)[None]
    for own, pool in ((-1, {1, 2, 3, 5}), (3, {1, 2, 5}), (1, {2, 3, 5}), (5, {1, 2, 3}), (0, {1, 2, 3, 5})):
        found = draw_negatives(cos_bK, torch.tensor([own]), draws_bM, list_members(cluster_N, 3))
        assert set(found.flatten().tolist()) == pool
        assert found.flatten().bincount(minlength=7)[sorted(pool)].min() >= 1000 // len(pool)


def test_an_empty_second_cluster_falls_back_and_without_any_other_there_is_none() -> None:
    cos_bK = torch.tensor([[0.9, 0.8, 0.7, 0.6]] * 3)
    draws_bM = torch.zeros(3, 2, dtype=torch.int64)
    own_b = torch.tensor([-1, 2, 0])
    # Cluster 1 is empty; cluster 2 holds row 2 alone, so that row 2 falls back to cluster 3.
    some = draw_negatives(cos_bK, own_b, draws_bM, list_members(torch.tensor([0, 0, 2, 3]), 4))
    assert some.tolist() == [[2, 2], [3, 3], [2, 2]]
    none = draw_negatives(cos_bK, own_b, draws_bM, list_members(torch.tensor([0, 0, 0, 0]), 4))
    assert none.tolist() == [[-1, -1]] * 3
    broken = draw_negatives(cos_bK * math.nan, own_b, draws_bM, list_members(torch.tensor([0, 1, 2, 3]), 4))
    assert broken.tolist() == [[-1, -1]] * 3


# ---- the bank -----------------------------------------------------------------------------------------------------


def bank(directory: Path, rows: list[int], width: int = 4, k: int = 3) -> Bank:
    made = Bank(np.array(rows), width, k, directory, CPU)
    made.allocate()
    return made


def test_rows_of_the_corpus_are_found_by_their_number(tmp_path: Path) -> None:
    found = bank(tmp_path, [2, 5, 9]).slots(np.array([9, 2, 3, 5, 0, 10]))
    assert found.tolist() == [2, 0, -1, 1, -1, -1]


def test_write_replaces_these_rows_and_no_others_and_keeps_out_what_is_not_finite(tmp_path: Path) -> None:
    made = bank(tmp_path, [2, 5, 9, 11])
    assert made.z_ND is not None
    made.z_ND.copy_(torch.arange(16.0).view(4, 4))
    made.write(torch.tensor([3, 1]), torch.tensor([[1.0, 2.0, math.nan, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    assert made.z_ND.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_the_file_has_no_name_and_too_large_a_bank_is_refused(tmp_path: Path) -> None:
    z = mapped_zeros(tmp_path / "run", 5, 3)
    assert z.shape == (5, 3) and z.dtype == torch.float32 and not z.any()
    z.fill_(2)
    assert z.sum() == 30 and list((tmp_path / "run").iterdir()) == []
    with pytest.raises(ClusterNSError, match=r"needs 4,000,000,000,000 MB .*clustering.bank_rows"):
        mapped_zeros(tmp_path / "run", 10**12, 10**6)
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ClusterNSError, match="Free some, or lower"):
        mapped_zeros(tmp_path / "file", 5, 3)


def blobs(k: int = 5, members: int = 40, width: int = 16) -> torch.Tensor:
    directions = torch.linalg.qr(torch.randn(width, k, generator=generator(1)))[0].T
    return directions.repeat(members, 1) + 0.15 * torch.randn(k * members, width, generator=generator(2))


def test_clusters_are_a_function_of_the_seed_and_of_the_centroids_before(tmp_path: Path) -> None:
    made = bank(tmp_path, list(range(200)), 16, 8)
    made.write(torch.arange(200), blobs())
    first_KD = made.cluster(7, None)
    members = made.members
    assert members is not None and members.sizes_K.sum() == 200 and made.empty() == int((members.sizes_K == 0).sum())
    assert torch.equal(first_KD, made.cluster(7, None)) and not torch.equal(first_KD, made.cluster(8, None))
    warm_KD = made.cluster(7, first_KD)
    assert torch.equal(warm_KD, made.cluster(7, first_KD))
    # It goes on where it was, and is no worse: no cluster changes its number.
    assert (warm_KD * first_KD).sum(dim=1).min() > 0.8
    assert made.z_ND is not None and made.members is not None
    n_ND = torch.nn.functional.normalize(made.z_ND)
    assert (n_ND @ warm_KD.T).max(dim=1)[0].sum() >= (n_ND @ first_KD.T).max(dim=1)[0].sum() - 1e-3
    nearest = [max(range(8), key=lambda c: float(z @ warm_KD[c])) for z in n_ND]
    assert made.members.cluster_N.tolist() == nearest
    for c in range(8):
        start, size = int(made.members.starts_K[c]), int(made.members.sizes_K[c])
        assert made.members.by_cluster_N[start : start + size].tolist() == [n for n in range(200) if nearest[n] == c]


def test_state_round_trip(tmp_path: Path) -> None:
    made, again = (bank(tmp_path, list(range(200)), 16, 5) for _ in range(2))
    made.write(torch.arange(200), blobs())
    made.cluster(7, None)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert made.z_ND is not None and again.z_ND is not None and made.members is not None and again.members is not None
    assert torch.equal(made.z_ND, again.z_ND)
    assert all(torch.equal(a, b) for a, b in zip(made.members, again.members, strict=True))
    again.write(torch.tensor([3]), torch.ones(1, 16))
    assert not torch.equal(made.z_ND, again.z_ND), "they share memory"
    empty = Bank(np.arange(200), 16, 5, tmp_path, CPU)
    again.load_state_dict(empty.state_dict())
    assert again.z_ND is None and again.members is None


# ---- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["batch", "own", "not_own_cluster"])
def test_which_sentences_each_row_sees(columns: Any) -> None:
    cos_bn = torch.rand(2, 6, generator=generator(0))
    negatives = BankNegatives(
        nearest_b=torch.tensor([7, 8]),
        nearest_B=torch.tensor([7, 8, 9]),
        own_b=torch.tensor([20, -1]),
        z_nD=torch.zeros(6, 1),
        slot_n=torch.tensor([10, 11, 20, -1, 14, 15]),
        row_n=torch.tensor([0, 0, 1, 1, 2, 2]),
        cluster_n=torch.tensor([8, 8, 7, 0, 8, 9]),
    )
    logits = bank_negative_logits(cos_bn, torch.tensor([0, 1]), negatives, 0.1, columns, 1.5)
    # Slot 20 is row 0 itself; slot -1 is none.
    seen = {
        "batch": [{0, 1, 4, 5}, {0, 1, 2, 4, 5}],
        "own": [{0, 1}, {2}],
        "not_own_cluster": [{0, 1, 4, 5}, {2, 5}],
    }[columns]
    for row in range(2):
        for n in range(6):
            own = int(negatives.row_n[n]) == row
            expected = float(cos_bn[row, n]) / 0.1 + 1.5 * own if n in seen[row] else -math.inf
            assert float(logits[row, n]) == pytest.approx(expected, rel=1e-6), (row, n)


def test_other_columns_are_refused() -> None:
    nothing = torch.zeros(1, dtype=torch.int64)
    negatives = BankNegatives(nothing, nothing, nothing, torch.zeros(1, 1), nothing, nothing, nothing)
    with pytest.raises(ConfigError, match="hard_negative_columns is 'all'"):
        bank_negative_logits(torch.zeros(1, 1), nothing, negatives, 1.0, "all", 0.0)  # type: ignore[arg-type]


def test_false_negatives_share_a_cluster_and_are_similar() -> None:
    cos_bB = torch.rand(3, 5, generator=generator(3)) * 2 - 1
    nearest_b, nearest_B, positive_b = torch.tensor([1, 2, 1]), torch.tensor([1, 2, 1, 2, 1]), torch.tensor([2, 1, 4])
    for lowest in (-1.0, 0.0, 0.3):
        found = similar_mask(cos_bB, nearest_b, nearest_B, positive_b, lowest)
        for i, j in np.ndindex(3, 5):
            same = int(nearest_b[i]) == int(nearest_B[j]) and j != int(positive_b[i])
            assert bool(found[i, j]) is (same and float(cos_bB[i, j]) > lowest)


@pytest.mark.parametrize("columns", ["batch", "own", "not_own_cluster"])
def test_gradients_are_those_of_finite_differences(columns: Any) -> None:
    """Of the whole loss with sentences of the bank; some are not seen, and one row has none."""
    drawn = torch.rand(8, 5, generator=generator(1), dtype=torch.float64) - 0.5
    positive_b = torch.arange(4)
    nearest_b = torch.tensor([0, 0, 1, 1])
    slot_n = torch.tensor([3, 4, 5, 6, 0, 7, -1, -1])
    row_n, cluster_n = torch.arange(4).repeat_interleave(2), torch.tensor([1, 1, 2, 2, 0, 2, 0, 0])
    negatives = BankNegatives(nearest_b, nearest_b, torch.tensor([0, 1, 2, -1]), drawn, slot_n, row_n, cluster_n)

    def loss(z1_BD: torch.Tensor, z2_BD: torch.Tensor) -> torch.Tensor:
        cos_BB = cosine_matrix(z1_BD, z2_BD)
        logits = bank_negative_logits(cosine_matrix(z1_BD, drawn), positive_b, negatives, 0.5, columns, 0.7)
        mask_BB = similar_mask(cos_BB, nearest_b, nearest_b, positive_b, -1.0)
        margins = {"bml_weight": 0.5, "bml_alpha": 0.05, "bml_beta": 0.2}
        return clusterns_loss_share(cos_BB, logits, positive_b, mask_BB, mask_BB.sum(), temperature=0.5, **margins).loss

    views = [
        (torch.rand(4, 5, generator=generator(seed), dtype=torch.float64) - 0.5).requires_grad_() for seed in (2, 3)
    ]
    assert torch.autograd.gradcheck(loss, views)


# ---- in a step ----------------------------------------------------------------------------------------------------


class Parts(TrainingParts):
    """The parts of a step, and how many were taken with them."""

    steps = 0


@pytest.fixture
def make_run(tiny_model: Path, corpus_file: Path, tmp_path: Path) -> Callable[..., Parts]:
    def make(**sections: dict[str, Any]) -> Parts:
        values: dict[str, Any] = {
            "seed": 1,
            "encoder": {"name": str(tiny_model), "num_layers": 2, "pooling": "cls"},
            "data": {"corpus": str(corpus_file), "cache_dir": str(tmp_path / "cache")},
            "loss": {"bml_weight": 0.5, "bml_alpha": 0.05, "bml_beta": 0.2, "temperature": 0.2, "bank_negatives": M},
            "clustering": {
                "scope": "corpus",
                "num_clusters": K,
                "bank_rows": 200,
                "start_cosine": 1.0,
                "recluster_every_steps": 3,
                "false_negative_cosine": 0.1,
            },
            "train": {"global_batch_size": B, "shards": 4, "learning_rate": 1e-2, "precision": "fp32"},
            "evaluation": {"sts": None},
        }
        for name, section in sections.items():
            values[name] = values[name] | section
        config: Config = make_config(values)
        run_dir = tmp_path / "run"
        tokens_dir = prepare(config).tokens_dir
        with torch.random.fork_rng(devices=[]):
            return Parts(RunContext(config, tokens_dir, None, run_dir), CPU)

    return make


def take_step(run: Parts) -> tuple[StepLoss, torch.Tensor, torch.Tensor, Any]:
    with torch.random.fork_rng(devices=[]):
        layout, shards = run.batch(run.steps)
        views = run.forward(layout, shards)
        step = run.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2)
        update_weights(run.optimizer, step.loss, 1e-2, views.backward)
    run.steps += 1
    return step, views.z1_BD.detach(), views.z2_BD.detach(), layout


def embeddings_of(run: Parts) -> torch.Tensor:
    assert run.corpus is not None and run.corpus.bank.z_ND is not None
    return run.corpus.bank.z_ND


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("reduction", ["all_pairs", "false_negatives"])
@pytest.mark.parametrize("columns", ["batch", "own", "not_own_cluster"])
def test_the_loss_is_that_of_loops_in_float64(make_run: Callable[..., Parts], columns: str, reduction: str) -> None:
    """Drawn sentences, clusters, mask and both terms again, from the embeddings and the bank alone."""
    run = make_run(loss={"hard_negative_columns": columns, "bml_reduction": reduction, "hard_negative_weight": 0.7})
    first = take_step(run)[0]
    assert first.counts_K is None and run.corpus is not None and run.corpus.age == 0
    before_ND, centroids_KD = embeddings_of(run).clone().numpy().astype(np.float64), run.clustering.centroids_KD
    members = run.corpus.bank.members
    assert centroids_KD is not None and members is not None
    cluster_N, rows_N = members.cluster_N.tolist(), run.corpus.bank.rows_N.tolist()
    step, z1, z2, layout = take_step(run)
    z1, z2, centroids = (z.numpy().astype(np.float64) for z in (z1, z2, centroids_KD))

    cosines_K = [[cosine(z, c) for c in centroids] for z in z1]
    nearest = [max(range(K), key=row.__getitem__) for row in cosines_K]
    own = [rows_N.index(row) if row in rows_N else -1 for row in layout.rows_B.tolist()]
    assert 0 < own.count(-1) < B, "both kinds of rows"
    key = stream_key("bank_negatives", run.config.seed, 0)
    draws = permute(np.arange(B * M), 2**62, key).reshape(B, M).tolist()
    drawn = drawn_by_hand(cosines_K, own, draws, cluster_N)
    assert all(n >= 0 for row in drawn for n in row) and len({n for row in drawn for n in row}) > 10

    info_nce = bml = pairs = 0.0
    for i in range(B):
        others = [cosine(z1[i], z) for z in z2]
        denominator = sum(math.exp(c / 0.2) for c in others)
        for j in range(B):
            for n in drawn[j]:
                if n == own[i] or (columns == "own" and j != i):
                    continue
                if columns == "not_own_cluster" and cluster_N[n] == nearest[i]:
                    continue
                denominator += math.exp(cosine(z1[i], before_ND[n]) / 0.2 + 0.7 * (i == j))
        info_nce += (math.log(denominator) - others[i] / 0.2) / B
        for j in range(B):
            masked = i != j and nearest[i] == nearest[j] and others[j] > 0.1
            pairs += masked
            gap = (others[j] - others[i]) * masked
            if masked or reduction == "all_pairs":
                bml += max(gap + 0.05, 0) + max(-gap - 0.2, 0)
    bml /= B * B if reduction == "all_pairs" else pairs
    assert pairs > 0
    found = dict(zip(VALUE_NAMES, step.values.tolist()))
    assert found["info_nce"] == pytest.approx(info_nce, rel=1e-5)
    assert found["bml"] == pytest.approx(bml, rel=1e-5)
    assert found["loss"] == pytest.approx(info_nce + 0.5 * bml, rel=1e-5)
    hard = np.mean([cosine(z1[i], before_ND[n]) for i in range(B) for n in drawn[i]])
    assert found["hard_negative_cosine"] == pytest.approx(hard, rel=1e-4)
    metrics = step_metrics(step, B)
    assert metrics["false_negative_rate"] == pytest.approx(pairs / B / (B - 1))
    assert metrics["clusters_used"] == len(set(nearest))
    assert metrics["largest_cluster"] == max(nearest.count(k) for k in nearest)


def test_a_step_writes_the_rows_of_its_batch_and_no_others(make_run: Callable[..., Parts]) -> None:
    run = make_run()
    take_step(run)
    before_ND = embeddings_of(run).clone()
    _, z1, _, layout = take_step(run)
    assert run.corpus is not None
    written = dict(zip(layout.rows_B.tolist(), z1))
    changed = 0
    for slot, row in enumerate(run.corpus.bank.rows_N.tolist()):
        expected = written.get(row, before_ND[slot])
        assert torch.equal(embeddings_of(run)[slot], expected)
        changed += row in written
    assert 0 < changed < B, "of 300 sentences 200 are in the bank"


def test_the_bank_begins_with_the_embeddings_of_the_moment_without_dropout(
    make_run: Callable[..., Parts],
) -> None:
    run = make_run()
    layout, shards = run.batch(0)
    views = run.forward(layout, shards)
    run.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2)
    assert run.corpus is not None and run.encoder.training
    ids = run.encoder.tokenize(run.tokens.texts(run.corpus.bank.rows_N))
    with torch.inference_mode():
        expected = run.encoder.project(run.encoder.encode_ids(ids))
    torch.testing.assert_close(embeddings_of(run), expected, rtol=0, atol=1e-6)
    assert len(set(run.corpus.bank.rows_N.tolist())) == 200 and expected.shape == (200, WIDTH)


def test_clusters_are_made_anew_every_so_many_steps(make_run: Callable[..., Parts]) -> None:
    run = make_run()
    seen = []
    for _ in range(8):
        take_step(run)
        assert run.clustering.centroids_KD is not None
        seen.append(run.clustering.centroids_KD.clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    # The first step fills the bank; those after it are 0, 1, ... of the bank.
    assert changed == [False, False, False, True, False, False, True]


def test_rows_are_encoded_anew_in_turn(make_run: Callable[..., Parts]) -> None:
    run = make_run(clustering={"refresh_rows": 150})
    assert run.corpus is not None
    for first in (0, 150):
        if not first:
            take_step(run)
        with torch.random.fork_rng(devices=[]):
            layout, shards = run.batch(run.steps)
            views = run.forward(layout, shards)
            run.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2)
        ids = run.encoder.tokenize(run.tokens.texts(run.corpus.bank.rows_N))
        with torch.inference_mode():
            fresh = run.encoder.project(run.encoder.encode_ids(ids))
        turn = [(first + n) % 200 for n in range(150)]
        torch.testing.assert_close(embeddings_of(run)[turn], fresh[turn], rtol=0, atol=1e-6)
        rest = [n for n in range(200) if n not in turn]
        assert (embeddings_of(run)[rest] - fresh[rest]).abs().max() > 1e-3
        run.steps += 1


class Shapes(TorchDispatchMode):
    """Records the shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_no_large_matrix_is_made(make_run: Callable[..., Parts]) -> None:
    """Rows of the batch meet the clusters, the batch and what was drawn: never the whole bank, never B x B x D."""
    run = make_run()
    take_step(run)
    layout, shards = run.batch(1)
    views = run.forward(layout, shards)
    with Shapes() as shapes:
        step = run.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2)
        step.loss.backward()
    lost = {(B, K), (B, B), (B, B * M)}
    assert lost <= shapes.found and (B * M, WIDTH) in shapes.found
    encoder = {parameter.shape for parameter in run.encoder.parameters()}
    ours = {shape for shape in shapes.found if shape not in encoder and 200 in shape}
    assert ours <= {(200, WIDTH), (200,)}
    assert all(B not in shape or 200 not in shape for shape in shapes.found)


def test_more_clusters_than_sentences_are_refused(make_run: Callable[..., Parts]) -> None:
    with pytest.raises(ConfigError, match=r"num_clusters is 301, but the corpus has 300 sentences.*at most 300"):
        make_run(clustering={"num_clusters": 301, "bank_rows": 1000})
    assert make_run(clustering={"num_clusters": 300, "bank_rows": 1000}).corpus is not None


def test_without_clusters_or_with_those_of_the_batch_there_is_no_bank(make_run: Callable[..., Parts]) -> None:
    assert make_run(clustering={"num_clusters": 0}).corpus is None
