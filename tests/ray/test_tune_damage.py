"""Each file of a finished study is damaged in turn: `clusterns tune` has the same winner and model, or refuses."""

from __future__ import annotations

import shutil

import pytest
from damage import DAMAGE, digest
from studies import StudyRun
from test_tune import make_study  # noqa: F401  a fixture
from typer.testing import CliRunner

from clusterns_ray.cli import app
from clusterns_ray.io.files import DIRECTORY_MANIFEST

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]


def model_of(study: StudyRun) -> dict[str, str]:
    """The files of the study's model; a run without a manifest is not checked, and its model has none either."""
    return {name: value for name, value in digest(study.directory / "model").items() if name != DIRECTORY_MANIFEST}


@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_a_damaged_study_has_the_same_winner_or_is_refused(make_study, tmp_path, monkeypatch, damage):  # noqa: F811
    study = make_study("damaged", "budget.trials=2", "confirmation.top=1", "confirmation.seeds=[1]")
    if not (study.directory / "result.json").exists():
        assert study.tune().code == 0
    copy = shutil.copytree(study.directory, tmp_path / "copy")
    winner, model = study.result()["winner"], model_of(study)
    names = sorted(
        path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file() and path.stat().st_size
    )
    assert {"study.db", "study.yaml", "result.json", "best.yaml", "trials/0000/metrics.jsonl"} <= set(names)
    monkeypatch.chdir(study.project)
    for name in names:
        DAMAGE[damage](study.directory / name)
        said = study.tune(timeout_s=300)
        assert said.code in (0, 1, 2) and "Traceback" not in said.out + said.err, (name, said.err)
        if said.code == 0:
            assert study.result()["winner"] == winner and model_of(study) == model, (name, said.out)
        else:
            assert str(study.directory) in said.err, (name, said.err)
        for command in (["tune", "study.yaml", "--set", "name=damaged", "--status"], ["report", "runs/damaged"]):
            said = CliRunner().invoke(app, command)
            assert said.exit_code in (0, 1, 2) and isinstance(said.exception, SystemExit | None), (name, said.exception)
        shutil.rmtree(study.directory)
        shutil.copytree(copy, study.directory)
