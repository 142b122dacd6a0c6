"""The ``clusterns`` command: one verb for each job, and no logic.

Exit codes: 0 done, 1 the job failed, 2 the request was wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Optional

import typer

import clusterns_ray
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError, describe_unexpected
from clusterns_ray.io.terminal import printable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train sentence embeddings without labels: ClusterNS on Ray.",
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, such as experiments/quickstart.yaml.")]
Overrides = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
]
StudyFile = Annotated[
    Path, typer.Argument(metavar="STUDY", help="A YAML file, such as experiments/studies/smoke.yaml.")
]
PoolingOption = Annotated[Optional[str], typer.Option(help="Pooling, in place of the model's own.")]
MaxLengthOption = Annotated[
    Optional[int], typer.Option(max=2**20, help="Tokens a sentence is cut to, in place of the model's own limit.")
]


@contextmanager
def readable_errors(resumption: str = "") -> Iterator[None]:
    """Turn an error into one message and an exit code; with CLUSTERNS_TRACEBACK=1 unexpected ones keep their traceback.

    Args:
        resumption: where the same command goes on after this one was interrupted; empty where it begins again.
    """
    try:
        yield
    except (ConfigError, DataError) as error:
        typer.echo(printable(f"error: {error}"), err=True)
        raise typer.Exit(2) from None
    except ClusterNSError as error:
        typer.echo(printable(f"failed: {error}"), err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        again = f" The same command goes on {resumption}." if resumption else ""
        typer.echo("Interrupted." + again, err=True)
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort, BrokenPipeError):  # which typer handles itself
        raise
    except Exception as error:
        if os.environ.get("CLUSTERNS_TRACEBACK") == "1":
            raise
        again = f" Then the same command goes on {resumption}." if resumption else ""
        typer.echo(printable(f"failed: {describe_unexpected(error, again)}"), err=True)
        raise typer.Exit(1) from None


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False
) -> None:
    if show:
        typer.echo(f"clusterns {clusterns_ray.__version__}")
        raise typer.Exit


@app.command()
def train(config: ConfigFile, set: Overrides = None) -> None:
    """Train an encoder on plain sentences, or resume a run of that name."""
    with readable_errors("from the newest checkpoint"):
        from clusterns_ray.config import load_config
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.launch.trainer import train as run_training
        from clusterns_ray.training.result import outcome_lines

        with progress_view() as on_event:
            result = run_training(load_config(config, set or ()), on_event)
        for line in outcome_lines(result):
            typer.echo(line)
        typer.echo(f"Wrote {result['model']}")


@app.command()
def prepare(
    config: ConfigFile,
    set: Overrides = None,
    workers: Annotated[int, typer.Option(help="Number of Ray workers; 0 works in this process.")] = 0,
) -> None:
    """Tokenise the corpus, and make the structure-graded dev set where the configuration asks for one."""
    with readable_errors("behind the parts that are done" if workers else ""):
        from clusterns_ray.config import load_config
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.data.prepare import describe
        from clusterns_ray.launch.distributed_prepare import prepare as run_preparation
        from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage

        settings = load_config(config, set or ())
        check_data(settings)
        settings = check_encoder(settings)
        check_storage(settings)
        with progress_view() as on_event:
            prepared = run_preparation(settings, on_event, workers=workers)
        typer.echo(describe(prepared.manifest))
        if settings.evaluation.sts == "structure":
            typer.echo(f"Wrote {prepared.sts_dir}/STRUCTURE/dev.jsonl (graded by document structure, not by people)")
        typer.echo(("Found " if prepared.reused else "Wrote ") + (prepared.address or str(prepared.tokens_dir)))


@app.command()
def tune(
    study: StudyFile,
    set: Overrides = None,
    status: Annotated[bool, typer.Option("--status", help="Show how a study stands, also while it runs.")] = False,
    finalize: Annotated[
        bool, typer.Option("--finalize", help="Score the winner on the seven STS tests: once, at the end.")
    ] = False,
) -> None:
    """Search a space of settings against the dev set, or go on with a study of that name.

    Samplers: tpe, gp, cmaes, random, qmc, grid. Schedulers: asha, median, none.

    Roles of keys: scientific (the default: what the study is about), nuisance (tuned along), fixed.

    `--set budget.trials=N` raises the budget, also of a finished study.
    """
    with readable_errors("with the trials that are left"):
        from clusterns_ray.tuning.study import load_study

        request = load_study(study, set or ())
        if status and finalize:
            raise ConfigError("--status and --finalize exclude each other. Give one.")
        if status:
            from clusterns_ray.console.study import show_status

            show_status(request)
            return
        if finalize:
            from clusterns_ray.console.final import render
            from clusterns_ray.tuning.final import finalize as score_tests

            final, path = score_tests(request)
            render(final)
            typer.echo(f"Wrote {path}")
            return

        from clusterns_ray.console.study import study_view
        from clusterns_ray.tuning.result import study_lines
        from clusterns_ray.tuning.sweep import tune as run_study

        with study_view(request) as on_event:
            result = run_study(request, on_event)
        for text in study_lines(result):
            typer.echo(text)
        from clusterns_ray.report.study import write_study_report

        write_study_report(request.directory)
        request.home.publish("report.html")
        typer.echo(f"Wrote {result['best']}, {result['model']} and {(request.home / 'report.html').address}")


@app.command()
def enqueue(
    study: StudyFile,
    values: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="Values of keys in the space; the sampler proposes the others."),
    ],
    set: Overrides = None,
) -> None:
    """Have a study try these values next, whether it runs, here or on another machine, or stands still.

    `--set` is as for `tune`: what the study was begun with.
    """
    with readable_errors():
        from clusterns_ray.tuning.comparison import show_value
        from clusterns_ray.tuning.enqueue import enqueue as enqueue_point
        from clusterns_ray.tuning.study import load_study

        request = load_study(study, set or ())
        point = enqueue_point(request, values)
        shown = ", ".join(f"{key} {show_value(value)}" for key, value in point.items())
        typer.echo(f"Enqueued as the next trial of the study {request.config.name}: {shown}.")


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A run's model/ (also in s3:// or gs://), a directory, a hub id, or package:PACKAGE/SUBDIR.",
        ),
    ],
    suite: Annotated[
        Optional[list[str]],
        typer.Option(
            help="sts, transfer, clustering, geometry or all, separated by commas; by default those with data."
        ),
    ] = None,
    sts: Annotated[
        Optional[str],
        typer.Option(
            help="A directory of TASK/SUBSET.jsonl files, hf (the public sets), or structure (graded by documents)."
        ),
    ] = None,
    documents: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="FILE", help="For --sts structure: documents, if not those of the model's run; may be repeated."
        ),
    ] = None,
    transfer: Annotated[
        Optional[Path], typer.Option(help="A directory with MR.tsv, TREC-train.tsv and the like.")
    ] = None,
    clusters: Annotated[
        Optional[list[Path]],
        typer.Option(help="A file of label<TAB>sentence, or a directory of short-text sets; may be repeated."),
    ] = None,
    dev: Annotated[Optional[list[str]], typer.Option(help="Another TASK/SUBSET to score, such as STSB/dev.")] = None,
    against: Annotated[
        Optional[str], typer.Option(metavar="MODEL", help="Compare with this model: differences with 95 % intervals.")
    ] = None,
    pooling: PoolingOption = None,
    max_length: MaxLengthOption = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Seed of the folds, of K-means and of resampling.")
    ] = 1111,
    json_file: Annotated[
        Optional[str],
        typer.Option("--json", metavar="FILE", help="Write every figure to this file too; also s3:// or gs://."),
    ] = None,
) -> None:
    """Score encoders: the seven STS tests, transfer tasks, clustering, geometry; several models give one table."""
    with readable_errors():
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.evaluation.suite import evaluate as run_evaluation
        from clusterns_ray.evaluation.tables import render
        from clusterns_ray.io.files import check_writable, json_text
        from clusterns_ray.io.object_store import is_url, split_url, write_text
        from clusterns_ray.io.paths import check_path
        from clusterns_ray.launch.preflight import check_store

        json_file = json_file and check_path("--json", json_file)
        if json_file is not None and is_url(json_file):
            check_store("--json", split_url(json_file)[0])
        elif json_file is not None:
            check_writable(Path(json_file), "--json")
        with progress_view() as on_event:
            result = run_evaluation(
                models,
                sts,
                suite=suite or (),
                transfer=transfer,
                clusters=clusters or (),
                dev=dev or (),
                documents=documents or (),
                against=against,
                pooling=pooling,
                max_length=max_length,
                seed=seed,
                on_event=on_event,
            )
        render(result.tables)
        if json_file is not None:
            write_text(json_file, json_text(result))
            typer.echo(f"Wrote {json_file}")


@app.command()
def encode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The encoder, named as for `evaluate`.")],
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Text, csv, jsonl, parquet; globs, s3://, gs:// or hf://.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.parquet", help="The file to write.")],
    text_column: Annotated[str, typer.Option(help="The column or field that holds the sentence.")] = "text",
    limit: Annotated[Optional[int], typer.Option(max=2**53, help="At most this many sentences.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the values that are written: float32 or float16.")] = "float32",
    workers: Annotated[int, typer.Option(help="Number of Ray workers; 0 works in this process.")] = 0,
    batch_size: Annotated[int, typer.Option(max=2**20, help="Sentences encoded at once.")] = 64,
    pooling: PoolingOption = None,
    max_length: MaxLengthOption = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale embeddings to length 1.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of another request.")] = False,
) -> None:
    """Write sentences and their embeddings to a parquet file, or go on with it where a killed command was."""
    with readable_errors("behind the parts that are done"):
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.inference.distributed_encode import encode as run_encoding

        with progress_view() as on_event:
            result = run_encoding(
                model,
                files,
                output,
                workers=workers,
                text_column=text_column,
                limit=limit,
                dtype=dtype,
                batch_size=batch_size,
                pooling=pooling,
                max_length=max_length,
                normalize=normalize,
                overwrite=overwrite,
                on_event=on_event,
            )
        done = "Found, and left as it is:" if result.reused else "Wrote"
        typer.echo(f"{done} {result.path} ({result.rows:,} sentences, {result.width} values each)")


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="The encoder of corpus and queries, named as for `evaluate`.")],
    corpus: Annotated[str, typer.Argument(help="Text, named as for `encode`, or a file that `encode` wrote.")],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Sentences to look for.")],
    k: Annotated[int, typer.Option("-k", max=2**31, help="Number of answers to each query.")] = 10,
    index: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="Where the index is kept; by default CORPUS.index.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column or field that holds the sentence.")] = "text",
    limit: Annotated[Optional[int], typer.Option(max=2**53, help="At most this many sentences of the corpus.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each query.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build the index again.")] = False,
) -> None:
    """Find the sentences of a corpus most similar to a query; the first time, index it."""
    with readable_errors("behind the parts that are done"):
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.inference.search import SemanticIndex, check_k, check_queries, hits_as_json, hits_as_text

        check_queries(queries)
        check_k(k)
        with progress_view(sys.stderr) as on_event:
            results = SemanticIndex.build(
                model, corpus, index, text_column=text_column, limit=limit, rebuild=rebuild, on_event=on_event
            ).search(queries, k)
        for query, hits in zip(queries, results):
            typer.echo((hits_as_json if as_json else hits_as_text)(query, hits))


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's directory, or an encoder named as for `evaluate`.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The directory to write; a new one.")],
    to: Annotated[str, typer.Option(help="onnx, openvino or sentence-transformers.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Multiply in 8-bit integers.")] = False,
    dims: Annotated[
        str, typer.Option(metavar="N,N", help="Also give the first N values, as outputs of their own.")
    ] = "",
    corpus: Annotated[
        Optional[str], typer.Option(help="Sentences to compare on, named as for `encode`; the first 1,000.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column or field that holds the sentence.")] = "text",
    sts: Annotated[
        Optional[str], typer.Option(help="Score both on the TASK/SUBSET.jsonl files of this directory.")
    ] = None,
    dev: Annotated[
        Optional[list[str]], typer.Option(help="Of --sts only this TASK/SUBSET, such as STSB/dev; may be repeated.")
    ] = None,
) -> None:
    """Write an encoder for ONNX Runtime, OpenVINO or sentence-transformers, and compare it with the original."""
    with readable_errors():
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.inference.export import describe_export, export_model, parse_dims

        with progress_view() as on_event:
            result = export_model(
                model,
                output,
                to=to,
                int8=int8,
                dims=parse_dims(dims),
                corpus=corpus,
                text_column=text_column,
                sts=sts,
                sets=dev or (),
                on_event=on_event,
            )
        for line in describe_export(result):
            typer.echo(line)
        typer.echo(f"Wrote {result.path} ({result.bytes / 1e6:,.1f} MB of weights)")


@app.command("map")
def map_corpus(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's directory, or an encoder named as for `evaluate`.")
    ],
    corpus: Annotated[
        Optional[str], typer.Argument(metavar="CORPUS", help="Text, named as for `encode`; by default that of the run.")
    ] = None,
    output: Annotated[
        Optional[str],
        typer.Option("--output", "-o", metavar="FILE.html", help="The page to write; by default RUN/map.html."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="The column or field that holds the sentence.")] = "text",
    sentences: Annotated[int, typer.Option(help="How many are drawn at random, if the corpus has more.")] = 20_000,
    clusters: Annotated[
        Optional[int], typer.Option(help="This many clusters by K-means, in place of the run's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the sample, of K-means and of the layout.")] = 0,
) -> None:
    """Draw the sentences of a corpus in the plane, by meaning, as one HTML page, with a parquet file beside it.

    Of a run it shows its own clusters, and the same sentences before training.
    """
    with readable_errors():
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.report.map import draw_map
        from clusterns_ray.report.map.map_page import trust_line

        with progress_view() as on_event:
            drawn = draw_map(
                model,
                corpus,
                output,
                text_column=text_column,
                sentences=sentences,
                clusters=clusters,
                seed=seed,
                on_event=on_event,
            )
        typer.echo(trust_line(drawn.corpus_map))
        typer.echo(f"Wrote {drawn.page} and {drawn.data}")


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="STORAGE_PATH/NAME of runs, or of one study; also s3:// or gs://."),
    ],
    output: Annotated[
        Optional[str],
        typer.Option("--output", "-o", metavar="FILE.html", help="The page to write; by default RUN/report.html."),
    ] = None,
) -> None:
    """Write one HTML page about a run or a study; several runs are compared, with mean and deviation over seeds."""
    with readable_errors():
        from clusterns_ray.report import write_report

        written = write_report(runs, output)
        for text in written.page.headline:
            typer.echo(text)
        for warning in written.page.warnings:
            typer.echo(("Warning: " if warning.level == "problem" else "Note: ") + warning.text)
        typer.echo(f"Wrote {written.url} (here: {written.path})" if written.url else f"Wrote {written.path}")


@app.command()
def push(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's directory, its model/, or another directory of an encoder.")
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="OWNER/NAME on the hub, or NAME under your own account.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload a model to the Hugging Face hub, with a card of its scores, how they were taken, and the command."""
    with readable_errors():
        from clusterns_ray.console.progress import progress_view
        from clusterns_ray.report.push import push as run_push

        with progress_view() as on_event:
            pushed = run_push(model, name, private=private, on_event=on_event)
        typer.echo(f"Wrote {pushed!r}")


