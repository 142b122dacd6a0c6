"""``clusterns evaluate``: models by name to tables and a JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clusterns_ray.config import POOLINGS, Config, DataConfig, EvaluationConfig, parse_saved_config
from clusterns_ray.data.documents import list_documents
from clusterns_ray.data.prepare import documents_of, structure_dev_set
from clusterns_ray.errors import ConfigError, DataError, NonFiniteError
from clusterns_ray.evaluation import hub
from clusterns_ray.evaluation.clusters import SEEDS, evaluate_clusters, list_sets, read_clusters
from clusterns_ray.evaluation.compare import compare_right, compare_sts
from clusterns_ray.evaluation.geometry import geometry, unit_rows
from clusterns_ray.evaluation.labelled import Labelled
from clusterns_ray.evaluation.sts import (
    Pairs,
    StsTests,
    check_holds_sets,
    check_pairs_exist,
    cosines_of,
    read_pairs,
    read_tests,
    score_tests,
)
from clusterns_ray.evaluation.tables import as_text
from clusterns_ray.evaluation.transfer import SEED, Task, check_transfer_directory, evaluate_transfer, read_transfer
from clusterns_ray.evaluation.transfer import TASKS as TRANSFER_TASKS
from clusterns_ray.io.events import OnEvent, OnNote, notes_to
from clusterns_ray.io.files import null_for_nan
from clusterns_ray.io.object_store import is_url, read_text, split_url
from clusterns_ray.io.paths import Named, check_path, names
from clusterns_ray.models.resolve import resolve_model

if TYPE_CHECKING:
    from clusterns_ray.models.encoder import Encoder

SUITES = {"sts": "--sts", "transfer": "--transfer", "clustering": "--clusters", "geometry": "--sts"}
"""Every suite, in the order they are run, and the option that names its data."""

GEOMETRY_SET = "STSB/dev"
STRUCTURE_SET = "STRUCTURE/dev"
ALIKE = 1e-5
"""Unit embeddings that differ by less than this in every value are the same: float32 may leave as much."""

PACKAGES = ("clusterns-ray", "torch", "transformers", "numpy", "scipy", "scikit-learn", "faiss-cpu", "faiss-gpu")


@dataclass(frozen=True)
class Suite:
    """What is measured, and on which data."""

    names: tuple[str, ...] = ()
    """of SUITES, or ``all``; none: whatever there is data for, geometry excepted"""
    sts: str | Path | None = None
    """a directory of TASK/SUBSET.jsonl, ``hf``, or ``structure``: pairs graded by the structure of documents"""
    transfer: str | Path | None = None
    """a directory of MR.tsv and so on"""
    clusters: tuple[str | Path, ...] = ()
    """files of label<TAB>sentence, or directories of the short-text sets"""
    extra: tuple[str, ...] = ()
    """further TASK/SUBSET to score; the first is also what geometry is measured on, instead of STSB/dev"""
    seed: int = SEED
    """of folds, K-means and resampling"""
    documents: tuple[str, ...] = ()
    """of ``structure``: paths, globs or ``demo``; none: those of the run that made the first model that has some"""


@dataclass(frozen=True)
class Data:
    """A suite's data, read and checked."""

    sts: StsTests | None
    geometry: Pairs | None
    transfer: list[Task]
    clusters: dict[str, Labelled]

    def sentences(self) -> list[str]:
        """Every different sentence."""
        pairs = [*(self.sts.subsets() if self.sts else []), *([self.geometry] if self.geometry else [])]
        return list(
            dict.fromkeys(sentence for part in (*pairs, *self.transfer) for sentence in part.sentences())
            | dict.fromkeys(sentence for rows in self.clusters.values() for sentence in rows.sentences)
        )


