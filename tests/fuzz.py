"""Hostile input of every kind, by seed: configurations, settings, corpora, models, studies, runs, command lines.

    python tests/fuzz.py --cases 2000 --seed 1

Every case is one command, run in this process in a scratch directory. It must end within ``LIMIT_S`` with exit code 0,
1 or 2, without a traceback or an internal error, and where it fails with a message. A case is named by its number, and
``--only NUMBER`` runs it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from helpers import make_tiny_model, sentences, write_corpus, write_pairs

LIMIT_S = 20

CONFIG: dict[str, Any] = {
    "seed": 1,
    "encoder": {"name": "model", "max_length": 16, "pooling": "mean"},
    "data": {"corpus": "corpus.txt", "limit": 40},
    "loss": {"temperature": 0.05, "bml_weight": 0.001},
    "clustering": {"num_clusters": 4},
    "train": {"global_batch_size": 8, "shards": 2, "max_steps": 1, "learning_rate": 1e-4},
    "evaluation": {"sts": "sts", "dev": "STSB/dev", "every_steps": 1},
    "runtime": {"storage_path": "runs", "name": "fuzz", "trackers": []},
}
STUDY: dict[str, Any] = {
    "name": "fuzz",
    "base": "base.yaml",
    "set": {"train.max_steps": 2},
    "space": {
        "train.learning_rate": {"role": "scientific", "type": "float", "low": 1e-5, "high": 1e-3, "log": True},
        "clustering.num_clusters": {"role": "nuisance", "type": "choice", "choices": [0, 2, 4]},
        "loss.temperature": {"role": "nuisance", "type": "float", "low": 0.1, "high": 0.5, "step": 0.1},
    },
    "budget": {"trials": 2},
    "sampler": {"name": "tpe", "seed": 0},
    "confirmation": {"top": 1, "seeds": [7]},
}

NUMBERS = [0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**40, 1e-12, 1e-320, 1e300, float("inf"), float("nan"), -0.0, 0.5]
TEXTS = ["", " ", "no", "a\0b", "\x1b[2J", "ü" * 130, "x" * 5000, "{sentence}", "${HOME}", "${NOT_SET}", "\u202eabc"]
PATHS = [
    "s3:///x", "S3://b/x", "s3:/b", "s3://k:s@b/x", "s3://b/x?secret_key=1", "gs://", "file:x", "hf://", "foo://x",
    "~nosuchuser/x", "/dev/zero", "/dev/null", "fifo", ".", "..", "/", "none", "d/" * 3000, "n" * 256, "*", "[", "**/*",
    "package:none", "package:a/../b", "a//b", "-", "locked", "loop", "model", "corpus.txt", "/proc/self/mem", "empty",
]  # fmt: skip
RAW = [
    "2023-02-30", "2023-02-28", "0x", "0b", "0x_", "010", "1:30", "1e", "1_0", "-.inf", ".nan", "9" * 4500,
    "!!python/x y", "&a [*a]", "[" * 300, "{a: " * 300, "*none", "'", '"\\ud800"', '"\\U00ffffff"', "!!int x",
    "|\n\tx", "a: b: c", "? [x]",
    "[1, 1000000]", "[0, 0]", "[2, 1]", "{a: 1, a: 2}", "<<: 3", "=", "\0", "%TAG", "--- a\n--- b", "@x", "`x`", "~",
    "&a [x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a]",
]  # fmt: skip
LINES = [
    b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b'"', b'"""', b"\r", b"\r\n", b"\t\t", b"{", b'{"text": 1}', b'{"text": null}',
    b'{"text": ["a"]}', b"\xe9\xe8", b"\x1b[31m", b" " * 100_000, b"#" * 50_000, b"a" * 200_000, b"[" * 5000, b"NaN",
    "\u2028".encode(), b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b"-" * 1000, b"1e999",
]  # fmt: skip


class TooLong(BaseException):
    """A case did not end in time; no handler of ordinary exceptions may catch it."""


@dataclass
class Case:
    kind: str
    arguments: list[str]