@app.command()
def status(
    place: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_STUDY", help="STORAGE_PATH/NAME of a run or a study; also s3:// or gs://."),
    ],
) -> None:
    """Show how a run or a study stands, from any machine: scores, newest checkpoint, time left, who works on it."""
    with readable_errors():
        from clusterns_ray.console.status import show_status
        from clusterns_ray.io.paths import check_path

        show_status(check_path("RUN_OR_STUDY", place))


@app.command()
def plan(
    config: ConfigFile,
    set: Overrides = None,
    workers: Annotated[str, typer.Option(help="Numbers of workers, separated by commas.")] = "1,8,64,512",
    bandwidth: Annotated[
        Optional[str], typer.Option(help="Bandwidth between two workers, such as 25Gbit/s or 3GB/s.")
    ] = None,
    latency: Annotated[str, typer.Option(help="Latency of a message between two workers, such as 50us.")] = "50us",
    tflops: Annotated[
        Optional[float], typer.Option(help="Matrix products that one worker gets done, in 10^12 FLOPs a second.")
    ] = None,
    sentences: Annotated[
        Optional[int], typer.Option(min=1, max=2**53, help="Sentences of the corpus, in place of how many there are.")
    ] = None,
    price: Annotated[
        Optional[float], typer.Option(min=0, help="Price of one worker for an hour, in any currency.")
    ] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write every figure to this file too.")] = None,
) -> None:
    """Show what a run needs on given numbers of workers: memory, exchanges, time, efficiency and cost."""
    with readable_errors():
        from clusterns_ray.config import load_config
        from clusterns_ray.console.plan import render
        from clusterns_ray.io.files import check_writable, write_json
        from clusterns_ray.io.paths import check_path
        from clusterns_ray.ops.plan.predict import plan_for

        json_file = json_file and Path(check_path("--json", json_file, ()))
        if json_file is not None:
            check_writable(json_file, "--json")
        settings = load_config(config, set or ())
        speed = {"bandwidth": bandwidth, "latency": latency, "tflops": tflops}
        result = plan_for(settings, workers, **speed, sentences=sentences, price=price)
        render(result)
        if json_file is not None:
            write_json(json_file, result)
            typer.echo(f"Wrote {json_file}")


