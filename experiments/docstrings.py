"""Make a second corpus of documents from what is installed: the prose of docstrings, a document for each module.

    python experiments/docstrings.py runs/docstrings.jsonl

Technical English of several authors, another kind of text than the quickstart's encyclopedia: for
experiments/methods/docstrings.yaml. The text depends on the versions of the packages, which constraints.txt fixes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io.files import write_atomic

PACKAGES = ["numpy", "scipy", "sklearn", "pandas", "torch", "sympy", "networkx"]
SKIPPED = {"tests", "testing", "_inductor", "externals", "_vendor"}
LEAST_PARAGRAPHS = 4
"""Of a document: in shorter ones there is little to compare."""

MARKUP = [
    (re.compile(pattern), by) for pattern, by in ((r":[\w:]+:`~?([^`<]+?)(?: <[^`]*>)?`", r"\1"), (r"`+|\*+", ""))
]
CODE = re.compile(r">>>|^\.\. |^[-=~^]{3,}|^[:*+|]|\\[a-z]+\{|^\S+ : ", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    a = parser.parse_args()
    documents = [document for package in a.packages for document in documents_of(package)]
    lines = [json.dumps({"title": title, "text": text}) for title, text in documents]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(a.out, "".join(f"{line}\n" for line in lines))
    print(f"{len(lines):,} documents of {', '.join(a.packages)} in {a.out}")


def documents_of(package: str) -> Iterator[tuple[str, str]]:
    """Title and text of each module: its own docstring, then those of its classes and functions as sections.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{package} is not an installed package. Install it, or leave it out of --packages.")
    folder = Path(spec.submodule_search_locations[0])
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if SKIPPED.intersection(path.parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # invalid escapes of other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
        sections, count = [], 0
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            prose = [text for text in paragraphs(ast.get_docstring(node) or "") if text not in seen]
            seen.update(prose)
            count += len(prose)
            if prose:
                sections.append("\n\n".join([f"# {getattr(node, 'name', path.stem)}", *prose]))
        if count >= LEAST_PARAGRAPHS:
            yield ".".join(path.relative_to(folder.parent).with_suffix("").parts), "\n\n".join(sections)


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are prose: whole sentences, without code, tables and names of arguments."""
    kept = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = block.split("\n")
        if len({len(line) - len(line.lstrip()) for line in lines}) > 1 or CODE.search(inspect.cleandoc(block)):
            continue
        text = " ".join(line.strip() for line in lines)
        for pattern, by in MARKUP:
            text = pattern.sub(by, text)
        if text.endswith((".", "?", "!")) and text[0].isupper():
            kept.append(text)
    return kept


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
