from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make_tiny_model, sentences, write_articles, write_pairs
from typer.testing import CliRunner

from clusterns_ray import evaluate
from clusterns_ray.cli import app
from clusterns_ray.config import EvaluationConfig, dump_config, make_config
from clusterns_ray.data.prepare import structure_dev_set
from clusterns_ray.errors import ConfigError, DataError, NonFiniteError
from clusterns_ray.evaluation import suite as module
from clusterns_ray.evaluation import transfer
from clusterns_ray.evaluation.clusters import evaluate_clusters, read_clusters
from clusterns_ray.evaluation.geometry import geometry
from clusterns_ray.evaluation.sts import TASKS, cosines_of, read_pairs, read_tests, score_tests
from clusterns_ray.evaluation.suite import Suite, check_suite, evaluate_models, paced_note
from clusterns_ray.evaluation.tables import render
from clusterns_ray.evaluation.transfer import evaluate_transfer, read_transfer
from clusterns_ray.models.encoder import Encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``sts`` (all seven and STSB/dev), ``transfer`` (CR alone), ``topics.tsv``; they share sentences."""
    path = tmp_path_factory.mktemp("data")
    for number, (task, subset) in enumerate(TASKS.items()):
        write_pairs(path / "sts" / task / f"{subset or 'one'}.jsonl", count=14, seed=number)
    write_pairs(path / "sts" / "STSB" / "dev.jsonl", count=20, seed=20)
    lines = [f"{int('river' in text)}\t{text}\n" for text in sentences(150)]
    (path / "transfer").mkdir()
    (path / "transfer" / "CR.tsv").write_text("".join(lines))
    (path / "topics.tsv").write_text("".join(lines[:60]))
    return path


@pytest.fixture(scope="module")
def whole(data: Path) -> Suite:
    return Suite(("all",), data / "sts", data / "transfer", (data / "topics.tsv",))


@pytest.fixture(autouse=True)
def few_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FOLDS", 3)
    monkeypatch.setattr(transfer, "SEARCH", [0.5, 8.0])


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), "roberta", layers=1)


# ---- what is asked for --------------------------------------------------------------------------------------------


def test_suites_by_the_data_that_is_given(data: Path) -> None:
    sts, classes, topics = data / "sts", data / "transfer", (data / "topics.tsv",)
    assert check_suite(Suite(sts=sts)).names == ("sts",)
    assert check_suite(Suite(transfer=classes, clusters=topics)).names == ("transfer", "clustering")
    assert check_suite(Suite(("all",), sts, classes, topics)).names == ("sts", "transfer", "clustering", "geometry")
    assert check_suite(Suite(("geometry", "sts"), sts)).names == ("sts", "geometry")
    assert check_suite(Suite(("geometry",), sts)).names == ("geometry",)
    again = check_suite(Suite(sts=sts))
    assert check_suite(again) == again


def test_requests_that_cannot_be_met(data: Path, tmp_path: Path) -> None:
    sts, classes = data / "sts", data / "transfer"
    only_dev = tmp_path / "sts"
    write_pairs(only_dev / "MINE" / "dev.jsonl", count=5)
    flat, empty = tmp_path / "flat", tmp_path / "empty"
    write_pairs(flat / "dev.jsonl", count=5)
    empty.mkdir()
    for request, message in (
        (Suite(), "No data to evaluate on. Give --sts, --transfer or --clusters"),
        (Suite(("all",), sts), "--suite all needs --transfer and --clusters"),
        (Suite(("sts", "best"), sts), "--suite is 'best'; it must be sts, transfer, clustering, geometry or all"),
        (Suite(("sts",), sts, classes), "--transfer given, but --suite sts does not read that"),
        (Suite(transfer=classes, extra=("STSB/dev",)), "--dev STSB/dev needs --sts"),
        (Suite(sts=tmp_path / "none"), "not a directory"),
        (Suite(sts=sts, extra=("STSB/train",)), "no STSB/train.jsonl. It holds: "),
        (Suite(("geometry",), only_dev), "has no STSB/dev.jsonl, on which geometry is measured. Name another set"),
        (Suite(sts=flat), r"holds none of STS12.* It holds dev.jsonl: move that to .*MINE/dev"),
        (Suite(sts=empty), "and no set of your own as TASK/SUBSET.jsonl.$"),
        (Suite(sts=sts, documents=("demo",)), "--documents is read with --sts structure alone"),
        (Suite(sts="structure", extra=("STSB/dev",)), "--dev 'STSB/dev' is not among the sets of --sts structure"),
        (Suite(sts="hf", extra=("STSB/train",)), "--dev 'STSB/train' is not among the hub's: STS12/test"),
        (Suite(transfer=tmp_path / "none"), "--transfer '.*none' is not a directory"),
        (Suite(clusters=(tmp_path / "none",)), "--clusters '.*none' is not there"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_suite(request)
    assert check_suite(Suite(("geometry",), only_dev, extra=("MINE/dev",))).names == ("geometry",)


def test_models_and_data_are_refused_before_torch_is_imported(data: Path, tiny_model: Path) -> None:
    code = f"""
