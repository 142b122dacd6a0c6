"""The ``clusterns`` command: one verb a job, no logic.

Exit codes: 0 done, 1 the job failed, 2 the request was wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from clusterns_ray.errors import ClusterNSError, ConfigError, DataError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train sentence embeddings without labels: ClusterNS on Ray.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as experiments/quickstart.yaml.")]
Overrides = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value; may be repeated.")
]


@contextmanager
def readable_errors() -> Iterator[None]:
    """One clear message and an exit code in place of a traceback."""
    try:
        yield
    except (ConfigError, DataError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except ClusterNSError as error:
        typer.echo(f"failed: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on from the newest checkpoint.", err=True)
        raise typer.Exit(1) from None


@app.command()
def train(config: ConfigFile, set: Overrides = None) -> None:
    """Train an encoder on plain sentences, or resume a run of that name."""
    with readable_errors():
        from clusterns_ray.config import load_config
        from clusterns_ray.launch.trainer import train as run_training
        from clusterns_ray.progress import progress_watch

        watch = progress_watch()
        try:
            result = run_training(load_config(config, set or ()), watch)
        finally:
            watch.close()
        if result["sts_dev"] is not None:
            before, after = result["sts_dev_before"], result["sts_dev"]
            typer.echo(
                f"{result['dev']} (Spearman x 100): {before:.2f} before, {after:.2f} at step {result['best_step']} "
                f"of {result['steps']} ({after - before:+.2f})."
            )
            if after <= before:
                typer.echo(
                    "Training did not improve this dev set. Is the text of its kind? Try a lower train.learning_rate, "
                    "or more text."
                )
        typer.echo(f"Wrote {result['model']}")


@app.command()
def prepare(config: ConfigFile, set: Overrides = None) -> None:
    """Tokenise the corpus, and make the structure-graded dev set where the configuration asks for one."""
    with readable_errors():
        from clusterns_ray.config import load_config
        from clusterns_ray.data import prepare as data
        from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage
        from clusterns_ray.progress import progress_watch

        watch = progress_watch()
        settings = load_config(config, set or ())
        check_data(settings)
        check_encoder(settings)
        check_storage(settings)
        try:
            prepared = data.prepare(
                settings,
                lambda text: watch({"event": "note", "text": text}),
                lambda rows: watch({"event": "tokenised", "rows": rows}),
            )
        finally:
            watch.close()
        typer.echo(data.describe(prepared.manifest))
        if settings.evaluation.sts == "structure":
            typer.echo(f"Wrote {prepared.sts_dir}/STRUCTURE/dev.jsonl (graded by document structure, not by people)")
        typer.echo(("Found " if prepared.reused else "Wrote ") + str(prepared.tokens_dir))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A run's model/, a directory, a hub id, or package:PACKAGE/SUBDIR.")],
    sts: Annotated[str, typer.Option(help="A directory of TASK/SUBSET.jsonl files.")],
    dev: Annotated[Optional[list[str]], typer.Option(help="A further TASK/SUBSET, such as STSB/dev.")] = None,
    suite: Annotated[str, typer.Option(help="What to measure: sts.")] = "sts",
    pooling: Annotated[Optional[str], typer.Option(help="Replaces the model's own.")] = None,
    max_length: Annotated[Optional[int], typer.Option(help="Replaces the model's own.")] = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Also write every figure here.")] = None,
) -> None:
    """Score an encoder on the seven STS tests."""
    with readable_errors():
        from clusterns_ray.evaluation.suite import check_suite, evaluate_model, render_sts

        check_suite(suite, sts)
        result = evaluate_model(model, sts, extra=dev or (), pooling=pooling, max_length=max_length)
        render_sts(model, result)
        if json_file is not None:
            _write_json(json_file, result)
            typer.echo(f"Wrote {json_file}")


def _write_json(path: Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {str(path)!r} cannot be written: {error.strerror}. Choose another file.") from None


def main() -> None:
    """Entry point of the ``clusterns`` command."""
    sys.exit(app())


if __name__ == "__main__":
    main()