class Fuzzer:
    """Makes cases and runs them in ``scratch``, the working directory."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        write_corpus(scratch / "corpus.txt", 60)
        write_pairs(scratch / "sts" / "STSB" / "dev.jsonl", 20)
        make_tiny_model(scratch / "model")
        (scratch / "base.yaml").write_text(yaml.safe_dump(CONFIG))
        (scratch / "empty").write_bytes(b"")
        os.mkfifo(scratch / "fifo")
        (scratch / "loop").symlink_to("loop")
        (scratch / "locked").mkdir(mode=0o000)
        run = scratch / "run"
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        steps = [{"step": n, "loss": 1.0 / n, "sts_dev": 50.0 + n} for n in range(1, 6)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        (run / "result.json").write_text(json.dumps({"steps": 5, "sts_dev": 55.0, "best_step": 5, "stopped": "end"}))
        (run / "environment.json").write_text(json.dumps({"python": "3.11", "workers": 1}))

    # ---- generators ---------------------------------------------------------------------------------------------

    def make(self, draw: random.Random) -> Case:
        for name in ("case.yaml", "case", "case.parquet", "case.parquet.parts", "case.model", "case.run", "runs"):
            path = self.scratch / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        kinds: dict[Callable[[random.Random], Case], int] = {
            self.config: 5, self.setting: 5, self.corpus: 3, self.model: 2, self.study: 4, self.report: 2,
            self.command: 4, self.cluster: 2,
        }  # fmt: skip
        return draw.choices(list(kinds), list(kinds.values()))[0](draw)

    def config(self, draw: random.Random) -> Case:
        self._write_yaml("case.yaml", CONFIG, draw)
        return Case("config", [*self._verb(draw), "case.yaml"])

    def setting(self, draw: random.Random) -> Case:
        from clusterns_ray.config import known_keys

        arguments = [*self._verb(draw), "base.yaml"]
        for _ in range(draw.choice((1, 1, 2))):
            key = draw.choice([*known_keys(), "train", "x", "train.x", "a.b.c", "", "." * 9, "k" * 9000])
            arguments += ["--set", f"{key}{draw.choice(['=', '=', '=', '=', '', '=='])}{self._text(draw)}"]
        return Case("setting", [_argument(argument) for argument in arguments])

    def corpus(self, draw: random.Random) -> Case:
        ending = draw.choice(["txt", "csv", "tsv", "jsonl", "json", "md", "parquet", "gz", "txt.gz"])
        texts = sentences(30, draw.randrange(9))
        if ending in ("csv", "tsv"):
            mark = "," if ending == "csv" else "\t"
            rows = ["id" + mark + "text", *(f'{n}{mark}"{text}"' for n, text in enumerate(texts))]
        elif ending in ("jsonl", "json"):
            rows = [json.dumps({"text": text}) for text in texts]
        else:
            rows = texts
        lines = [row.encode() for row in rows]
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(lines))
            lines[at] = draw.choice(
                [lines[at] + draw.choice(LINES), draw.choice(LINES), lines[at][: len(lines[at]) // 2]]
            )
        data = draw.choice([b"\n", b"\n", b"\n", b"\r", b"\r\n"]).join(lines)
        if ending == "parquet" and draw.random() < 0.7:
            data = self._parquet(draw, texts)
        data = draw.choice([data, data, self._damaged(draw, data), data.decode("utf-8", "replace").encode("utf-16")])
        name = f"case.{ending}"
        (self.scratch / name).write_bytes(data)
        if draw.random() < 0.3:
            return Case("corpus", ["encode", "model", name, "-o", "case.parquet", "--limit", "8", "--overwrite"])
        key = draw.choice(["data.corpus", "data.corpus", "data.documents"])
        more = ["--set", "data.corpus=null"] if key == "data.documents" else []
        return Case("corpus", ["prepare", "base.yaml", "--set", f"{key}={name}", *more])

    def model(self, draw: random.Random) -> Case:
        shutil.copytree(self.scratch / "model", self.scratch / "case.model")
        files = sorted(path for path in (self.scratch / "case.model").iterdir() if path.is_file())
        path = draw.choice(files)
        if path.suffix == ".json" and draw.random() < 0.7:
            values = json.loads(path.read_text())
            key = draw.choice(list(values)) if isinstance(values, dict) and values else None
            if key is not None:
                values[key] = draw.choice([None, "", -1, 0, 10**6, "gelu_fast_x", [], {}, 1e300, True, "../x"])
            path.write_text(json.dumps(values))
        elif draw.random() < 0.2:
            path.unlink()
        else:
            path.write_bytes(self._damaged(draw, path.read_bytes()))
        verbs = [
            ["encode", "case.model", "corpus.txt", "-o", "case.parquet", "--limit", "4"],
            ["plan", "base.yaml", "--set", "encoder.name=case.model"],
            ["prepare", "base.yaml", "--set", "encoder.name=./case.model"],
        ]
        return Case("model", draw.choice(verbs))

    def study(self, draw: random.Random) -> Case:
        self._write_yaml("case.yaml", STUDY, draw)
        arguments = ["tune", "case.yaml", "--status"]
        if draw.random() < 0.2:
            key = draw.choice(["budget.trials", "sampler.seed", "train.epochs", "name", "space.train.epochs.low"])
            arguments += ["--set", _argument(f"{key}={self._text(draw)}")]
        return Case("study", arguments)

    def report(self, draw: random.Random) -> Case:
        shutil.copytree(self.scratch / "run", self.scratch / "case.run")
        path = draw.choice(sorted((self.scratch / "case.run").iterdir()))
        if draw.random() < 0.3:
            path.write_bytes(draw.choice(LINES))
        elif draw.random() < 0.3 and path.suffix == ".json":
            path.write_text(
                json.dumps(draw.choice([[], 3, None, {"steps": "x"}, {"steps": None, "sts_dev": "y"}, "z"]))
            )
        else:
            path.write_bytes(self._damaged(draw, path.read_bytes()))
        return Case("report", ["report", "case.run", "-o", "case.html"])

    def command(self, draw: random.Random) -> Case:
        odd = lambda: _argument(draw.choice([*PATHS, *TEXTS, *map(str, NUMBERS)]))  # noqa: E731
        commands = [
            ["plan", "base.yaml", "--workers", draw.choice(["1,,2", "0", "1e9", "²", "9" * 5000, ",", "1,2,4", "-1"])],
            ["plan", "base.yaml", draw.choice(["--price", "--tflops", "--sentences"]), odd()],
            ["plan", "base.yaml", draw.choice(["--bandwidth", "--latency"]), draw.choice(["1e400GB/s", "0s", odd()])],
            ["plan", odd(), "--json", odd()],
            ["encode", odd(), "corpus.txt", "-o", "case.parquet"],
            ["encode", "model", odd(), "-o", "case.parquet", "--limit", "4"],
            ["encode", "model", "corpus.txt", "-o", odd() + "/x", "--limit", "4"],
            ["encode", "model", "corpus.txt", "-o", "case.parquet", draw.choice(
                ["--limit", "--batch-size", "--max-length", "--pooling", "--dtype", "--text-column"]), odd()],
            ["search", "model", "corpus.txt", odd(), "--index", odd() + "/x", "--limit", "4"],
            ["search", "model", odd(), "query", "-k", draw.choice(["0", "-1", "3", str(10**30)]), "--limit", "4"],
            ["evaluate", "model", draw.choice(["--sts", "--transfer", "--clusters", "--json", "--dev"]), odd()],
            ["evaluate", odd(), "--suite", "geometry"],
            ["report", odd(), odd()],
            ["report", "run", "-o", odd()],
            ["prepare", odd()],
            ["train", odd()],
            ["tune", odd(), "--status"],
            [odd()],
            ["train", "base.yaml", "--set", "train.shards=3", "--set", odd()],
        ]  # fmt: skip
        return Case("command", draw.choice(commands))

    def cluster(self, draw: random.Random) -> Case:
        root = Path(__file__).parent.parent
        text = draw.choice([root / "cluster.yaml", *sorted((root / "experiments/clusters").glob("*.yaml"))]).read_text()
        lines = text.splitlines()
        for _ in range(draw.choice((1, 1, 3))):
            at = draw.randrange(len(lines))
            lines[at] = draw.choice(["", f"x: {draw.choice(RAW)}", lines[at] + " " + draw.choice(RAW), " " + lines[at]])
        (self.scratch / "case.yaml").write_text("\n".join(lines), errors="surrogateescape")
        return Case("cluster", ["cluster", "case.yaml"])

    # ---- parts --------------------------------------------------------------------------------------------------

    def _verb(self, draw: random.Random) -> list[str]:
        return draw.choice([["prepare"], ["prepare"], ["plan"], ["plan"], ["train"]])

    def _text(self, draw: random.Random) -> str:
        return draw.choice([*RAW, *PATHS, *TEXTS, *map(str, NUMBERS)])

    def _write_yaml(self, name: str, values: dict[str, Any], draw: random.Random) -> None:
        values = copy.deepcopy(values)
        for _ in range(draw.choice((1, 1, 1, 2))):
            self._mutate(values, draw)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if draw.random() < 0.4:  # what no dumper writes
            lines = text.splitlines()
            at = draw.randrange(len(lines))
            lines[at] = draw.choice([
                lines[at].partition(":")[0] + ": " + draw.choice(RAW), lines[at] + "\n" + lines[at], "\t" + lines[at],
                lines[at] + draw.choice(RAW), draw.choice(RAW),
            ])  # fmt: skip
            text = "\n".join(lines)
        data = text.encode("utf-8", "surrogatepass")
        (self.scratch / name).write_bytes(self._damaged(draw, data) if draw.random() < 0.1 else data)

    def _mutate(self, values: Any, draw: random.Random) -> None:
        node = values
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.85:
                node = node[key]
                continue
            if isinstance(node, dict) and draw.random() < 0.15:
                node[draw.choice([f"{key}x", 1, None, "", "k" * 3000, True])] = node.pop(key)
            else:
                odd = [*NUMBERS, *TEXTS, *PATHS, None, True, [], {}, [1, 10**6], [["x"]], {"low": 1}, list(range(3000))]
                node[key] = draw.choice(odd)
            return

    def _damaged(self, draw: random.Random, data: bytes) -> bytes:
        at = draw.randrange(len(data) + 1)
        return draw.choice(
            [data[:at], data[:at] + draw.choice(LINES) + data[at:], data[:at] + b"\0" * (len(data) - at), b"", data * 2]
        )

    def _parquet(self, draw: random.Random, texts: list[str]) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: list[list[Any]] = [
            texts,
            [None] * len(texts),
            list(range(len(texts))),
            [[t] for t in texts],
            [b"\xff"] * 30,
        ]
        names = draw.choice([["text"], ["text", "text"], ["Text"], ["text", "other"], [""]])
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays([pa.array(draw.choice(columns)) for _ in names], names=names), sink)
        return sink.getvalue().to_pybytes()

    # ---- running ------------------------------------------------------------------------------------------------

    def run(self, case: Case) -> str | None:
        """What is wrong with how the command ended; None where it ended well."""
        from clusterns_ray import cli
        from clusterns_ray.models import resolve as models

        models.staged.clear()
        try:
            with time_limit(LIMIT_S):
                if case.kind == "cluster":
                    return self._check_cluster()
                result = CliRunner().invoke(cli.app, case.arguments)
        except TooLong:
            return f"took more than {LIMIT_S} s"
        except BaseException as error:
            return f"raised {error!r:.300}"
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return f"raised {result.exception!r:.300}"
        if result.exit_code not in (0, 1, 2):
            return f"exit code {result.exit_code}"
        if "Traceback" in result.output or "internal error" in result.output:
            return f"said {result.output[-500:]}"
        if result.exit_code and len(result.output.strip()) < 20:
            return f"failed with {result.output!r}"
        return None

    def _check_cluster(self) -> str | None:
        from clusterns_ray.errors import ConfigError
        from clusterns_ray.ops.cluster_lint import check_cluster_file

        with contextlib.suppress(ConfigError):
            check_cluster_file("case.yaml")
        return None


def _argument(text: str) -> str:
    """What a shell can pass: no NUL."""
    return text.replace("\0", "")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong after this many seconds of computing, or ten times as many of waiting, as a machine may be busy."""
    computed, began = time.process_time(), time.monotonic()

    def stop(*given: object) -> None:
        if time.process_time() - computed > seconds or time.monotonic() - began > 10 * seconds:
            raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """An empty working directory, without a network, in which a run starts no Ray."""
    before, offline = Path.cwd(), {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "RAY_ADDRESS": "127.0.0.1:1"}
    saved = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.update(offline)
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(saved)
            (Path(name) / "locked").chmod(0o700)


