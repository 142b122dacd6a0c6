"""What docs/python.md and docs/tutorial.ipynb have people run, on a tiny model; and how results show themselves."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import write_articles, write_corpus, write_pairs

import clusterns_ray as cn

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/python.md"
NOTEBOOK = ROOT / "docs/tutorial.ipynb"


@pytest.fixture
def checkout(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a quickstart.yaml that is trained in no time, to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = {
        "encoder": {"name": str(tiny_model), "num_layers": 1, "pooling": "mean", "head": "none"},
        "data": {"documents": write_articles(tmp_path)},
        "clustering": {"num_clusters": 4, "start_cosine": 1.0},
        "train": {"global_batch_size": 16, "shards": 2, "max_steps": 4},
        "evaluation": {"sts": "structure", "structure_pairs": 60, "every_steps": 2},
        "runtime": {"use_gpu": False, "log_every_steps": 2},
    }
    (tmp_path / "experiments").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments/quickstart.yaml").write_text(yaml.safe_dump(values))
    write_corpus(tmp_path / "notes.txt", 60)
    return tmp_path


@pytest.mark.slow
def test_the_page_runs_as_it_stands(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) > 6
    names: dict[str, Any] = {}
    for block in blocks:
        code = compile(block, str(PAGE), "exec")
        if "cn.tune(" not in block:  # which starts Ray
            exec(code, names)
    printed = capsys.readouterr().out
    assert "STRUCTURE/dev (Spearman x 100): " in printed and f"Model: {checkout / 'runs/python/model'}" in printed
    assert "Correct the path." in printed, "the remedy of the error"
    assert set(names["losses"]) == {2, 4} and sorted(names["scores"]["extra"]) == ["STRUCTURE/dev"]
    assert (checkout / "notes.parquet").is_file() and (checkout / "runs/python/map.html").is_file()


def test_each_public_name_is_on_the_page_or_a_result() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in cn.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_public_functions_are_typed_and_say_what_their_arguments_mean() -> None:
    for name in cn.__all__:
        public = getattr(cn, name)
        assert inspect.getdoc(public), name
        if not inspect.isfunction(public):
            continue
        signature = inspect.signature(public)
        assert signature.return_annotation is not inspect.Signature.empty, name
        arguments = (inspect.getdoc(public) or "").partition("Args:")[2]
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter.name)
            assert re.search(rf"^ *(\w+, )*{parameter.name}[:,]", arguments, flags=re.M), (name, parameter.name)


# ---- results --------------------------------------------------------------------------------------------------------


def test_one_model_and_several_are_shown_as_tables(tmp_path: Path, tiny_model: Path) -> None:
    write_pairs(tmp_path / "sts/MINE/test.jsonl", count=12)
    shutil.copytree(tiny_model, tmp_path / "other")
    one = cn.evaluate(tiny_model, tmp_path / "sts")
    assert f"{one['extra']['MINE/test']:.2f}" in repr(one) and "MINE/test" in repr(one)
    assert repr(one).isprintable() is False and not re.search(r"[\x00-\x09\x0b-\x1f]", repr(one))
    both = cn.evaluate([tiny_model, tmp_path / "other"], tmp_path / "sts", dev="MINE/test", against=tiny_model)
    assert [each["model"] for each in both["models"]] == [str(tiny_model), str(tmp_path / "other")]
    assert "+0.00" in repr(both) and "inside the noise" in repr(both)
    json.dumps(both, allow_nan=False)


def test_a_map_a_report_and_an_index_say_what_and_where(run_dir: Path, tmp_path: Path, tiny_model: Path) -> None:
    written = cn.write_report(run_dir)
    assert repr(written).splitlines() == [*written.page.headline, f"Report: {run_dir / 'report.html'}"]
    assert cn.write_report([run_dir], tmp_path / "other.html").path == tmp_path / "other.html"
    with pytest.raises(cn.ConfigError, match=r"ends in \.html"):
        cn.write_report(run_dir, tmp_path / "other.pdf")
    drawn = cn.draw_map(tiny_model, write_corpus(tmp_path / "texts.txt", 40), tmp_path / "map.html")
    assert repr(drawn).splitlines()[1:] == [f"Map: {tmp_path / 'map.html'}", f"Its data: {tmp_path / 'map.parquet'}"]
    index = cn.SemanticIndex.build(tiny_model, tmp_path / "texts.txt")
    assert repr(index).startswith("40 sentences") and str(tmp_path / "texts.txt.index") in repr(index)
    with pytest.raises(cn.ConfigError, match="on the web"):
        cn.encode(tiny_model, "https://example.com/a.txt", tmp_path / "a.parquet")


# ---- the notebook ---------------------------------------------------------------------------------------------------


def run_notebook(directory: Path) -> list[Any]:
    """The cells of the notebook after they were run in ``directory``/docs."""
    if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
        pytest.skip("nbclient or ipykernel is not installed: pip install -c constraints.txt '.[dev]'")
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=800, coalesce_streams=True, resources={"metadata": {"path": str(directory / "docs")}}
    )
    # A warning of tqdm, which asks for ipywidgets.
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:IProgress not found"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: Any) -> str:
    """What a cell shows, as plain text."""
    return "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)


def check_outputs(cells: list[Any]) -> None:
    shown = [text_of(cell) for cell in cells]
    assert [text for text in shown if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)] == [], "control characters"
    assert [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"] == []
    assert "Training: " in shown[1] and "STRUCTURE/dev (Spearman x 100): " in shown[1]
    assert "STRUCTURE/dev" in shown[2] and "uniformity" in shown[2]
    assert sum(" sentences: " in line for line in shown[5].splitlines()) >= 3
    assert len(shown[6].splitlines()) == 3 and re.match(r"0\.\d\d  \w", shown[6])
    assert "report.html" in shown[7]


@pytest.mark.slow
def test_the_notebook_runs(checkout: Path) -> None:
    check_outputs(run_notebook(checkout))
    assert (checkout / "runs/python/report.html").is_file()


@pytest.mark.nightly
def test_the_notebook_runs_with_the_data_of_the_quickstart(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments/quickstart.yaml", tmp_path / "experiments")
    check_outputs(run_notebook(tmp_path))


def test_the_notebook_is_kept_as_it_ran() -> None:
    assert NOTEBOOK.stat().st_size < 60_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "\\u001b" not in text and "/tmp/" not in text and "/home/" not in text