def check_suite(suite: Suite) -> Suite:
    """Refuse a request before torch is imported; returns it with its suites named.

    Raises:
        ConfigError: an unknown suite, data that is not there, or data that no suite asks for.
    """
    data = {"--sts": suite.sts, "--transfer": suite.transfer, "--clusters": suite.clusters or None}
    for name in suite.names:
        if name not in (*SUITES, "all"):
            raise ConfigError(f"--suite is {name!r}; it must be {', '.join(SUITES)} or all.")
    names = [name for name in SUITES if name in suite.names or "all" in suite.names]
    if not suite.names:
        names = [name for name, option in SUITES.items() if data[option] is not None and name != "geometry"]
        if not names:
            raise ConfigError("No data to evaluate on. Give --sts, --transfer or --clusters.")
    missing = [option for option in data if data[option] is None and option in {SUITES[name] for name in names}]
    if missing:
        raise ConfigError(
            f"--suite {','.join(suite.names)} needs {' and '.join(missing)}. Give the data, or fewer suites."
        )
    idle = [option for option, value in data.items() if value is not None and option not in {SUITES[n] for n in names}]
    if idle:
        raise ConfigError(
            f"{' and '.join(idle)} given, but --suite {','.join(names)} does not read that. Name the suite too, or "
            "leave --suite out."
        )
    if suite.extra and suite.sts is None:
        raise ConfigError(f"--dev {suite.extra[0]} needs --sts, the directory that holds it.")
    if suite.documents and suite.sts != "structure":
        raise ConfigError("--documents is read with --sts structure alone. Give that, or leave --documents out.")
    if suite.sts == "structure":
        other = [name for name in suite.extra if name != STRUCTURE_SET]
        if other:
            raise ConfigError(f"--dev {other[0]!r} is not among the sets of --sts structure: {STRUCTURE_SET} alone.")
        if suite.documents:
            list_documents(list(suite.documents))
    elif suite.sts == "hf":
        unknown = [name for name in suite.extra if name not in hub.HUB]
        if unknown:
            raise ConfigError(f"--dev {unknown[0]!r} is not among the hub's: {', '.join(hub.HUB)}.")
    elif suite.sts is not None:
        _check_sts(Path(suite.sts), suite.extra, names)
    if suite.transfer is not None:
        check_transfer_directory(suite.transfer)
    list_sets(suite.clusters)
    return replace(suite, names=tuple(names))


def _check_sts(directory: Path, extra: Sequence[str], names: Sequence[str]) -> None:
    if not directory.is_dir():
        raise ConfigError(
            f"--sts {str(directory)!r} is not a directory. Give one that holds TASK/SUBSET.jsonl files, or hf."
        )
    for name in extra:
        check_pairs_exist(directory, name)
    if "sts" in names and not extra:
        check_holds_sets(directory)
    if "geometry" in names and not extra and not (directory / f"{GEOMETRY_SET}.jsonl").is_file():
        raise ConfigError(
            f"--sts {str(directory)!r} has no {GEOMETRY_SET}.jsonl, on which geometry is measured. Name another set of "
            "graded pairs with --dev TASK/SUBSET."
        )


def structure_source(models: Sequence[str], suite: Suite) -> tuple[str | list[str], str, int]:
    """Which documents grade the pairs of ``--sts structure``: documents, column of the text, number of pairs.

    Raises:
        ConfigError: none are named, and no model is that of a run that names some.
    """
    pairs = EvaluationConfig.model_fields["structure_pairs"].default
    if suite.documents:
        return list(suite.documents), DataConfig.model_fields["text_column"].default, pairs
    for model in models:
        config = _config_of_run(model)
        documents = documents_of(config) if config is not None else None
        if config is not None and documents is not None:
            return documents, config.data.text_column, config.evaluation.structure_pairs
    raise ConfigError(
        f"--sts structure grades pairs of sentences by the documents they stand in, and {models[0]!r} is not the "
        "model/ of a run that names documents. Give them: --documents FILES."
    )


