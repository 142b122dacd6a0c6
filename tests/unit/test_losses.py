"""The losses against the literal formulas of tests/golden/reference.py, and what must hold for any input."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clusterns_ray.losses import bidirectional_margin, clusterns_loss, info_nce

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN_DIR))
import reference  # noqa: E402  # pyright: ignore[reportMissingImports]
from reference import LossSettings  # noqa: E402  # pyright: ignore[reportMissingImports]

TOLERANCE = 1e-10
GOLDEN = json.loads((GOLDEN_DIR / "clusterns_float64.json").read_text())["cases"]
every_case = pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN.keys())
few = settings(max_examples=25, deadline=None, derandomize=True)

loss_settings = st.builds(
    LossSettings,
    temperature=st.floats(0.05, 1.0),
    hard_negatives=st.booleans(),
    hard_negative_columns=st.sampled_from(reference.COLUMNS),
    hard_negative_weight=st.just(0.0) | st.floats(-3, 3),
    bml_weight=st.just(0.0) | st.floats(1e-3, 2),
    bml_alpha=st.just(0.0) | st.floats(0.05, 0.4),
    bml_beta=st.floats(0, 0.6),
    bml_reduction=st.sampled_from(reference.REDUCTIONS),
)


@st.composite
def examples(draw):
    """z1, z2 and centroids as float64 arrays, in which some rows share a cluster and no choice is a tie."""
    B, D, K = draw(st.integers(4, 10)), draw(st.integers(3, 8)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    centres = rng.normal(size=(K, D)) + 0.5
    rows = centres[rng.integers(K, size=B)] + 0.7 * rng.normal(size=(B, D))
    z1, z2 = (rows + 0.3 * rng.normal(size=(B, D)) for _ in range(2))
    centroids = centres + 0.3 * rng.normal(size=(K, D))
    assume(reference.smallest_gap(z1, z2, centroids, LossSettings(0.05)) > 1e-3)
    assume(reference.same_cluster_mask(reference.assign(z1, centroids)[0]).any())
    return z1, z2, centroids


def one_example(seed: int = 0, B: int = 10, D: int = 6, K: int = 4):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(B, D)) + 0.5
    z1, z2 = (rows + 0.3 * rng.normal(size=(B, D)) for _ in range(2))
    return z1, z2, rng.normal(size=(K, D)) + 0.2


def leaf(array, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=dtype, requires_grad=True)


def package_loss(z1, z2, centroids, wanted: LossSettings):
    z1, z2, centroids = (torch.as_tensor(x) for x in (z1, z2, centroids))
    return clusterns_loss(z1, z2, centroids, **asdict(wanted))


def package_gradients(z1, z2, centroids, wanted: LossSettings, dtype=torch.float64):
    leaf1, leaf2 = leaf(z1, dtype), leaf(z2, dtype)
    out = package_loss(leaf1, leaf2, torch.tensor(centroids, dtype=dtype), wanted)
    grad1, grad2 = torch.autograd.grad(out.loss, (leaf1, leaf2))
    return out, grad1.double().numpy(), grad2.double().numpy()


def assert_close(actual, expected, tolerance: float = TOLERANCE):
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().double().numpy()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def assert_not_tiny(*gradients):
    for gradient in gradients:
        assert np.linalg.norm(gradient) > 1e-3


# --- the reference itself -----------------------------------------------------------------------------------


def test_golden_file_covers_every_choice():
    seen = [LossSettings(**case["settings"]) for case in GOLDEN.values()]
    assert {s.hard_negative_columns for s in seen} == set(reference.COLUMNS)
    assert {(s.bml_reduction, s.bml_alpha > 0) for s in seen} == {(r, a) for r in reference.REDUCTIONS for a in (0, 1)}
    assert {(s.hard_negative_columns, s.hard_negative_weight != 0) for s in seen} == {
        (c, w) for c in reference.COLUMNS for w in (0, 1)
    }
    assert {s.hard_negatives for s in seen} == {True, False}
    assert {case["rule"] for case in GOLDEN.values()} == set(reference.RULES)
    assert any(0 in case["expected"]["counts"] for case in GOLDEN.values())
    # without masked pairs the margin loss would not be tested at all
    assert all(reference.same_cluster_mask(case["expected"]["nearest"]).any() for case in GOLDEN.values())


@every_case
def test_reference_still_gives_the_golden_values(case):
    wanted, expected = LossSettings(**case["settings"]), case["expected"]
    step = reference.reference_step(case["z1"], case["z2"], case["centroids"], case["rate"], case["rule"], wanted)
    assert_close(step.centroids, expected["updated_centroids"])
    assert (step.nearest, step.second) == (expected["nearest"], expected["second"])
    assert_close([step.losses.loss, step.losses.info_nce], [expected["loss"], expected["info_nce"]])
    assert_close(step.losses.bml, expected["bml"])
    assert_close(step.grad_z1, expected["grad_z1"])
    assert_close(step.grad_z2, expected["grad_z2"])


@pytest.mark.slow  # it says nothing of the package, but of the file and the loops
@every_case
def test_golden_gradients_are_the_slopes_of_the_loops(case):
    wanted, expected = LossSettings(**case["settings"]), case["expected"]
    z1, z2, centroids = case["z1"], case["z2"], expected["updated_centroids"]
    assert reference.smallest_gap(z1, z2, centroids, wanted) > 1e-3
    slopes1 = reference.finite_differences(lambda x: reference.clusterns_loss(x, z2, centroids, wanted).loss, z1)
    slopes2 = reference.finite_differences(lambda x: reference.clusterns_loss(z1, x, centroids, wanted).loss, z2)
    assert_not_tiny(slopes1, slopes2)
    assert_close(expected["grad_z1"], slopes1, 1e-9)
    assert_close(expected["grad_z2"], slopes2, 1e-9)


# --- the package against it ---------------------------------------------------------------------------------


@every_case
def test_losses_and_gradients_match_the_golden_file(case):
    wanted, expected = LossSettings(**case["settings"]), case["expected"]
    out, grad1, grad2 = package_gradients(case["z1"], case["z2"], expected["updated_centroids"], wanted)
    assert_close(out.info_nce, expected["info_nce"])
    assert_close(out.loss, expected["loss"])
    if wanted.bml_weight:
        assert_close(out.bml, expected["bml"])
    assert_not_tiny(expected["grad_z1"], expected["grad_z2"])
    assert_close(grad1, expected["grad_z1"])
    assert_close(grad2, expected["grad_z2"])
    plain = info_nce(leaf(case["z1"]), leaf(case["z2"]), wanted.temperature)
    assert_close(plain, expected["plain_info_nce"])


@few
@given(examples(), loss_settings)
def test_clusterns_loss_matches_the_loops(example, wanted):
    z1, z2, centroids = example
    assume(reference.smallest_gap(z1, z2, centroids, wanted) > 1e-6)
    expected = reference.clusterns_loss(z1, z2, centroids, wanted)
    out, grad1, grad2 = package_gradients(z1, z2, centroids, wanted)
    assert out.loss.shape == ()
    assert_close(out.loss, expected.loss)
    assert_close(out.info_nce, expected.info_nce)
    if wanted.bml_weight:
        assert_close(out.bml, expected.bml)
    expected1, expected2 = reference.gradients(z1, z2, centroids, wanted)
    assume(min(np.linalg.norm(expected1), np.linalg.norm(expected2)) > 1e-3)
    assert_close(grad1, expected1)
    assert_close(grad2, expected2)


@few
@given(examples(), st.floats(0.05, 1.0))
def test_info_nce_matches_the_loops(example, temperature):
    z1, z2, centroids = example
    leaf1, leaf2 = leaf(z1), leaf(z2)
    loss = info_nce(leaf1, leaf2, temperature)
    assert loss.shape == ()
    assert_close(loss, reference.info_nce(z1, z2, temperature))
    expected = reference.gradients(z1, z2, centroids, LossSettings(temperature, hard_negatives=False))
    assume(min(np.linalg.norm(g) for g in expected) > 1e-3)
    for actual, wanted in zip(torch.autograd.grad(loss, (leaf1, leaf2)), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@few
@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.just(0.0) | st.floats(0.05, 0.4), st.floats(0, 0.6))
def test_bidirectional_margin_matches_the_loops(reduction, B, seed, alpha, beta):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1, 1, size=(B, B))
    upper = np.triu(rng.random((B, B)) < 0.6, 1)
    mask = upper | upper.T
    deltas = (scores - scores.diagonal()[:, None])[mask]
    assume(mask.any() and min(abs(deltas + alpha).min(), abs(deltas + beta).min()) > 1e-3)

    def loops(x):
        return reference.bidirectional_margin(x, mask, alpha, beta, reduction)

    cos_BB = leaf(scores)
    loss = bidirectional_margin(cos_BB, torch.tensor(mask), alpha, beta, reduction)
    assert loss.shape == ()
    assert_close(loss, loops(scores))
    (gradient,) = torch.autograd.grad(loss, cos_BB)
    slopes = reference.finite_differences(loops, scores)
    assume(np.linalg.norm(slopes) > 1e-3)
    assert_close(gradient, slopes, 1e-9)  # the differences themselves are good to about 1e-11
    cos_again = leaf(scores)
    exact = reference.torch_bidirectional_margin(cos_again, torch.tensor(mask), alpha, beta, reduction)
    assert_close(gradient, torch.autograd.grad(exact, cos_again)[0].numpy())


def test_bidirectional_margin_by_hand():
    cos_BB = torch.tensor([[0.9, 0.8, 0.1], [0.3, 0.7, 0.2], [0.0, 0.5, 0.6]], dtype=torch.float64)
    mask_BB = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    # masked differences -0.1 and -0.4: with alpha 0.2, beta 0.3 they cost 0.1 (too near) and 0.1 (too far)
    assert_close(bidirectional_margin(cos_BB, mask_BB, 0.2, 0.3, "false_negatives"), (0.1 + 0.1) / 2)
    assert_close(bidirectional_margin(cos_BB, mask_BB, 0.2, 0.3, "all_pairs"), (0.1 + 0.1 + 7 * 0.2) / 9)


def test_own_hard_negative_by_hand():
    z = torch.eye(3, dtype=torch.float64)[:2]
    centroids = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    # both rows have cosine 1 with positive and nearest centroid, 0 with the other row and the hard negative
    e = np.exp(1)
    expected = {
        "batch": np.log((e + 1 + e + 1) / e),  # the other row's hard negative is this row's own centroid
        "own": np.log((e + 1 + 1) / e),
        "not_own_cluster": np.log((e + 1 + 1) / e),
    }
    weighted = {
        "batch": np.log((e + 1 + e + e**2) / e),
        "own": np.log((e + 1 + e**2) / e),
        "not_own_cluster": np.log((e + 1 + e**2) / e),
    }
    for columns in reference.COLUMNS:
        wanted = LossSettings(temperature=1.0, hard_negative_columns=columns)
        assert_close(package_loss(z, z, centroids, wanted).loss, expected[columns])
        wanted = replace(wanted, hard_negative_weight=2.0)
        assert_close(package_loss(z, z, centroids, wanted).loss, weighted[columns])


# --- what holds for any input -------------------------------------------------------------------------------


@few
@given(examples(), loss_settings, st.integers(0, 2**32 - 1))
def test_the_length_of_a_vector_does_not_matter(example, wanted, seed):
    z1, z2, centroids = example
    rng = np.random.default_rng(seed)
    scaled1, scaled2, scaled_centroids = (x * rng.uniform(0.01, 100, size=(len(x), 1)) for x in example)
    expected = package_loss(z1, z2, centroids, wanted).loss
    assert expected.item() > 0
    assert_close(package_loss(scaled1, scaled2, scaled_centroids, wanted).loss, expected.item(), 1e-9)
    plain = [info_nce(torch.tensor(a), torch.tensor(b), 0.1).item() for a, b in ((z1, z2), (scaled1, scaled2))]
    assert_close(plain[0], plain[1], 1e-9)


@few
@given(examples(), loss_settings, st.integers(0, 2**32 - 1))
def test_the_order_of_the_rows_does_not_matter(example, wanted, seed):
    z1, z2, centroids = example
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(z1))
    assume((rows != np.arange(len(z1))).any())
    out, grad1, grad2 = package_gradients(z1, z2, centroids, wanted)
    shuffled, shuffled1, shuffled2 = package_gradients(z1[rows], z2[rows], centroids, wanted)
    assert_close(shuffled.loss, out.loss.item())
    assert_close(shuffled1, grad1[rows])
    assert_close(shuffled2, grad2[rows])
    relabelled = package_gradients(z1, z2, centroids[rng.permutation(len(centroids))], wanted)
    assert_close(relabelled[0].loss, out.loss.item())
    # while pairing the rows with other rows is another loss
    mispaired = info_nce(torch.tensor(z1[rows]), torch.tensor(z2), 0.1)
    assert abs(mispaired - info_nce(torch.tensor(z1), torch.tensor(z2), 0.1)) > 1e-6


@few
@given(examples(), loss_settings)
def test_the_parts_add_up(example, wanted):
    z1, z2, centroids = example
    out = package_loss(z1, z2, centroids, wanted)
    assert_close(out.loss, (out.info_nce + wanted.bml_weight * out.bml).item())


@few
@given(examples(), st.floats(0.05, 1), st.sampled_from(reference.COLUMNS), st.floats(-3, 3))
def test_with_both_parts_off_it_is_info_nce(example, temperature, columns, weight):
    z1, z2, centroids = example
    off = LossSettings(temperature, False, columns, weight, 0.0, 0.2, 0.3)
    out, grad1, grad2 = package_gradients(z1, z2, centroids, off)
    leaf1, leaf2 = leaf(z1), leaf(z2)
    plain = info_nce(leaf1, leaf2, temperature)
    assert_close(out.loss, plain.item())
    for actual, expected in zip((grad1, grad2), torch.autograd.grad(plain, (leaf1, leaf2)), strict=True):
        assert_close(actual, expected.numpy())
    # and each part makes a difference
    assert package_loss(z1, z2, centroids, replace(off, hard_negatives=True)).loss > plain
    with_bml = replace(off, bml_weight=1.0, bml_alpha=0.25)
    assert package_loss(z1, z2, centroids, with_bml).loss > plain


@few
@given(examples(), loss_settings)
def test_both_reductions_tell_the_same(example, wanted):
    """all_pairs = the masked pairs' sum plus relu(alpha) for every other pair, over B * B."""
    z1, z2, centroids = example
    B, alpha = len(z1), wanted.bml_alpha
    masked = reference.same_cluster_mask(reference.assign(z1, centroids)[0]).sum()
    assert masked > 0
    wanted = replace(wanted, bml_weight=1.0)
    bml = {
        reduction: package_loss(z1, z2, centroids, replace(wanted, bml_reduction=reduction)).bml.item()
        for reduction in reference.REDUCTIONS
    }
    assert_close(bml["all_pairs"] * B * B, bml["false_negatives"] * masked + (B * B - masked) * alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
def test_an_empty_mask_gives_no_gradient_and_no_nan(reduction, dtype):
    cos_BB = torch.rand(5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = bidirectional_margin(cos_BB, torch.zeros(5, 5, dtype=torch.bool), 0.2, 0.3, reduction)
    assert_close(loss, 0.0 if reduction == "false_negatives" else 0.2, 1e-6)
    if loss.requires_grad:
        loss.backward()
        assert cos_BB.grad is None or not cos_BB.grad.any()

    # through the whole loss, with every row alone in its cluster: the rest of the gradient must survive
    z1, z2 = leaf(np.eye(4) + 0.1, dtype), leaf(np.eye(4) + 0.1 * np.arange(16).reshape(4, 4), dtype)
    wanted = LossSettings(0.5, bml_weight=1.0, bml_alpha=0.2, bml_beta=0.3, bml_reduction=reduction)
    out = package_loss(z1, z2, torch.eye(4, dtype=dtype) + torch.arange(4) * 0.01, wanted)
    assert_close(out.bml, 0.0 if reduction == "false_negatives" else 0.2, 1e-6)
    out.loss.backward()
    for z in (z1, z2):
        assert z.grad is not None and z.grad.isfinite().all()
        assert_not_tiny(z.grad.numpy())


@few
@given(examples(), loss_settings)
def test_no_gradient_reaches_the_centroids(example, wanted):
    z1, z2, _ = example
    wanted = replace(wanted, hard_negatives=True, bml_weight=1.0)
    centroids = leaf(example[2])
    leaf1, leaf2 = leaf(z1), leaf(z2)
    package_loss(leaf1, leaf2, centroids, wanted).loss.backward()
    assert centroids.grad is None or not centroids.grad.any()
    assert leaf1.grad is not None and leaf2.grad is not None and leaf1.grad.any()

    # not through centroids made of the rows either
    attached = leaf(z1)
    made = torch.tensor(example[2]) + 0.1 * attached[:1]
    package_loss(attached, leaf(z2), made, wanted).loss.backward()
    assert attached.grad is not None
    _, expected, _ = package_gradients(z1, z2, made.detach().numpy(), wanted)
    assert_close(attached.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", reference.COLUMNS)
@pytest.mark.parametrize("zero", ["z1", "z2", "centroids", "all rows"])
def test_zero_vectors_stay_finite(zero, columns, dtype):
    z1, z2, centroids = one_example()
    if zero == "all rows":
        z1[:], z2[:] = 0, 0
    else:
        {"z1": z1, "z2": z2, "centroids": centroids}[zero][1] = 0
    for reduction in reference.REDUCTIONS:
        wanted = LossSettings(0.05, True, columns, 0.5, 1.0, 0.2, 0.3, reduction)
        out, grad1, grad2 = package_gradients(z1, z2, centroids, wanted, dtype)
        assert out.loss.isfinite() and out.loss > 0
        assert np.isfinite(grad1).all() and np.isfinite(grad2).all()
        if zero in (
            "z2",
            "centroids",
        ):  # a zero row of z1 is equally near to all centroids: any choice is right
            assert_close(out.loss, reference.clusterns_loss(z1, z2, centroids, wanted).loss, 1e-5)
    plain = info_nce(torch.tensor(z1, dtype=dtype), torch.tensor(z2, dtype=dtype), 0.05)
    assert_close(plain, reference.info_nce(z1, z2, 0.05), 1e-5)


def test_vectors_shorter_than_eps_are_divided_by_eps():
    z1, z2, _ = one_example()
    z2[3] *= 1e-9 / np.linalg.norm(z2[3])
    z1[2] *= 5e-9 / np.linalg.norm(z1[2])
    assert abs(reference.cos(z1[3], z2[3])) < 0.1
    assert_close(info_nce(torch.tensor(z1), torch.tensor(z2), 0.05), reference.info_nce(z1, z2, 0.05))


@few
@given(examples(), loss_settings)
def test_float32_is_close_to_float64(example, wanted):
    z1, z2, centroids = (x.astype(np.float32).astype(np.float64) for x in example)
    assume(reference.smallest_gap(z1, z2, centroids, wanted) > 1e-3)
    expected = reference.clusterns_loss(z1, z2, centroids, wanted).loss
    expected1, expected2 = reference.gradients(z1, z2, centroids, wanted)
    out, grad1, grad2 = package_gradients(z1, z2, centroids, wanted, torch.float32)
    assert_close(out.loss, expected, 1e-4)
    assert_close(grad1, expected1, 1e-4)
    assert_close(grad2, expected2, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", reference.COLUMNS)
@pytest.mark.parametrize("weight", [-1000.0, -20.0, 20.0, 80.0])
def test_extreme_hard_negative_weights(columns, weight, dtype):
    z1, z2, centroids = one_example()
    wanted = LossSettings(0.1, True, columns, weight)
    assert reference.smallest_gap(z1, z2, centroids, wanted) > 1e-3
    expected1, expected2 = reference.gradients(z1, z2, centroids, wanted)
    out, grad1, grad2 = package_gradients(z1, z2, centroids, wanted, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert_close(out.loss, reference.clusterns_loss(z1, z2, centroids, wanted).loss, tolerance)
    assert_not_tiny(expected1, expected2)
    assert_close(grad1, expected1, tolerance)
    assert_close(grad2, expected2, tolerance)
    if columns == "own" and weight == -1000:  # a hard negative that weighs nothing
        assert_close(out.loss, reference.info_nce(z1, z2, 0.1), tolerance)


@pytest.mark.parametrize("columns", reference.COLUMNS)
def test_low_temperatures_do_not_overflow(columns):
    z1, _, centroids = one_example()
    z2, _, _ = one_example(seed=1)  # unrelated, so that there is something to learn
    out, grad1, grad2 = package_gradients(z1, z2, centroids, LossSettings(0.002, True, columns), torch.float32)
    assert out.loss.isfinite() and np.isfinite(grad1).all() and np.isfinite(grad2).all()
    z = torch.tensor(z1, dtype=torch.float32)
    assert info_nce(z, z, 0.002).isfinite()
    assert_not_tiny(grad1, grad2)


@pytest.mark.parametrize("field", ["hard_negative_columns", "bml_reduction"])
def test_unknown_choices_are_errors(field):
    wanted = replace(LossSettings(0.05, bml_weight=1.0), **{field: "nonsense"})
    with pytest.raises(ValueError, match="nonsense"):
        package_loss(*one_example(), wanted)
