"""The model of a step against what real steps compute, exchange and keep; and the `plan` verb."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import WIDTH, quick_first, update_weights
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel
from typer.testing import CliRunner, Result

from clusterns_ray.cli import app
from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.data.prepare import Prepared, prepare
from clusterns_ray.data.sampler import BatchOrder
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.launch.estimates import step_memory
from clusterns_ray.ops.plan import step as step_model
from clusterns_ray.ops.plan.predict import Machine, plan, step_seconds
from clusterns_ray.ops.plan.quantities import bytes_text, duration_text, read_quantity, read_workers
from clusterns_ray.ops.plan.step import EncoderWork, Exchange, Network
from clusterns_ray.ops.plan.workload import Workload, encoder_work, sampled_batches, workload
from clusterns_ray.training.batch_layout import build_batch_layout
from clusterns_ray.training.checkpoint import Checkpointer
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.parts import TrainingParts

CPU = torch.device("cpu")
NETWORK = Network(1e9, 1e-4)
SPEED = 1e9


@pytest.fixture(scope="module")
def make(
    tiny_models: Callable[[str], Path], corpus_file: Path, sts_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """Configurations of small runs; sections are laid over them."""
    runs, cache = (str(tmp_path_factory.mktemp(name)) for name in ("runs", "cache"))

    def config(kind: str = "bert", **sections: dict[str, Any]) -> Config:
        values: dict[str, Any] = {
            "encoder": {"name": str(tiny_models(kind)), "max_length": 16, "pooling": "mean"},
            "data": {"corpus": str(corpus_file), "cache_dir": cache},
            "clustering": {"num_clusters": 6, "start_cosine": 1.0},
            "train": {"global_batch_size": 32, "shards": 8, "precision": "fp32"},
            "evaluation": {"sts": str(sts_dir), "every_steps": 5},
            "runtime": {"storage_path": runs, "use_gpu": False, "trackers": []},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return make_config(values)

    return config


@pytest.fixture(scope="module")
def work(make: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """That of a corpus which is not prepared."""
    return workload(make(data={"cache_dir": str(tmp_path_factory.mktemp("empty"))}))


def run_of(config: Config, prepared: Prepared, directory: Path) -> TrainingParts:
    return TrainingParts(RunContext(config, prepared.tokens_dir, prepared.sts_dir, directory), CPU)


def take_step(run: TrainingParts, step: int) -> None:
    layout, shards = run.batch(step)
    views = run.forward(layout, shards)
    loss = run.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2, run.teacher_embeddings(layout, shards))
    update_weights(run.optimizer, loss.loss, 1e-4, views.backward)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

CORPUS = {"scope": "corpus", "num_clusters": 40, "start_cosine": 1.0}

STEPS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "fewer layers, no head": ("bert", {"encoder": {"num_layers": 1, "pooling": "cls", "head": "none"}}),
    "corpus": ("bert", {"clustering": CORPUS, "loss": {"bank_negatives": 3}}),
    "teacher": ("bert", {"encoder": {"num_layers": 1}, "loss": {"teacher": "TEACHER"}}),
    "cached, masked": ("bert", {"train": {"cache_chunk": 8}, "loss": {"mlm_weight": 0.1}}),
    "bert": ("bert", {}),
    "no clusters": ("bert", {"clustering": {"num_clusters": 0}}),
    "masked words": ("bert", {"loss": {"mlm_weight": 0.1}}),
    "crops": ("bert", {"data": {"positives": "crop", "crop_ratio": 0.2}}),
    "cached": ("bert", {"train": {"cache_chunk": 8}}),
    "roberta": ("roberta", {}),
    "distilbert": ("distilbert", {}),
    "mpnet": ("mpnet", {}),
    "modernbert": ("modernbert", {}),
}


@pytest.mark.parametrize("name", quick_first(STEPS, 4))
def test_flops_of_a_step_are_those_that_torch_counts(
    name: str, make: Callable[..., Config], tiny_models: Callable[[str], Path], tmp_path: Path
):
    kind, sections = STEPS[name]
    if name == "teacher":
        sections = {**sections, "loss": {"teacher": str(tiny_models(kind))}}
    train = {"global_batch_size": 16, "shards": 4} | sections.get("train", {})
    config = make(kind, **{"loss": {}, **sections, "train": train})
    prepared = prepare(config)
    run = run_of(config, prepared, tmp_path / "run")
    run.encoder.packs = False
    if run.teacher is not None:
        run.teacher.encoder.packs = False
    take_step(run, 0)  # creates the centroids
    layout, shards = run.batch(1)
    lengths = run.tokens.lengths(layout.rows_B)
    pieces = np.split(np.arange(layout.size), layout.starts[1:-1])
    rows_S = np.array([len(piece) for piece in pieces])
    tokens_S = np.array([lengths[piece].max() for piece in pieces])
    second_S = np.array([s.second[0].shape[1] if s.second else n for s, n in zip(shards, tokens_S, strict=True)])

    # Torch does not count what its fused attention for CPUs computes, which the teacher takes.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        take_step(run, 1)

    work = replace(workload(config), rows_NS=rows_S[None], tokens_NS=tokens_S[None], second_NS=second_S[None])
    assert work.flops(1) == counter.get_total_flops()


def test_flops_of_a_plan_are_the_mean_of_those_of_its_batches(make: Callable[..., Config], tmp_path: Path):
    config = make(encoder={"head": "none", "num_layers": 1}, data={"limit": 100})
    prepared = prepare(config)
    run = run_of(config, prepared, tmp_path / "run")
    work = workload(config)
    run.encoder.packs = False
    take_step(run, 0)
    assert work.steps_per_epoch == len(work.rows_NS) == run.order.steps_per_epoch
    full = np.flatnonzero(work.rows_NS.sum(axis=1) == 32)  # the loss of an epoch's last, odd batch is a smaller one
    counted = []
    for step in full.tolist():
        with FlopCounterMode(display=False) as counter:
            take_step(run, step)
        counted.append(counter.get_total_flops())

    assert len(set(counted)) > 1, "batches differ"
    whole = replace(work, rows_NS=work.rows_NS[full], tokens_NS=work.tokens_NS[full], second_NS=work.second_NS[full])
    assert whole.flops(1) == pytest.approx(np.mean(counted), rel=1e-12)


def test_the_busiest_worker_is_that_of_the_layout(make: Callable[..., Config]):
    config = make()
    prepared = prepare(config)
    store = TokenStore.open(prepared.tokens_dir)
    rows_NS, tokens_NS, second_NS = sampled_batches(config, store)
    assert (second_NS == tokens_NS).all(), "two dropout copies are alike in length"
    encoder = encoder_work(config)
    expected = []
    work = workload(config)
    order = BatchOrder(config.seed, len(store), 32, 8, config.data.order, store.lengths)
    for step, (rows_S, tokens_S) in enumerate(zip(rows_NS, tokens_NS)):
        ids = order.sample_ids(0, step)
        layout = build_batch_layout(ids, store.lengths(ids), 8, rank=0, workers=4)
        flops_S = [encoder.shard(rows, tokens, tokens) for rows, tokens in zip(rows_S, tokens_S)]
        expected.append(max(sum(flops_S[shard] for shard in its_shards) for its_shards in layout.shards_by_rank))
    found = step_model.busiest_worker(work.shard_flops_NS, 4)
    assert found == pytest.approx(np.mean(expected), rel=1e-12)
    assert found > work.shard_flops_NS.sum(axis=1).mean() / 4, "shards differ, so one worker has more"


# ---- exchanges ------------------------------------------------------------------------------------------------------


def ring(workers: int, turns: int, size: float) -> tuple[float, float]:
    """Bytes that one worker sends and the seconds of ``turns`` rounds of a ring, played message by message."""
    sent, clock = [0.0] * workers, 0.0
    for _ in range(turns):
        for worker in range(workers):
            sent[worker] += size / workers
        clock += NETWORK.latency + size / workers / NETWORK.bandwidth
    assert len(set(sent)) == 1
    return sent[0], clock


@pytest.mark.parametrize("workers", [2, 4, 7, 64])
def test_a_sum_around_a_ring_is_a_reduce_scatter_and_a_gather(workers: int):
    size = 8e6
    sent, seconds = ring(workers, 2 * (workers - 1), size)
    exchange = Exchange("x", "all_reduce", size)
    assert exchange.sent(workers) == pytest.approx(sent)
    assert exchange.seconds(workers, replace(NETWORK, trees=False)) == pytest.approx(seconds)

    sent, seconds = ring(workers, workers - 1, size)
    exchange = Exchange("x", "all_gather", size)
    assert exchange.sent(workers) == pytest.approx(sent)
    assert exchange.seconds(workers, NETWORK) == pytest.approx(seconds)


def test_each_call_has_its_own_messages():
    slow = replace(NETWORK, trees=False)
    one, four = (Exchange("x", "all_reduce", 8e6, calls).seconds(4, slow) for calls in (1, 4))
    assert four - one == pytest.approx(3 * 2 * 3 * NETWORK.latency)


@pytest.mark.parametrize(("width", "layers"), [(384, 3), (384, 6), (768, 12), (1024, 24)])
def test_gradients_are_in_no_more_buckets_than_said(width: int, layers: int):
    with torch.device("meta"):
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
        shape = BertConfig(**sizes, num_attention_heads=width // 32)
        parameters = list(BertModel(shape, add_pooling_layer=False).parameters())[::-1]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 << 20]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
    found = step_model.gradient_exchange(sum(p.numel() for p in parameters)).calls
    assert len(buckets) <= found <= 1.5 * len(buckets) + 2


def test_sums_take_trees_where_that_is_quicker_and_the_library_chooses():
    small, large = Exchange("x", "all_reduce", 8), Exchange("x", "all_reduce", 8e8)
    around = replace(NETWORK, trees=False)
    # up and down a tree of 512 is 2 x 9 messages, around the ring 2 x 511
    assert small.seconds(512, NETWORK) == pytest.approx(18 * NETWORK.latency, rel=1e-3)
    assert small.seconds(512, around) == pytest.approx(1022 * NETWORK.latency, rel=1e-3)
    assert large.seconds(512, NETWORK) == pytest.approx(18 * NETWORK.latency + 1.6)
    assert large.seconds(4, NETWORK) == large.seconds(4, around) < 1.6, "3/4 of the bytes twice"


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather"])
def test_one_worker_exchanges_nothing(kind: Any):
    exchange = Exchange("x", kind, 8e6, 3)
    assert exchange.sent(1) == 0 and exchange.seconds(1, NETWORK) == 0


def test_gradients_are_hidden_behind_the_last_shards_backward_pass_at_most():
    gradients = Exchange("gradients", "all_reduce", 4e8, 10)
    keys = Exchange("keys", "all_gather", 1e6)
    both = gradients.seconds(8, NETWORK) + keys.seconds(8, NETWORK)

    def exposed(backward_s: float, last: float = 0.0, overlaps: bool = True) -> float:
        return step_model.exposed_seconds([gradients, keys], 8, NETWORK, backward_s, last, overlaps=overlaps)

    assert exposed(100.0, overlaps=False) == both
    assert exposed(0.01) == pytest.approx(both - 0.01)
    assert exposed(100.0) == pytest.approx(both - 0.9 * gradients.seconds(8, NETWORK)), "the last bucket is late"
    assert exposed(100.0, last=0.25) == pytest.approx(both - 0.75 * gradients.seconds(8, NETWORK))


# ---- memory, disk ---------------------------------------------------------------------------------------------------


def test_parameters_and_checkpoint_are_those_of_a_run(make: Callable[..., Config], work: Workload, tmp_path: Path):
    config = make()
    prepared = prepare(config)
    run = run_of(config, prepared, tmp_path / "run")
    take_step(run, 0)
    context = RunContext(config, prepared.tokens_dir, prepared.sts_dir, tmp_path / "run")
    Checkpointer(context, run.stateful()).save(1)
    file = next((tmp_path / "run" / "checkpoints").glob("*/state.pt"))
    tensors = 3 * sum(1 for _ in run.encoder.parameters())

    found = plan(work, [1], Machine())
    assert found["parameters"] == sum(p.numel() for p in run.encoder.parameters())
    assert found["trained_parameters"] == sum(p.numel() for p in run.encoder.parameters() if p.requires_grad)
    assert found["checkpoint_bytes"] < file.stat().st_size < found["checkpoint_bytes"] + 700 * tensors + 4096


def memory(work: Workload, workers: int, gpu: bool = False) -> dict[str, int]:
    return step_memory(work.size, work.config, workers, gpu=gpu)


def test_memory_that_is_of_the_whole_batch_does_not_shrink(work: Workload):
    one, two, eight = (memory(work, n) for n in (1, 2, 8))
    assert one["keys"] == 4 * 32 * WIDTH * 4 and two["keys"] == eight["keys"] == 2 * one["keys"]
    assert one["clusters"] == eight["clusters"] == 4 * 6 * WIDTH * 4
    assert one["optimizer"] == eight["optimizer"] == 8 * work.size.trained
    encoder = [each["activations"] - work.size.loss_bytes - work.size.fixed_bytes for each in (one, eight)]
    assert encoder[1] == pytest.approx(encoder[0] / 8, rel=0.01)
    assert one["total"] == sum(value for key, value in one.items() if key != "total")


def test_a_cached_chunk_holds_its_own_activations_alone(make: Callable[..., Config], work: Workload):
    # 32 sentences in 8 shards: a chunk of 8 sentences has 2 shards, in the tree of a CPU one
    config = make(train={"cache_chunk": 8})
    whole, chunked = work, replace(work, config=config, encoder=encoder_work(config))
    kept = whole.size.shard_bytes + whole.size.filled_bytes
    assert memory(chunked, 1, gpu=False)["activations"] == memory(whole, 1, gpu=False)["activations"] - 7 * kept
    saved = memory(whole, 1, gpu=True)["activations"] - memory(chunked, 1, gpu=True)["activations"]
    assert saved == 6 * whole.size.shard_bytes
    assert memory(chunked, 8, gpu=False)["activations"] == memory(whole, 8, gpu=False)["activations"]
    assert chunked.flops(1) / whole.flops(1) == pytest.approx(4 / 3, rel=0.02)


# ---- a step's time --------------------------------------------------------------------------------------------------


def test_a_step_computes_and_exchanges(work: Workload):
    seconds = step_seconds(work, 2, Machine(flops=SPEED, network=NETWORK))
    assert seconds is not None and seconds["compute"] == pytest.approx(work.flops(2) / SPEED)
    assert seconds["exchange"] == pytest.approx(sum(e.seconds(2, NETWORK) for e in work.exchanges(2)))


def test_efficiency_is_of_the_same_global_batch(work: Workload):
    found = plan(work, [1, 4], Machine(flops=SPEED, network=NETWORK, price=2.5))
    one, four = found["workers"]
    assert one["efficiency"] == 1
    assert four["efficiency"] == pytest.approx(one["step_seconds"] / (4 * four["step_seconds"]))
    assert four["sentences_per_second"] == pytest.approx(32 / four["step_seconds"])
    # at no cost of exchanges, all that is lost is that shards differ
    free = plan(work, [4], Machine(flops=SPEED, network=Network(1e18, 0.0)))["workers"][0]
    assert four["efficiency"] < free["efficiency"] <= 1


def test_an_epoch_costs_its_hours_times_its_workers(work: Workload):
    found = plan(replace(work, sentences=32_000), [1, 2], Machine(flops=SPEED, network=NETWORK, price=2.5))
    assert (found["steps_per_epoch"], found["sentences"]) == (1000, 32_000)
    for column in found["workers"]:
        assert column["epoch_hours"] == pytest.approx(column["step_seconds"] / 3.6)
        assert column["epoch_cost"] == pytest.approx(2.5 * column["workers"] * column["epoch_hours"])


def test_without_a_speed_or_a_network_there_are_no_times(work: Workload):
    assert all(column["step_seconds"] is None for column in plan(work, [1, 2], Machine())["workers"])
    alone, two = plan(work, [1, 2], Machine(flops=SPEED))["workers"]
    assert alone["step_seconds"] > 0 and two["step_seconds"] is None
    dense = work.size.trained - work.encoder.embeddings
    for what in ("gradients", "sums of gradients"):
        assert two["sent_bytes"][what] == 4 * math.ceil(dense / 2), "(n - 1) / n of them, with n 2"


def test_worker_counts_that_do_not_divide_the_shards_are_impossible(work: Workload):
    found = plan(work, [1, 3, 6, 8, 16], Machine())
    assert [column["workers"] for column in found["workers"]] == [1, 8]
    assert found["impossible"] == {"3": [2, 4], "6": [4, 8], "16": [8]}


def test_lengths_are_the_corpus_s_own_once_it_is_prepared(make: Callable[..., Config], work: Workload):
    config, before = make(), work
    assert before.sentences is None and (before.tokens_NS == 16).all()
    prepare(config)
    after = workload(config)
    assert after.sentences == 300 and after.tokens_NS.mean() < 16
    assert after.rows_NS.sum() == 300
    assert any("not prepared" in text for text in before.assumptions)
    assert not any("not prepared" in text for text in after.assumptions)


def test_a_corpus_that_is_elsewhere_is_planned_for(make: Callable[..., Config]):
    work = workload(make(data={"corpus": "/nowhere/at/all.txt"}), sentences=10**9)
    assert work.steps_per_epoch == 31_250_000
    with pytest.raises(DataError, match="7 rows"):
        replace(work, sentences=7).steps_per_epoch  # noqa: B018


# ---- the request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("--bandwidth", "25Gbit/s", 3.125e9),
        ("--bandwidth", "25 Gbps", 3.125e9),
        ("--bandwidth", "25Gb/s", 3.125e9),
        ("--bandwidth", "3GB/s", 3e9),
        ("--bandwidth", "0.5 MB/s", 5e5),
        ("--latency", "50us", 5e-5),
        ("--latency", "1.5 ms", 1.5e-3),
        ("--latency", "2e-3s", 2e-3),
    ],
)
def test_quantities_are_read(option: str, text: str, value: float):
    assert read_quantity(option, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *[("--bandwidth", text) for text in ("25", "25us", "0GB/s", "-3GB/s", "")],
        *[("--latency", text) for text in ("fast", "5GB/s", "0s", "1 2ms")],
    ],
)
def test_other_quantities_are_refused(option: str, text: str):
    with pytest.raises(ConfigError, match=f"{option} is '{text}'"):
        read_quantity(option, text)


def test_numbers_of_workers_are_read():
    assert read_workers("8, 1,64,8") == [1, 8, 64]
    for text in ("", "0,1", "1;2", "-1", "two"):
        with pytest.raises(ConfigError, match="--workers is"):
            read_workers(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (2.5e6, "2.5 MB"), (208e6, "208 MB"), (7e15, "7,000 TB")]
)
def test_bytes_are_told_in_a_readable_unit(count: float, text: str):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (3e-7, "0.3 us"), (0.0744, "74.4 ms"), (90, "90 s"), (5400, "90 min"), (1e6, "11.6 d")],
)
def test_durations_are_told_in_a_readable_unit(seconds: float, text: str):
    assert duration_text(seconds) == text


def clusterns(config: Config, directory: Path, *arguments: str) -> Result:
    file = directory / "plan.yaml"
    file.write_text(dump_config(config))
    return CliRunner().invoke(app, ["plan", str(file), *arguments])


def test_the_verb_prints_a_table_with_what_it_assumes_and_writes_json(make: Callable[..., Config], tmp_path: Path):
    options = ["--tflops", "0.01", "--bandwidth", "10Gbit/s", "--price", "0.5", "--sentences", "1000000"]
    output = tmp_path / "plan.json"
    result = clusterns(make(), tmp_path, "--workers", "1,3,8", *options, "--json", str(output))
    assert result.exit_code == 0, result.output
    for part in ("efficiency", "cost of an epoch", "AdamW", "sums of gradients", "100 %", "1,000,000 sentences"):
        assert part in result.output
    assert "3 workers are impossible, as they do not divide train.shards (8)" in " ".join(result.output.split())
    found = json.loads(output.read_text())
    assert [column["workers"] for column in found["workers"]] == [1, 8]
    assert math.isclose(found["workers"][1]["memory"]["weights"], 4 * found["parameters"])
    assert not list(Path(str(make().runtime.storage_path)).iterdir()), "a plan starts and writes nothing"


def test_a_plan_says_what_it_cannot_tell(make: Callable[..., Config], tmp_path: Path):
    config = make(data={"cache_dir": str(tmp_path / "empty")})
    said = clusterns(config, tmp_path, "--workers", "3", "--tflops", "1", "--price", "2")
    assert said.exit_code == 0 and "the nearest that do: 2, 4" in " ".join(said.output.split())
    said = clusterns(config, tmp_path, "--workers", "1", "--tflops", "1", "--price", "2")
    assert said.exit_code == 0 and "cost of an epoch" not in said.output and "as given." in said.output
    assert "No cost: how many sentences the corpus has is not known; give --sentences." in said.output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--workers", "0"], "--workers is '0'"),
        (["--bandwidth", "fast"], "--bandwidth is 'fast'"),
        (["--tflops", "0"], "--tflops is 0"),
        (["--tflops", "nan"], "--tflops is nan"),
        (["--json", "/nowhere/plan.json"], "--json"),
        (["--set", "encoder.name=nobody/no-such-model"], "not in the hub's cache here"),
        (["--set", "encoder.max_length=1000"], "reads at most"),
    ],
)
def test_wrong_requests_are_refused(arguments: list[str], part: str, make: Callable[..., Config], tmp_path: Path):
    result = clusterns(make(), tmp_path, *arguments)
    assert result.exit_code == 2 and result.stderr.count("error: ") == 1
    assert part in result.stderr


def test_encoders_that_differ_have_different_work(make: Callable[..., Config]):
    base = encoder_work(make())
    assert base == EncoderWork(
        width=32, layers=3, linear=3 * (4 * 32**2 + 2 * 32 * 48), embeddings=base.embeddings, pooler=32**2, head=32**2
    )
    assert encoder_work(make(encoder={"num_layers": 2})).linear == base.linear * 2 / 3
    assert encoder_work(make(loss={"mlm_weight": 1.0})).prediction == 32**2 + base.embeddings