def _config_of_run(model: str) -> Config | None:
    """The configuration beside the ``model/`` of a run or a study; None where there is none that can be read."""
    holder, name = split_url(model) if is_url(model) else (str(Path(model).expanduser().resolve().parent), "")
    if is_url(model) and not name:
        return None
    for file in ("config.yaml", "best.yaml"):
        text = read_text(f"{holder}/{file}")
        if text is not None:
            with suppress(ConfigError):  # a file of that name that is not a run's
                return parse_saved_config(text, f"{holder}/{file}")
    return None


def _with_structure_set(suite: Suite, models: Sequence[str], note: OnNote) -> Suite:
    """The suite with the directory of the graded pairs in place of ``structure``."""
    documents, column, pairs = structure_source(models, suite)
    try:
        list_documents(documents)
    except DataError as error:
        raise ConfigError(
            f"{error} A run names these documents; where they lie elsewhere now, give --documents FILES."
        ) from None
    cache = hub.hub_cache().parent
    try:
        directory = structure_dev_set(documents, cache, pairs=pairs, text_column=column, note=note)
    except OSError as error:
        raise ConfigError(
            f"{str(cache)!r} cannot be written ({error.strerror}), where pairs graded by structure are kept. Set "
            "XDG_CACHE_HOME to a directory that can."
        ) from None
    return replace(suite, sts=directory, extra=(STRUCTURE_SET,), documents=())


def read_data(suite: Suite, note: OnNote = lambda text: None) -> Data:
    """Everything that a checked suite needs; ``sts`` of hf is fetched where it has not been before.

    Raises:
        ConfigError, DataError: it is not there, or cannot be used.
    """
    directory = suite.sts
    if directory == "hf":
        directory = hub.fetch_sts(hub.hub_cache(), note=note)
    graded = suite.extra[0] if suite.extra else GEOMETRY_SET
    return Data(
        sts=read_tests(directory, suite.extra) if directory is not None and "sts" in suite.names else None,
        geometry=read_pairs(directory, graded) if directory is not None and "geometry" in suite.names else None,
        transfer=read_transfer(suite.transfer) if suite.transfer is not None else [],
        clusters={name: read_clusters(name, path) for name, path in list_sets(suite.clusters).items()},
    )


def evaluate_models(
    models: Sequence[str],
    suite: Suite,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    against: str | None = None,
    note: OnNote = lambda text: None,
) -> dict[str, Any]:
    """Evaluate models on the same data, one after the other.

    Every different sentence is encoded once by each model, for all suites together.

    Args:
        against: a further model that each of ``models`` is compared with.
        note: called with what is done, in words, and at most every few seconds with how far it is.

    Returns:
        ``models``: one object each, as :func:`evaluate` returns it, ``against`` the last of them;
        ``differences``: without ``against`` empty, else of each model ``model``, ``against`` and ``sts``, ``transfer``,
        ``clustering``: differences by task, as ``compare.interval`` gives them.

    Raises:
        ConfigError: no such model or data.
        DataError: data that cannot be used.
        NonFiniteError: a score is not defined, as embeddings are NaN or infinite, or all alike.
    """
    suite = check_suite(suite)
    if pooling is not None and pooling not in POOLINGS:
        raise ConfigError(f"--pooling is {pooling!r}; it must be {', '.join(POOLINGS)}.")
    every = [*dict.fromkeys(models), *([against] if against is not None and against not in models else [])]
    for model in every:
        resolve_model(model, note)
    if against is not None and len(every) < 2:
        raise ConfigError(f"--against {against!r} is the model itself. Name another one.")
    sources: dict[str, Any] = {}
    if suite.sts == "structure":
        documents = structure_source(every, suite)[0]
        sources = {"sts": "structure", "documents": documents}
        suite = _with_structure_set(suite, every, note)
    data = read_data(suite, note)

    from clusterns_ray.models.encoder import Encoder

    sources = {"sts": suite.sts, "transfer": suite.transfer, "clusters": list(suite.clusters) or None, **sources}
    sources = {name: _text(source) for name, source in sources.items() if source is not None}
    if suite.sts == "hf":
        sources["protocol"] = hub.PROTOCOL
    results: dict[str, dict[str, Any]] = {}
    items: dict[str, _Items] = {}
    for model in every:
        prefix = f"{model}: " if len(every) > 1 else ""
        paced = paced_note(note, prefix)
        encoder = Encoder.load(model, pooling=pooling, max_length=max_length)
        if encoder.similarity != "cosine" and not encoder.normalize:
            note(f"{model} is meant to be compared by {encoder.similarity}; all scores here are of the cosine.")
        try:
            figures, items[model] = _evaluate(encoder, suite, data, paced)
        except NonFiniteError as error:
            raise NonFiniteError(f"{model} has no score: {error}") from None
        if encoder.truncated:
            note(prefix + encoder.describe_truncation(encoder.truncated, len(data.sentences())))
        results[model] = {
            "model": model,
            "pooling": encoder.pooling,
            "max_length": encoder.max_length,
            "truncated": encoder.truncated,
            "suite": list(suite.names),
            **null_for_nan(figures),
            "data": sources,
            "versions": _versions(),
        }
    differences = []
    for model in every:
        if against is not None and model != against:
            note(f"Comparing {model} with {against}")
            by_suite = _compare(data, items[model], items[against], suite.seed)
            differences.append({"model": model, "against": against, **by_suite})
    return {"models": list(results.values()), "differences": differences}


