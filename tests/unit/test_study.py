"""The study file: what is refused before anything starts, and what a sound one says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterns_ray.errors import ConfigError
from clusterns_ray.tuning.study import Study, check_study, differences, dump_study, load_study

BASE = {
    "data": {"corpus": "demo"},
    "train": {"global_batch_size": 64, "shards": 4, "max_steps": 8},
    "clustering": {"num_clusters": 16},
    "evaluation": {"sts": "structure", "every_steps": 2},
    "runtime": {"storage_path": "/nowhere/none", "use_gpu": False},
}
NOT_PLAIN = {"clustering.num_clusters": {"not": 0}}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": "base.yaml",
    "set": {"train.max_steps": 6},
    "space": {
        "clustering.start_cosine": {
            "type": "float", "low": 0.2, "high": 0.6, "step": 0.1, "role": "scientific", "when": NOT_PLAIN,
        },
        "clustering.num_clusters": {"type": "choice", "choices": [0, 16, 32], "role": "scientific"},
        "train.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True, "role": "nuisance"},
        "loss.temperature": {"role": "fixed", "value": 0.1},
    },
    "budget": {"trials": 4},
    "confirmation": {"seeds": [1, 2]},
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path / "study.yaml"


def check(path: Path, *overrides: str, space: dict[str, Any] | None = None, **changes: Any) -> Study:
    values = copy.deepcopy(STUDY)
    values |= changes
    values["space"] = values["space"] | (space or {})
    return check_study({key: value for key, value in values.items() if value is not None}, path, overrides)


def test_base_set_fixed_and_the_command_line_in_this_order(path: Path) -> None:
    study = check(path, "train.weight_decay=0.5", "budget.trials=9", "train.max_steps=4", workers_per_trial=2)
    assert study.base.train.max_steps == 4 and study.base.train.weight_decay == 0.5
    assert study.base.loss.temperature == 0.1
    assert study.base.runtime.num_workers == 2
    assert study.base.clustering.num_clusters == 16
    assert study.config.budget.trials == 9
    assert list(study.space.parameters) == ["clustering.num_clusters", "clustering.start_cosine", "train.learning_rate"]
    assert study.directory == Path("/nowhere/none/tiny")
    assert check(path).base.train.max_steps == 6


def test_a_file_is_read_with_numbers_as_people_write_them(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY).replace("1.0e-05", "1e-5"))
    assert "1e-5" in path.read_text()
    assert load_study(path).space.parameters["train.learning_rate"].low == 1e-5  # type: ignore[union-attr]


def test_the_written_study_is_whole(path: Path) -> None:
    values = yaml.safe_load(dump_study(check(path)))
    assert values["sampler"] == {"name": "tpe", "seed": 0, "startup_trials": 10}
    assert values["base"]["loss"]["temperature"] == 0.1
    assert values["space"]["clustering.start_cosine"]["when"] == NOT_PLAIN
    assert values["space"]["loss.temperature"] == {"role": "fixed", "value": 0.1}


def test_identity_is_what_scores_depend_on(path: Path) -> None:
    first = check(path).identity()
    assert (
        check(path, budget={"hours": 2}, stop={"after": 9}, concurrent_trials=2, confirmation={"seeds": [7]}).identity()
        == first
    )
    assert check(path, "runtime.storage_path=/nowhere/other", workers_per_trial=2).identity() == first
    assert check(path, sampler={"name": "tpe", "startup_trials": 10}).identity() == first, "a default, written out"
    assert check(path, first_points=[{"clustering.num_clusters": 0}]).identity() == first
    assert check(path, space={"train.learning_rate": {**RATE, "role": "scientific"}}).identity() == first
    for changed in (
        check(path, "train.max_steps=4"),
        check(path, sampler="random"),
        check(path, scheduler="asha"),
        check(path, space={"train.learning_rate": {**STUDY["space"]["train.learning_rate"], "high": 2e-3}}),
    ):
        assert changed.identity() != first


def test_differences_name_keys_and_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": True}, {"a": {"b": 1, "c": 3}, "d": 1}) == [
        "a.c was 2 and is now 3",
        "d was True and is now 1",
    ]


def test_a_point_may_leave_keys_to_the_sampler(path: Path) -> None:
    points = [{"train.learning_rate": 3e-5}, {"clustering.num_clusters": 32, "clustering.start_cosine": 0.3}]
    assert check(path, first_points=points).config.first_points == points


def test_the_shipped_studies_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERNS_DATA", "/data")
    files = sorted((Path(__file__).parents[2] / "experiments" / "studies").glob("*.yaml"))
    assert len(files) == 5
    for file in files:
        assert load_study(file).config.name == file.stem


def test_cmaes_needs_numbers_and_its_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**STUDY, "sampler": "cmaes", "space": {"train.learning_rate": RATE}}
    with pytest.raises(ConfigError, match="sampler cmaes needs two keys that vary"):
        check_study(copy.deepcopy(values), path)
    values["space"] = {**values["space"], "loss.temperature": {"type": "float", "low": 0.02, "high": 0.1}}
    with pytest.raises(ConfigError, match="previous is of no use to the sampler cmaes"):
        check_study(copy.deepcopy({**values, "previous": ["x"]}), path)
    monkeypatch.setattr("clusterns_ray.tuning.study.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package cmaes, .*: pip install -c constraints.txt '\.\[cmaes\]'"):
        check_study(copy.deepcopy(values), path)


RATE = STUDY["space"]["train.learning_rate"]
CLUSTERS = STUDY["space"]["clustering.num_clusters"]
WRONG = [
    ({"nme": "x"}, "unknown key nme: did you mean name?"),
    ({"trials": 3}, "unknown key trials: did you mean budget.trials?"),
    ({"name": "a/b"}, "name: must be a file name"),
    ({"name": None}, "name is missing"),
    ({"base": "nope.yaml"}, "nope.yaml"),
    ({"budget": {}}, "budget is empty"),
    ({"budget": {"trails": 3}}, "unknown key budget.trails: did you mean trials?"),
    ({"budget": {"price": 2}}, "budget is empty; give trials, hours, worker_hours or cost"),
    ({"budget": {"cost": 2}}, "budget: cost needs a price; give what a worker costs for an hour"),
    ({"stop": {"after": 0}}, "stop.after is 0"),
    ({"stop": {"after": 3, "gain": "noise"}}, "stop.gain is noise, which is measured where trials race; give race.s"),
    ({"stop": {"after": 3, "gain": "nose"}}, "stop.gain: 'nose' is neither a number of at least 0 nor noise; give"),
    ({"stop": {"after": 3, "gain": -1}}, "stop.gain: -1 is neither"),
    ({"minimize": "time"}, "minimize is 'time'; it must be seconds or memory."),
    ({"minimize": "seconds"}, "no one trial is the best, and confirmation.seeds goes by the score alone"),
    ({"minimize": "memory", "confirmation": None, "race": {"seeds": [1]}}, "and race.seeds goes by the score alone"),
    ({"minimize": "seconds", "confirmation": None, "scheduler": "asha"}, "minimize is seconds, so that no one trial is "
     "the best, and scheduler asha goes by the score alone; leave out one of the two"),
    ({"minimize": "seconds", "confirmation": None, "stop": {"after": 2}}, "and stop.after goes by the score alone"),
    ({"minimize": "seconds", "confirmation": None, "previous": ["x"]}, "and previous goes by the score alone"),
    ({"sampler": "cmaes"}, "space.clustering.start_cosine is a choice or has `when`, and sampler cmaes moves numbers"),
    ({"stop": {"afer": 3}}, "unknown key stop.afer: did you mean after?"),
    ({"budget": {"trials": 0}}, "budget.trials is 0"),
    ({"budget": {"trials": "many"}}, "budget.trials is 'many'"),
    ({"sampler": "gird"}, "sampler is 'gird'; it must be tpe, gp, cmaes, random, qmc or grid."),
    ({"sampler": {"seed": 1}}, "sampler.name is missing; it must be tpe, gp, cmaes, random, qmc or grid."),
    ({"sampler": ["tpe"]}, "sampler is ['tpe']; it must be tpe, gp, cmaes, random, qmc or grid."),
    ({"scheduler": "hyperband"}, "scheduler is 'hyperband'; it must be asha, median or none."),
    ({"scheduler": 3}, "scheduler is 3; it must be asha, median or none."),
    ({"storage": "mysql"}, "storage is 'mysql'; it must be sqlite or journal."),
    ({"sampler": {"name": "tpe", "sed": 1}}, "unknown key sampler.sed: did you mean seed?"),
    ({"sampler": "grid"}, "space.train.learning_rate has no step, and sampler grid needs one"),
    ({"scheduler": {"name": "asha", "reduction_factor": 1}}, "scheduler.reduction_factor is 1"),
    ({"concurrent_trials": 0}, "concurrent_trials is 0"),
    ({"trials_per_gpu": 2}, "trials_per_gpu is 2, but only 1 run at a time"),
    ({"trials_per_gpu": 2, "concurrent_trials": 2, "workers_per_trial": 1}, "Ray workers take whole GPUs"),
    ({"trials_per_gpu": "auto", "workers_per_trial": 1}, "trials_per_gpu is auto and workers_per_trial 1"),
    ({"trials_per_gpu": 0}, "trials_per_gpu: 0 is neither a number from 1 to 64 nor auto"),
    ({"trials_per_gpu": "many"}, "trials_per_gpu: 'many' is neither"),
    ({"workers_per_trial": 3}, "runtime.num_workers allows 3 workers, which does not divide train.shards (4)"),
    ({"set": {"train.max_stps": 3}}, "unknown key train.max_stps in set: did you mean train.max_steps?"),
    ({"set": {"train.max_steps": -3}}, "train.max_steps is -3"),
    ({"set": {"train.learning_rate": 1e-3}}, "train.learning_rate is both in space and in set"),
    ({"set": {"evaluation.sts": None}}, "has no evaluation.sts, so trials have no score"),
    ({"confirmation": {"seeds": [42]}}, "confirmation.seeds holds 42, a seed of the trials"),
    ({"confirmation": {"seeds": [1, 1]}}, "seeds must be different"),
    ({"race": {"seeds": [1, 1]}}, "seeds must be different"),
    ({"race": {"seeds": [True]}}, "race.seeds"),
    ({"race": {"seeds": [42]}}, "race.seeds holds 42, the seed that every trial has anyway"),
    ({"race": {"seeds": [1]}}, "confirmation.seeds holds 1, a seed of the trials"),
    ({"race": {"seed": [3]}}, "unknown key race.seed"),
    ({"confirmation": {"top": 0}}, "confirmation.top is 0"),
    ({"first_points": [{"train.learning_rte": 1}]}, "first_points[0]: train.learning_rte is not a key"),
    ({"first_points": [{"train.learning_rate": 1.0}]}, "first_points[0]: train.learning_rate is 1.0, but the space"),
    (
        {"first_points": [{}, {"clustering.num_clusters": 16, "clustering.start_cosine": 0.25}]},
        "first_points[1]: clustering.start_cosine is 0.25, but the space has numbers from 0.2 to 0.6 in steps of 0.1",
    ),
    ({"first_points": [{"clustering.start_cosine": 0.4}]}, "depends on clustering.num_clusters, which the"),
    (
        {"first_points": [{"clustering.num_clusters": 0, "clustering.start_cosine": 0.4}]},
        "clustering.start_cosine does not matter at this point",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_studies(path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(path, **changes)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0, "one line says it"


WRONG_SPACES = [
    ("train.learning_rat", RATE, "unknown key train.learning_rat in space: did you mean train.learning_rate?"),
    ("train.learning_rate", {**RATE, "type": "flat"}, "learning_rate.type is 'flat'; it must be int, float or choice."),
    ("train.learning_rate", {**RATE, "low": "a"}, "space.train.learning_rate.low is 'a'"),
    ("train.learning_rate", {**RATE, "lwo": 1}, "unknown key space.train.learning_rate.lwo: did you mean low?"),
    ("train.learning_rate", {**RATE, "role": "idle"}, "role is 'idle'; it must be scientific, nuisance or fixed."),
    ("loss.temperature", {"role": "fixd", "value": 1}, "temperature.role is 'fixd'; it must be scientific, nuisance"),
    ("train.schedule", {"choices": ["linear"]}, "type is missing; it must be int, float or choice."),
    ("train.schedule", {"type": "list", "role": "nuisance"}, "type is 'list'; it must be int, float or choice."),
    ("loss.temperature", {"role": "nuisance", "low": 1}, "type is missing; it must be int, float or choice."),
    ("loss.temperature", {"role": "fixed"}, "space.loss.temperature.value is missing."),
    ("loss.temperature", {"role": "fixed", "value": 1, "low": 0}, "a key with role fixed has a value and nothing else"),
    ("train.learning_rate", {**RATE, "log": False, "low": 0}, "space.train.learning_rate allows 0.0, which the"),
    ("train.learning_rate", {**RATE, "low": 1}, "space.train.learning_rate: low is 1.0 and high 0.001: nothing lies"),
    ("train.schedule", {**CLUSTERS, "choices": ["linear", "round"]}, "space.train.schedule allows 'round'"),
    ("clustering.num_clusters", {**CLUSTERS, "choices": []}, "space.clustering.num_clusters: choices is empty"),
    ("clustering.num_clusters", {**CLUSTERS, "choices": [0, "x"]}, "space.clustering.num_clusters allows 'x'"),
    ("clustering.num_clusters", {**CLUSTERS, "choices": [0, 1]}, "1 cluster has no second nearest centroid"),
    (
        "clustering.num_clusters",
        {**CLUSTERS, "choices": [0, 128]},
        "allows clustering.num_clusters 128: clustering.num",
    ),
    ("train.global_batch_size", {"type": "int", "low": 64, "high": 128, "role": "nuisance"}, "does not divide"),
    ("loss.bml_alpha", {"type": "float", "low": 0, "high": 0.5, "role": "nuisance"}, "the margins cross"),
    ("loss.bml_alpha", {**RATE, "when": {"clustering.update": "sum"}}, "is met by no value of the space or the base"),
    ("loss.bml_alpha", {**RATE, "when": {"clustering.updat": "sum"}}, "unknown key clustering.updat"),
    ("loss.bml_alpha", {**RATE, "when": {"seed": {"abov": 1}}}, "unknown key space.loss.bml_alpha.when.seed.abov"),
    ("clustering.num_clusters", {**CLUSTERS, "when": {"clustering.start_cosine": 0.3}}, "lead in a circle"),
    ("loss.temperature", {"role": "fixed", "value": -1}, "loss.temperature is -1"),
    ("seed", {"type": "int", "low": 1, "high": 3, "role": "nuisance"}, "seed cannot be in space"),
    ("evaluation.dev", {**CLUSTERS, "choices": ["A/b", "C/d"]}, "evaluation.dev cannot be in space"),
    ("runtime.keep", {"type": "int", "low": 1, "high": 3, "role": "nuisance"}, "runtime.keep cannot be in space"),
]


@pytest.mark.parametrize(("key", "parameter", "message"), WRONG_SPACES)
def test_wrong_spaces(path: Path, key: str, parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(path, space={key: parameter})
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


def test_an_impossible_combination_names_only_the_values_that_clash(path: Path) -> None:
    """Neither 32 clusters nor batches of 16 are wrong by themselves."""
    small = {"type": "choice", "choices": [16, 64], "role": "nuisance"}
    with pytest.raises(ConfigError) as error:
        check(path, space={"train.global_batch_size": small})
    assert "the space allows clustering.num_clusters 32, train.global_batch_size 16 together: " in str(error.value)
    assert "learning_rate" not in str(error.value)


def test_a_combination_that_conditions_rule_out_is_possible(path: Path) -> None:
    small = {"type": "choice", "choices": [16, 64], "role": "nuisance", "when": {"clustering.num_clusters": [0, 16]}}
    assert "train.global_batch_size" in check(path, space={"train.global_batch_size": small}).space.parameters


def test_a_value_inside_the_bounds_that_fails_is_found_too(path: Path) -> None:
    """Both ends of the range are multiples of the number of shards."""
    with pytest.raises(ConfigError, match="does not divide"):
        check(path, space={"train.global_batch_size": {"type": "int", "low": 32, "high": 36, "role": "nuisance"},
                           "clustering.num_clusters": {**CLUSTERS, "choices": [0, 16]}})  # fmt: skip


@pytest.mark.parametrize("content", [None, "a: [", "- 1"])
def test_files_that_are_no_study(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "study.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        load_study(file)