@app.command()
def doctor(
    config: Annotated[
        Optional[Path],
        typer.Argument(metavar="CONFIG", help="A configuration or a study; without one only the machines are checked."),
    ] = None,
    set: Overrides = None,
    cluster: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="Also check a cluster file, such as cluster.yaml.")
    ] = None,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write the findings to this file too.")
    ] = None,
) -> None:
    """Find what would go wrong, on the cluster of RAY_ADDRESS or on this machine, within a minute; nothing changes."""
    with readable_errors():
        import shutil
        import time

        from clusterns_ray.io.files import check_writable, write_atomic
        from clusterns_ray.io.paths import check_path
        from clusterns_ray.ops.doctor.examine import as_json, examine, verdict
        from clusterns_ray.tuning.study import load_study

        json_file = json_file and Path(check_path("--json", json_file, ()))
        if json_file is not None:
            check_writable(json_file, "--json")
        began, findings = time.monotonic(), []
        typer.echo("Looking at the request and the machines, for a minute at most.")
        for finding in examine(config, set or (), load_study=load_study, cluster_file=cluster):
            findings.append(finding)
            typer.echo(finding.text(shutil.get_terminal_size().columns))
        typer.echo(verdict(findings, time.monotonic() - began))
        if json_file is not None:
            write_atomic(json_file, as_json(findings, time.monotonic() - began))
            typer.echo(f"Wrote {json_file}")
        if any(finding.level == "problem" for finding in findings):
            raise typer.Exit(1)


def repeat_swallowed_interrupts() -> None:
    """Let Control-C stop the process even where it falls into a destructor or a callback of a weak reference.

    Python prints what is raised there and goes on; SQLAlchemy has such a callback for each connection it closes.
    """
    show = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main_thread = threading.main_thread().ident or 0
            again = threading.Timer(0.1, signal.pthread_kill, (main_thread, signal.SIGINT))
            again.start()  # by then the callback has returned
        else:
            show(unraisable)

    sys.unraisablehook = hook


def main() -> None:
    """Entry point of the ``clusterns`` command. Files and pipes get UTF-8 whatever the locale; a terminal that cannot
    show a character shows its number."""
    repeat_swallowed_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    sys.exit(app())


if __name__ == "__main__":
    main()
