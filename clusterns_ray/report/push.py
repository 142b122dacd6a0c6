"""``clusterns push``: a finished model to the Hugging Face hub, with a card of its scores."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clusterns_ray.errors import ClusterNSError, ConfigError, DataError, first_line
from clusterns_ray.io.events import Note, OnEvent, notes_to
from clusterns_ray.io.files import DIRECTORY_MANIFEST, check_unchanged
from clusterns_ray.io.paths import Named, check_path
from clusterns_ray.io.yaml_text import dump_yaml
from clusterns_ray.models.resolve import model_of, resolve_model
from clusterns_ray.report.record import RunRecord, read_object, read_run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
UNDOCUMENTED = "---\nlibrary_name: sentence-transformers\n---\n\n# {}\n"
"""The card of a model without one."""
METRIC = "spearman_cosine"
"""The hub's name for Spearman's correlation of the cosines with the grades, from -1 to 1."""


class Pushed(NamedTuple):
    """A model on the hub; shown as its address."""

    name: str
    """OWNER/NAME"""
    url: str
    commit: str

    def __repr__(self) -> str:
        return f"{self.url} (commit {self.commit[:12]})"


def push(model: Named, name: str, *, private: bool = False, on_event: OnEvent = lambda event: None) -> Pushed:
    """Upload a model to the Hugging Face hub as one commit, with a card of what is known of its scores.

    The card is the model's own README, with the scores of the run beside it: dev sets before and after training, with
    intervals where the run has them, the tests of ``evaluation.json``, how they were scored, and the command. Files
    that the repository has from before and the model has not are removed from its newest state.

    Args:
        model: a run, its ``model/``, or another directory that ``Encoder.load`` reads.
        name: OWNER/NAME, or NAME alone for the owner of the token.
        private: make the repository private; an existing public one is refused.
        on_event: called with what is done, as notes.

    Raises:
        ConfigError: the model or the name cannot be used; there is no token, the hub does not accept it, or it may not
            write there; or the hub does not answer. Nothing was uploaded.
        ClusterNSError: the upload failed; the same call resumes it.
    """
    directory = Path(check_path("MODEL", model, ())).expanduser()
    source = model_of(directory)
    folder = Path(resolve_model(str(source), notes_to(on_event)))
    if not folder.is_dir():
        raise ConfigError(
            f"MODEL is {str(model)!r}, which names a model on the hub and no directory here.",
            "Give a run or the directory of a model.",
        )
    check_unchanged(folder)
    record = read_run(source.parent) if (source.parent / "config.yaml").is_file() else None
    if record is not None and not record.finished:
        raise ConfigError(
            f"The run {str(source.parent)!r} is not finished.", "Finish it first: run the same `clusterns train` again."
        )

    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"NAME is {name!r}: {first_line(error).rstrip('.')}.", "Give OWNER/NAME.") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be uploaded.", "Unset it, and run the command again.")
    if get_token() is None:
        raise ConfigError(
            "No token for the Hugging Face hub was found.",
            "Create one with write access at https://huggingface.co/settings/tokens, then run `hf auth login` or set "
            "HF_TOKEN.",
        )
    api = HfApi()
    repository = _repository(api, name, private)
    card = model_card(folder, repository, record)
    on_event(Note(f"Uploading {str(folder)!r} to {repository}"))
    with tempfile.TemporaryDirectory(prefix="clusterns-push-") as scratch:
        for path in folder.rglob("*"):
            target = Path(scratch, path.relative_to(folder))
            if path.is_file() and path.name != DIRECTORY_MANIFEST:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
        Path(scratch, CARD).unlink(missing_ok=True)
        Path(scratch, CARD).write_text(card, encoding="utf-8")
        try:
            done = api.upload_folder(
                repo_id=repository,
                folder_path=scratch,
                commit_message="Upload by clusterns push",
                delete_patterns="*",
            )
        except Exception as error:  # whatever the HTTP library of this version raises
            raise _refusal(error, repository) or ClusterNSError(
                f"{repository}: the upload failed ({first_line(error)[:200]}).", "Run the same command again."
            ) from error
    return Pushed(repository, f"{api.endpoint}/{repository}", done.oid)


def _repository(api: HfApi, name: str, private: bool) -> str:
    """Create the repository unless it exists, and return OWNER/NAME.

    Raises:
        ConfigError: it may not be made or written to, or the hub does not answer.
    """
    try:
        repository = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        is_private = not private or api.model_info(repository).private
    except Exception as error:  # whatever the HTTP library of this version raises
        refusal = _refusal(error, name)
        if refusal is None:
            said = first_line(error).rstrip(".")[:200]
            refusal = ConfigError(f"{api.endpoint} cannot be reached ({said}).", "Check the network, and try again.")
        raise refusal from None
    if not is_private:
        raise ConfigError(
            f"{repository} already exists and is public, but --private was given.",
            "Choose another NAME, or make the repository private in its settings on the hub first.",
        )
    return repository


def _refusal(error: Exception, name: str) -> ConfigError | None:
    """What the hub's answer means for the request; None where it is no answer, or an error of the hub's own."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = first_line(error).rstrip(".:")[:200]
    if status == 401:
        return ConfigError(
            f"The hub does not accept the token (401: {said}).",
            "Log in again with `hf auth login`, or correct HF_TOKEN.",
        )
    if status in (403, 404):
        return ConfigError(
            f"The token may not write to {name!r}, which may be someone else's ({status}: {said}).",
            "Choose a NAME of your own, or a token that may write there.",
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return ConfigError(f"The hub refuses {name!r} ({status}: {said}).", "Correct NAME.")
    return None


# ---- the card -------------------------------------------------------------------------------------------------------


def model_card(folder: Path, name: str, record: RunRecord | None) -> str:
    """The README of a model on the hub: its own, with the hub's metadata and what the run beside it says of its scores.

    Raises:
        DataError: its README cannot be read.
    """
    from huggingface_hub import EvalResult, ModelCard

    try:
        own = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else UNDOCUMENTED.format(name)
        card = ModelCard(own.replace("PATH_OF_THIS_DIRECTORY", name), ignore_metadata_errors=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(folder / CARD)!r} cannot be read ({first_line(error)}).", "Correct or remove it."
        ) from None
    data: Any = card.data
    if not _on_the_hub(data.get("base_model")):  # which the hub would refuse
        data.base_model = None
    rows = score_rows(record) if record is not None else []
    measured = {row.name: row.score for row in rows if row.score is not None}
    if measured:
        data.model_name = name.rpartition("/")[2]
        data.eval_results = [
            EvalResult("sentence-similarity", set_name, set_name, METRIC, round(score / 100, 6))
            for set_name, score in measured.items()
        ]
    return str(card).rstrip() + "\n" + ("\n" + _section(record, rows) if record is not None else "")