import sys
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.evaluation.suite import Suite, evaluate_models
for models, options in ((["./none"], {{}}), ([{str(tiny_model)!r}], {{"pooling": "max"}}),
                        ([{str(tiny_model)!r}], {{"against": {str(tiny_model)!r}}}),
                        ([{str(tiny_model)!r}], {{"against": "./none"}})):
    try:
        evaluate_models(models, Suite(sts={str(data / "sts")!r}), **options)
    except ClusterNSError as error:
        print(error)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third, fourth, torch = done.stdout.splitlines()
    assert "'./none'" in first and "'max'" in second and "is the model itself" in third and "'./none'" in fourth
    assert torch == "False"


def test_data_is_read_before_a_model_is_loaded(tmp_path: Path, tiny_model: Path, monkeypatch: Any) -> None:
    (tmp_path / "topics.tsv").write_text("1\ta\n2 b\n")
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(DataError, match=r"topics.tsv:2"):
        evaluate(str(tiny_model), clusters=[tmp_path / "topics.tsv"])


# ---- what is measured ---------------------------------------------------------------------------------------------


def test_every_suite_and_each_sentence_encoded_once(
    whole: Suite, data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = Encoder.encode

    def counting(self: Encoder, texts: Sequence[str], **options: Any) -> np.ndarray:
        asked.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", counting)
    found = evaluate_models([str(tiny_model)], whole)["models"][0]
    assert set(Counter(asked).values()) == {1} and len(asked) > 300

    encoder = Encoder.load(tiny_model)

    def embed(texts: Sequence[str]) -> np.ndarray:
        return encode(encoder, texts)

    tests = read_tests(data / "sts")
    separately = score_tests(tests, cosines_of(tests, embed))
    assert found["average"] == pytest.approx(separately["average"], abs=1e-6)
    assert found["tasks"]["STS14"]["pearson"] == pytest.approx(separately["tasks"]["STS14"]["pearson"], abs=1e-3)
    accuracy = evaluate_transfer(read_transfer(data / "transfer"), embed)[0]["tasks"]["CR"]["accuracy"]
    assert found["transfer"]["tasks"]["CR"]["accuracy"] == pytest.approx(accuracy, abs=0.7)
    rows = {"topics": read_clusters("topics", data / "topics.tsv")}
    topics = evaluate_clusters(rows, embed, seeds=range(1111, 1121))[0]["topics"]
    assert found["clustering"]["topics"]["nmi"]["mean"] == pytest.approx(topics["nmi"]["mean"], abs=1)
    shape = geometry(read_pairs(data / "sts", "STSB/dev"), embed)
    assert found["geometry"]["set"] == "STSB/dev"
    assert found["geometry"]["uniformity"] == pytest.approx(shape["uniformity"], abs=1e-5)
    assert found["suite"] == ["sts", "transfer", "clustering", "geometry"]
    assert found["data"]["transfer"] == str(data / "transfer") and "protocol" not in found["data"]
    assert {"clusterns-ray", "torch", "transformers", "scikit-learn"} <= set(found["versions"])
    json.dumps(found, allow_nan=False)


def test_one_model_the_short_way(data: Path, tiny_model: Path) -> None:
    found = evaluate(str(tiny_model), data / "sts", dev=["STSB/dev"], pooling="cls", max_length=9)
    assert list(found) == [
        "model", "pooling", "max_length", "truncated", "suite", "tasks", "missing", "average", "extra", "data",
        "versions",
    ]  # fmt: skip
    assert (found["pooling"], found["max_length"], found["suite"]) == ("cls", 9, ["sts"])
    assert list(found["tasks"]) == list(TASKS) and list(found["extra"]) == ["STSB/dev"]


def test_geometry_of_the_set_that_is_named(data: Path, tiny_model: Path) -> None:
    found = evaluate(str(tiny_model), data / "sts", suite="geometry", dev=["STS12/one"])
    assert found["geometry"]["set"] == "STS12/one" and "tasks" not in found


def test_the_hub_in_place_of_a_directory(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(module.hub, "fetch_sts", lambda path, note: asked.append(path) or data / "sts")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    found = evaluate(str(tiny_model), "hf")
    assert asked == [Path("/somewhere/clusterns/sts-hub")]
    assert found["average"] is not None and found["data"]["sts"] == "hf" and "SICKR" in found["data"]["protocol"]


# ---- several models -----------------------------------------------------------------------------------------------


def test_models_against_another(whole: Suite, tiny_model: Path, other_model: Path) -> None:
    models = [str(tiny_model), str(tiny_model), str(other_model)]
    found = evaluate_models(models[:1], whole, against=str(other_model))
    assert [each["model"] for each in found["models"]] == [str(tiny_model), str(other_model)]
    (difference,) = found["differences"]
    assert (difference["model"], difference["against"]) == (str(tiny_model), str(other_model))
    assert list(difference["sts"]) == [*TASKS, "average"]
    first, second = found["models"]
    for task in TASKS:
        expected = first["tasks"][task]["spearman"] - second["tasks"][task]["spearman"]
        assert difference["sts"][task]["difference"] == pytest.approx(expected)
        assert difference["sts"][task]["low"] <= expected <= difference["sts"][task]["high"]
    assert difference["sts"]["average"]["difference"] == pytest.approx(first["average"] - second["average"])
    expected = first["transfer"]["tasks"]["CR"]["accuracy"] - second["transfer"]["tasks"]["CR"]["accuracy"]
    assert difference["transfer"] == {"CR": difference["transfer"]["CR"]}, "an average of one of seven tasks"
    assert difference["transfer"]["CR"]["difference"] == pytest.approx(expected)
    scores = [each["clustering"]["topics"]["accuracy"]["mean"] for each in found["models"]]
    assert difference["clustering"]["topics"]["difference"] == pytest.approx(scores[0] - scores[1])
    assert abs(first["average"] - second["average"]) > 0.1, "the models are equal"
    json.dumps(found, allow_nan=False)


def test_several_models_give_one_table(
    data: Path, tiny_model: Path, other_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    models = [str(tiny_model), str(other_model)]
    found = evaluate_models([*models, models[0]], Suite(sts=data / "sts", clusters=(data / "topics.tsv",)))
    assert [each["model"] for each in found["models"]] == models and found["differences"] == []
    render(found)
    printed = capsys.readouterr().out
    for task in TASKS:
        (line,) = [line for line in printed.splitlines() if f" {task} " in line]
        for each in found["models"]:
            assert f"{each['tasks'][task]['spearman']:.2f}" in line
    (line,) = [line for line in printed.splitlines() if "average of the seven" in line]
    assert all(f"{each['average']:.2f}" in line for each in found["models"])
    (line,) = [line for line in printed.splitlines() if "topics (K 2) NMI" in line]
    for each in found["models"]:
        value = each["clustering"]["topics"]["nmi"]
        assert f"{value['mean']:.2f} +- {value['std']:.2f}" in line


# ---- progress and tables ------------------------------------------------------------------------------------------


def test_notes_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1, 3.9, 4, 4, 5, 9, 9]).__next__
    monkeypatch.setattr(module.time, "monotonic", clock)
    notes: list[str] = []
    note = paced_note(notes.append, "m: ", seconds=4)
    for text in "abcde":
        note(text)
    assert notes == ["m: c", "m: e"]


def test_encode_tells_how_far_it_is(tiny_model: Path) -> None:
    encoder, done = Encoder.load(tiny_model), []
    texts = sentences(10)
    z = encoder.encode(texts, batch_size=4, progress=done.append)
    assert done == [4, 8, 10]
    np.testing.assert_array_equal(z, encoder.encode(texts, batch_size=4))


def test_bfloat16_is_asked_for(tiny_model: Path) -> None:
    encoder, texts = Encoder.load(tiny_model), sentences(10)
    z, rough = encoder.encode(texts), encoder.encode(texts, bf16=True)
    assert rough.dtype == np.float32
    difference = np.abs(z - rough).max() / np.abs(z).max()
    assert 1e-5 < difference < 0.05


def rendered(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    render(result)
    return capsys.readouterr().out


def test_what_is_partial_or_not_the_published_set_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    measure = {"mean": 50.0, "std": None}
    model = {
        "model": "m",
        "transfer": {"tasks": {"MRPC": {"accuracy": 70.0, "f1": 81.5}}, "missing": ["MR", "CR"], "average": None},
        "clustering": {
            "Tweet": {"accuracy": measure, "nmi": measure, "ami": measure, "ari": measure, "clusters": 88, "seeds": 1}
        },
        "geometry": {
            "set": "A/b", "sentences": 3, "alignment": None, "alignment_pairs": 0, "uniformity": -1.5,
            "mean_cosine": 0.25, "effective_rank": 2.0,
        },
        "data": {"protocol": {"SICKR": "all of them"}},
    }  # fmt: skip
    out = rendered({"models": [model], "differences": []}, capsys)
    assert "Transfer is partial, 1 of the seven tasks. No average: MR, CR missing." in out
    assert "Tweet has 88 labels here and 89 as published: not the same set." in out
    assert "Hub data, SICKR: all of them." in out
    assert "81.50" in out and "50.00 +- -" in out and "-1.5000" in out
    (line,) = [line for line in out.splitlines() if "alignment of 0 pairs" in line]
    assert " - " in line


def test_differences_inside_the_noise_are_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    inside = {"difference": 0.1, "low": -0.2, "high": 0.4, "inside_noise": True}
    clear = {"difference": -1.0, "low": -1.5, "high": -0.5, "inside_noise": False}
    parts = {"sts": {"STS12": inside, "average": clear}, "clustering": {"Tweet": clear}}
    difference = {"model": "new", "against": "old", **parts}
    model = {"model": "new", "data": {}}
    out = rendered({"models": [model], "differences": [difference]}, capsys)
    lines = {key: line for line in out.splitlines() for key in ("STS12", "average", "Tweet") if key in line}
    assert "new minus old" in out
    assert "+0.10" in lines["STS12"] and "-0.20 to +0.40" in lines["STS12"] and "inside the noise" in lines["STS12"]
    assert "-1.00" in lines["average"] and "noise" not in lines["average"]
    assert "accuracy" in lines["Tweet"]


# ---- own sets, and pairs graded by documents ------------------------------------------------------------------------


def test_sets_of_ones_own_are_scored_by_name_without_an_average(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "MINE" / "test.jsonl", count=12)
    write_pairs(tmp_path / "YOURS" / "a.jsonl", count=9, seed=3)
    found = evaluate_models([str(tiny_model)], Suite(sts=tmp_path))
    (scores,) = found["models"]
    assert list(scores["extra"]) == ["MINE/test", "YOURS/a"] and scores["tasks"] == {} and scores["average"] is None
    named = evaluate(str(tiny_model), tmp_path, dev=["YOURS/a"])
    assert list(named["extra"]) == ["YOURS/a", "MINE/test"]
    assert {name: named["extra"][name] for name in scores["extra"]} == scores["extra"]
    render(found)
    said = capsys.readouterr().out
    assert "MINE/test" in said and "none of the seven tasks is there" in said

    write_pairs(tmp_path / "STS12" / "one.jsonl", count=14)
    write_pairs(tmp_path / "STSB" / "dev.jsonl", count=14)
    both = evaluate(str(tiny_model), tmp_path)
    assert list(both["tasks"]) == ["STS12"] and both["average"] is None
    assert list(both["extra"]) == ["MINE/test", "YOURS/a"], "a dev set of the seven only where it is named"


def test_sentences_that_are_cut_are_counted(tmp_path: Path, tiny_model: Path) -> None:
    write_pairs(tmp_path / "MINE" / "test.jsonl", count=14)
    said: list[str] = []
    cut = evaluate(str(tiny_model), tmp_path, max_length=4, on_event=lambda event: said.append(event.text))
    assert said == ["24 of 24 sentences were cut to 4 tokens. --max-length raises that (the model reads 64)."]
    assert cut["truncated"] == 24, "each different sentence once"
    assert evaluate(str(tiny_model), tmp_path)["truncated"] == 0


def test_a_dev_set_alone_is_scored_where_it_is_named(tmp_path: Path, tiny_model: Path) -> None:
    write_pairs(tmp_path / "STSB" / "dev.jsonl", count=14)
    with pytest.raises(ConfigError, match="It holds STSB/dev: to score that, add --dev STSB/dev"):
        evaluate(str(tiny_model), tmp_path)
    assert list(evaluate(str(tiny_model), tmp_path, dev=["STSB/dev"])["extra"]) == ["STSB/dev"]


@pytest.fixture
def run_of_documents(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run whose dev set is graded by the structure of documents; nothing is in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = {
        "encoder": {"name": str(tiny_model)},
        "data": {"documents": write_articles(tmp_path)},
        "evaluation": {"sts": "structure", "structure_pairs": 60},
        "runtime": {"storage_path": str(tmp_path)},
    }
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "model")
    (run / "config.yaml").write_text(dump_config(make_config(values)))
    return run


@pytest.mark.parametrize("name", ["config.yaml", "best.yaml"])
def test_structure_is_what_chose_the_model(run_of_documents: Path, tmp_path: Path, name: str) -> None:
    (run_of_documents / "config.yaml").rename(run_of_documents / name)
    found = evaluate(str(run_of_documents / "model"), "structure")
    documents = str(tmp_path / "document*.md")
    pairs = structure_dev_set(documents, tmp_path / "other", pairs=60)
    encoder = Encoder.load(run_of_documents / "model")
    assert len(read_pairs(pairs, "STRUCTURE/dev")) == 60
    tests = read_tests(pairs)
    separately = score_tests(tests, cosines_of(tests, encoder.encode))
    assert found["extra"] == pytest.approx(separately["extra"], abs=1e-6)
    assert found["data"] == {"sts": "structure", "documents": documents} and found["average"] is None


@pytest.mark.slow
def test_documents_may_be_named_for_structure(tmp_path: Path, tiny_model: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(EvaluationConfig.model_fields["structure_pairs"], "default", 40)
    command = ["evaluate", str(tiny_model), "--sts", "structure", "--suite", "sts,geometry"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "is not the model/ of a run that names documents" in refused.stderr
    remedy = CliRunner().invoke(app, [*command, "--documents", "demo", "--json", str(tmp_path / "found.json")])
    assert remedy.exit_code == 0, remedy.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["extra"]) == ["STRUCTURE/dev"] and found["geometry"]["set"] == "STRUCTURE/dev"
    assert found["data"]["documents"] == ["demo"]


def test_documents_of_a_run_that_are_gone_are_asked_for(run_of_documents: Path, tmp_path: Path) -> None:
    for path in tmp_path.glob("document*.md"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"No documents found at '.*document\*\.md'.* give --documents FILES"):
        evaluate(str(run_of_documents / "model"), "structure")


# ---- no score is no number ----------------------------------------------------------------------------------------


def spoiled_model(path: Path, kind: str) -> Path:
    """A tiny BERT whose embeddings are NaN, beyond float32, or the same for every sentence."""
    encoder = Encoder.load(make_tiny_model(path, layers=2))
    last = encoder.backbone.encoder.layer[-1].output
    if kind == "nan":
        last.dense.weight.data[4, 5] = np.nan
    elif kind == "overflow":
        for layer in encoder.backbone.encoder.layer:
            layer.intermediate.dense.weight.data *= 1e36
            layer.output.dense.weight.data *= 1e36
    else:
        last.LayerNorm.weight.data *= 0
        last.LayerNorm.bias.data += 0.5
    encoder.backbone.save_pretrained(path)
    return path


SPOILED = {
    "nan": r"weights hold values that are not finite .NaN or infinity.: encoder.layer.1.output.dense.weight",
    "overflow": "embeddings are NaN or infinite, such as that of .*too large to compute with",
    "constant": "all .* sentences have the same embedding",
}


@pytest.mark.parametrize(
    ("kind", "suite"),
    [
        ("nan", "sts"),
        ("overflow", "sts"),
        *(("constant", suite) for suite in ("sts", "transfer", "clustering", "geometry")),
    ],
)
def test_a_model_without_a_score_is_refused_with_the_reason(data: Path, tmp_path: Path, kind: str, suite: str) -> None:
    model = spoiled_model(tmp_path / "model", kind)
    sources = {
        "sts": ["--sts", data / "sts", "--dev", "STSB/dev"],
        "transfer": ["--transfer", data / "transfer"],
        "clustering": ["--clusters", data / "topics.tsv"],
        "geometry": ["--sts", data / "sts"],
    }
    command = ["evaluate", model, "--suite", suite, *sources[suite], "--json", tmp_path / "scores.json"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 1, result.output
    assert re.search(SPOILED[kind], result.stderr) and str(model) in result.stderr and result.stdout.count("|") == 0
    assert not (tmp_path / "scores.json").exists()


def test_one_set_whose_cosines_are_all_the_same_is_named(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """One pair, graded five times: the other tests have scores, but there would be no average."""
    shutil.copytree(data / "sts", tmp_path / "sts")
    one, other = sentences(2)
    same = [{"sentence1": one, "sentence2": other, "score": grade} for grade in range(5)]
    (tmp_path / "sts" / "SICKR" / "test.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in same))
    with pytest.raises(NonFiniteError, match="cosines of all 5 pairs of SICKR/test are the same"):
        evaluate(str(tiny_model), tmp_path / "sts")


def test_queries_and_sentences_that_are_not_finite_are_no_embeddings(tmp_path: Path) -> None:
    encoder = Encoder.load(spoiled_model(tmp_path / "model", "overflow"))
    with pytest.raises(NonFiniteError, match="such as that of 'A boat'"):
        encoder.encode(["A boat"])