def evaluate(
    models: Named | Sequence[Named],
    sts: str | Path | None = None,
    *,
    suite: str | Sequence[str] = (),
    transfer: str | Path | None = None,
    clusters: Named | Sequence[Named] = (),
    dev: str | Sequence[str] = (),
    documents: Named | Sequence[Named] = (),
    against: Named | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
    seed: int = SEED,
    on_event: OnEvent = lambda event: None,
) -> Evaluation:
    """Score encoders as ``clusterns evaluate`` does, whose options these are.

    Args:
        models: one or several, each a run's ``model/``, a directory, a hub id, or ``package:PACKAGE/SUBDIR``.
        sts: a directory of TASK/SUBSET.jsonl, ``hf`` (the public sets), or ``structure`` (graded by documents).
        suite: ``sts``, ``transfer``, ``clustering``, ``geometry`` or ``all``; by default those with data.
        transfer: a directory of MR.tsv, TREC-train.tsv and the like.
        clusters: files of label<TAB>sentence, or directories of short-text sets.
        dev: further TASK/SUBSET to score, such as ``STSB/dev``.
        documents: for ``structure``, if not those of the model's run.
        against: a model to compare the others with: differences with 95 % intervals.
        pooling: in place of the model's own.
        max_length: tokens a sentence is cut to, in place of the model's own limit.
        seed: of the folds, of K-means and of resampling.
        on_event: called with what is done, as notes.

    Returns:
        Of one model ``model``, ``pooling``, ``max_length``, ``truncated`` (how many sentences were cut to it),
        ``suite``, ``data``, ``versions``; of STS ``tasks``, ``missing``, ``average``, ``extra`` (see ``score_tests``);
        and ``transfer``, ``clustering``, ``geometry``, each where it was asked for. Of several, or with ``against``,
        ``models``, a list of such, and ``differences`` (see ``evaluate_models``).

    Raises:
        ConfigError: no such model or data.
        DataError: data that cannot be used.
        NonFiniteError: a score is not defined, as embeddings are NaN or infinite, or all alike.
    """
    request = Suite(
        tuple(name for part in names(suite) for name in part.split(",")),
        None if sts is None else check_path("--sts", sts, ()),
        None if transfer is None else Path(check_path("--transfer", transfer, ())).expanduser(),
        tuple(Path(check_path("--clusters", path, ())).expanduser() for path in names(clusters)),
        names(dev),
        seed,
        names(documents),
    )
    options: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "note": notes_to(on_event)}
    options["against"] = None if against is None else os.fspath(against)
    result = evaluate_models(names(models), request, **options)
    return Evaluation(result["models"][0] if len(result["models"]) == 1 else result)