def _on_the_hub(name: Any) -> bool:
    """Whether a name is one of the hub's, and not that of a directory or a package."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


class Row(NamedTuple):
    """A score, Spearman x 100."""

    name: str
    before: float | None
    """of the untrained encoder, or of what it was compared with"""
    score: float | None
    interval: tuple[float, float] | None
    """95 %, of the difference"""
    role: str


def score_rows(record: RunRecord) -> list[Row]:
    """Every score that is known of a run's model."""
    result, rows = record.result or {}, []
    if result.get("sts_dev") is not None:
        role = "selected the step"
        rows.append(Row(result["dev"], result["sts_dev_before"], result["sts_dev"], None, role))
        for name, also in (result.get("also") or {}).items():
            interval = (also["low"], also["high"]) if also.get("low") is not None else None
            rows.append(Row(name, also["before"], also["after"], interval, "selected nothing"))
    scores = record.sts or {}
    tests = {task: figures["spearman"] for task, figures in scores.get("tasks", {}).items()}
    tests |= {name: score for name, score in scores.get("extra", {}).items() if name not in {row.name for row in rows}}
    if scores.get("average") is not None:
        tests["average"] = scores["average"]
    compared: dict[str, Any] = next(
        iter((read_object(record.path / "evaluation.json") or {}).get("differences", ())), {}
    )
    for name, score in tests.items():
        role, before, interval = "tested after training", None, None
        if name in compared.get("sts", {}):
            difference = compared["sts"][name]
            before, interval = score - difference["difference"], (difference["low"], difference["high"])
            role += f", against {compared['against']}"
        rows.append(Row("average of the seven tests" if name == "average" else name, before, score, interval, role))
    return rows


def _section(record: RunRecord, rows: list[Row]) -> str:
    """Markdown: scores, how they were taken, and the command."""
    lines = ["## Scores", ""]
    if rows:
        lines += [
            "Spearman's correlation x 100 of the cosine of two sentences with their grade, over all pairs of a set.",
            "",
            "| set | before, or the other model | this model | difference, 95 % interval | |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            gain = "" if row.before is None or row.score is None else f"{row.score - row.before:+.2f}"
            if row.interval is not None:
                gain += f" ({row.interval[0]:+.2f} to {row.interval[1]:+.2f})"
            lines.append(f"| {row.name} | {_fixed(row.before)} | {_fixed(row.score)} | {gain} | {row.role} |")
        lines.append("")
        if any(row.interval for row in rows):
            lines += ["Intervals are of a paired bootstrap over the pairs of a set, for this one model and seed.", ""]
        if any(row.name == "STRUCTURE/dev" for row in rows):
            lines += ["STRUCTURE/dev is graded by where two sentences stand in their documents, not by people.", ""]
        protocol = ((record.sts or {}).get("data") or {}).get("protocol") or {}
        lines += [f"{tasks}: {text}." for tasks, text in protocol.items()] + ([""] if protocol else [])
    else:
        lines += ["There are none, as the run had no dev set.", ""]
    lines += [
        "## Command",
        "",
        "To train it again, with the configuration below as `config.yaml` and the same data:",
    ]
    lines += ["", "```bash", "clusterns train config.yaml", "```", ""]
    words = [str(word) for word in (record.environment or {}).get("command") or ()]
    if words and Path(words[0]).name == "clusterns":
        lines += ["It was trained with", "", "```bash", shlex.join(["clusterns", *words[1:]]), "```", ""]
    lines += ["```yaml", dump_yaml(record.config.identity()).rstrip(), "```", ""]
    return "\n".join(lines)


def _fixed(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"