def fuzz(numbers: range, seed: int) -> tuple[list[str], Counter[str], float]:
    """Run cases by number: what went wrong, how many there were of each kind, and the longest time."""
    wrong, counts, longest = [], Counter[str](), 0.0
    with scratch_directory() as scratch:
        fuzzer = Fuzzer(scratch)
        for number in numbers:
            case = fuzzer.make(random.Random(f"{seed}/{number}"))
            counts[case.kind] += 1
            began = time.monotonic()
            problem = fuzzer.run(case)
            longest = max(longest, time.monotonic() - began)
            if problem is not None:
                shown = [argument[:80] for argument in case.arguments]
                wrong.append(f"case {number} ({case.kind}) {shown}: {problem}")
                print(wrong[-1], flush=True)
                file = scratch / "case.yaml"
                if file.exists() and case.kind in ("config", "study", "cluster"):
                    print("  " + ascii(file.read_bytes()[:1500]), flush=True)
    return wrong, counts, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run one case")
    given = parser.parse_args()
    numbers = range(given.cases) if given.only is None else range(given.only, given.only + 1)
    began = time.monotonic()
    wrong, counts, longest = fuzz(numbers, given.seed)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(
        f"{len(numbers)} cases ({kinds}) in {time.monotonic() - began:.0f} s, the longest {longest:.1f} s: "
        f"{len(wrong)} wrong"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