class Evaluation(dict[str, Any]):
    """The figures of :func:`evaluate`, by their keys; shown as the tables that ``clusterns evaluate`` prints."""

    def __repr__(self) -> str:
        return as_text(self.tables)

    @property
    def tables(self) -> dict[str, Any]:
        """The same as :func:`evaluate_models` returns it."""
        return dict(self) if "models" in self else {"models": [dict(self)], "differences": []}


@dataclass(frozen=True)
class _Items:
    """What the bootstrap draws from: a model's outcome on each item of each test."""

    cosines: dict[str, np.ndarray]
    transfer: dict[str, np.ndarray]
    clusters: dict[str, np.ndarray]


def _evaluate(encoder: Encoder, suite: Suite, data: Data, note: OnNote) -> tuple[dict[str, Any], _Items]:
    import torch

    if torch.cuda.is_available():
        encoder.to("cuda")
    sentences = data.sentences()
    z_ND = encoder.encode(sentences, progress=lambda done: note(f"{done:,} of {len(sentences):,} sentences encoded"))
    _check_not_alike(z_ND)
    row = {sentence: number for number, sentence in enumerate(sentences)}

    def embed(some: Sequence[str]) -> np.ndarray:
        return z_ND[[row[sentence] for sentence in some]]

    figures: dict[str, Any] = {}
    cosines: dict[str, np.ndarray] = {}
    transfer: dict[str, np.ndarray] = {}
    clusters: dict[str, np.ndarray] = {}
    if data.sts is not None:
        cosines = cosines_of(data.sts, embed)
        figures |= score_tests(data.sts, cosines)
    if data.transfer:
        figures["transfer"], transfer = evaluate_transfer(data.transfer, embed, seed=suite.seed, note=note)
    if data.clusters:
        seeds = range(suite.seed, suite.seed + SEEDS)
        figures["clustering"], clusters = evaluate_clusters(data.clusters, embed, seeds=seeds, note=note)
    if data.geometry is not None:
        figures["geometry"] = {"set": data.geometry.name, **geometry(data.geometry, embed)}
    return figures, _Items(cosines, transfer, clusters)


def _check_not_alike(z_ND: np.ndarray) -> None:
    """Refuse embeddings that differ by no more than what rounding leaves: there is nothing that could be ranked."""
    n_ND = unit_rows(z_ND)
    if len(n_ND) > 1 and np.abs(n_ND - n_ND[0]).max() < ALIKE:
        raise NonFiniteError(
            f"all {len(n_ND):,} sentences have the same embedding, so no correlation is defined, and nothing can be "
            "told apart. The model has collapsed, or --pooling reads a token that is the same in every sentence."
        )


def _compare(data: Data, a: _Items, b: _Items, seed: int) -> dict[str, Any]:
    by_suite: dict[str, Any] = {}
    if data.sts is not None:
        by_suite["sts"] = compare_sts(data.sts, a.cosines, b.cosines, seed=seed)
    if data.transfer:
        whole = len(data.transfer) == len(TRANSFER_TASKS)
        by_suite["transfer"] = compare_right(a.transfer, b.transfer, seed=seed, average=whole)
    if data.clusters:
        by_suite["clustering"] = compare_right(a.clusters, b.clusters, seed=seed)
    return by_suite


def paced_note(note: OnNote, prefix: str = "", seconds: float = 10.0) -> OnNote:
    """``note``, but called at most once every ``seconds``, and not before the first of them have passed."""
    last = time.monotonic()

    def paced(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            note(prefix + text)

    return paced


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _text(source: Any) -> Any:
    return [str(each) for each in source] if isinstance(source, list) else str(source)
