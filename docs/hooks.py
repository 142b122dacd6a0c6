"""Make pages from the code while MkDocs builds the site, so that they cannot go stale; none of them is kept.

The configuration comes from the pydantic tree, the command line from typer, the list of modules from their docstrings.
Formulas become MathML, which browsers show without a script. Other pages are files outside this folder.
"""

from __future__ import annotations

import ast
import html
import logging
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clusterns_ray"
MATHEMATICS = ("losses", "clustering.kmeans")
EVENTS = ("io.events", "tuning.events")
"""Modules that are on the API page, besides the public names."""
log = logging.getLogger("mkdocs.hooks.clusterns_ray")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    pages = {
        "reference/configuration.md": configuration_page(),
        "reference/study.md": study_page(),
        "reference/cli.md": command_line_page(),
        "reference/api.md": api_page(),
        "reference/modules.md": modules_page(),
        "contributing.md": outside_page(ROOT / "CONTRIBUTING.md"),
        "changelog.md": outside_page(ROOT / "CHANGELOG.md"),
        "log.md": outside_page(ROOT / "experiments/LOG.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def outside_page(path: Path) -> str:
    """A Markdown file of the repository, with its links to docs/ made those of the site."""
    return re.sub(r"\]\((?:\.\./)?docs/", "](", path.read_text(encoding="utf-8"))


def configuration_page() -> str:
    """Every key with its type, default, bounds and meaning, by section."""
    from clusterns_ray.config import Config, Section

    lines = [
        "# Configuration",
        "",
        "Every key, made from `clusterns_ray/config.py`. A file holds those that differ from the default;",
        "`--set section.key=value` changes one on the command line, and `${NAME}` in a text is the environment",
        "variable of that name. Unknown keys and impossible values are refused by name before anything starts.",
        "",
        "All keys but the section `runtime` and `data.cache_dir` are part of a run's identity. The same name with",
        "another identity is refused.",
    ]
    for name, field in Config.model_fields.items():
        lines += heading(name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines += paragraph(section.__doc__)
            for key, inner in section.model_fields.items():
                lines += key_entry(f"{name}.{key}", inner)
        else:
            lines += key_entry(name, field)
    return "\n".join(lines)


def study_page() -> str:
    """Every key of a study file, the samplers, schedulers and parameters by their names."""
    from clusterns_ray.tuning import space, study

    lines = [
        "# Study files",
        "",
        "Every key of a study, made from `clusterns_ray/tuning/study.py` and `space.py`. `--set` changes the study's",
        "own keys (`budget.trials=4`) as well as those of its base configuration (`train.max_steps=8`).",
        *heading("The study", "study"),
    ]
    for key, field in study.StudyConfig.model_fields.items():
        lines += key_entry(key, field)
    titles = {
        "budget": [study.BudgetConfig],
        "stop": [study.StopConfig],
        "race": [study.RaceConfig],
        "confirmation": [study.ConfirmationConfig],
        "sampler": [study.ModelSampler, study.PlainSampler],
        "scheduler": [study.ASHAScheduler, study.MedianScheduler, study.NoScheduler],
        "space.KEY": [space.IntParameter, space.FloatParameter, space.ChoiceParameter, space.FixedParameter],
    }
    for title, models in titles.items():
        lines += heading(title, f"{title}-keys")
        for model in models:
            kind = next((name for name in ("name", "type", "role") if name in model.model_fields), None)
            if len(models) > 1 and kind:
                lines += ["", f"### {kind}: {', '.join(get_args(model.model_fields[kind].annotation))}", ""]
                lines += paragraph(model.__doc__)
            for key, field in model.model_fields.items():
                if len(models) == 1 or key != kind:
                    lines += key_entry(f"{title}.{key}" if len(models) == 1 else key, field, len(models) == 1)
    return "\n".join(lines)


def heading(title: str, anchor: str | None = None) -> list[str]:
    """A section's heading, with an anchor of its own; the title if not given."""
    return ["", f"## {title} {{ #{anchor or title} }}", ""]


def paragraph(docstring: str | None) -> list[str]:
    return [" ".join(docstring.split()), ""] if docstring else []


def key_entry(key: str, field: Any, anchor: bool = True) -> list[str]:
    """A definition-list entry of one key."""
    from clusterns_ray.config import Section, shown

    facts = [type_text(field.annotation)]
    if field.is_required():
        facts.append("required")
    else:
        default = field.get_default(call_default_factory=True)
        text = "unset" if default is None else shown(default).strip("'")
        if isinstance(default, Section):
            text = getattr(default, "name", "its own defaults")
        facts.append(f"default `{text}`")
    for part in field.metadata:
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if (limit := getattr(part, name, None)) is not None:
                facts.append(f"{words} {limit:,}")
    meaning = " ".join((field.description or "").split())
    if not meaning:
        log.warning("%s has no docstring", key)
    return [f"`{key}`" + (f" {{ #{key} }}" if anchor else ""), f":   *{'; '.join(facts)}*  ", f"    {meaning}", ""]


def type_text(kind: Any) -> str:
    """The name of a type, in the words of someone who writes YAML."""
    names = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        Any: "any value",
        dict: "keys and values",
    }
    if kind in names:
        return names[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return listed([f"`{value}`" for value in arguments])
    if origin in (Union, UnionType):
        parts = [type_text(part) for part in arguments if part is not NoneType]
        return listed(list(dict.fromkeys(parts)))
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(type_text(part) for part in arguments) + "]"
    if origin is dict:
        return "keys and values"
    return "a section of its own"


def listed(parts: list[str]) -> str:
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def command_line_page() -> str:
    """What ``clusterns --help`` and each verb's ``--help`` say."""
    import typer
    from typer.cli import get_docs_for_click

    from clusterns_ray.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="clusterns"), name="clusterns")
    text = text.replace("# `clusterns`", "# Command line", 1)
    text = re.sub(r"^## `clusterns (\w+)`$", r"## clusterns \1 { #\1 }", text, flags=re.M)
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        text = re.sub(
            rf"^\* `{name}`: .*", f"* [`clusterns {name}`](#{name}): {' '.join(verb.help.split())}", text, flags=re.M
        )
    return re.sub(r"<(?=[A-Z])", "&lt;", text)  # label<TAB>sentence is no HTML


def api_page() -> str:
    """The names that ``clusterns_ray`` exports, and the functions that define the method."""
    import clusterns_ray

    lines = [
        "# Python API",
        "",
        "What `import clusterns_ray` offers, with examples under [From Python](../python.md). Each name is imported",
        "when it is first used. Arrays have shape suffixes: B is the batch, D the width of an embedding, K the number",
        "of clusters, N a number of sentences.",
    ]
    for name in clusterns_ray._HOMES:
        lines += ["", f"::: clusterns_ray.{name}"]
        if name == "Encoder":
            lines += ["    options: {members: [load, for_training, encode, encode_ids, save]}"]
    sections = {
        "Events": ("What the functions above pass to `on_event`, so that a program can follow their work.", EVENTS),
        "The method, as pure functions": (
            "Tensors in, tensors out, in any floating-point type: what the workers compute together.",
            MATHEMATICS,
        ),
    }
    for title, (about, modules) in sections.items():
        lines += ["", f"## {title}", "", about]
        for module in modules:
            lines += ["", f"::: clusterns_ray.{module}", "    options: {heading_level: 3}"]
    return "\n".join(lines)


def modules_page() -> str:
    """Each module and the first sentence of its docstring, in the order in which imports point down."""
    lines = [
        "# Modules",
        "",
        "From the top down: a module imports only from its own layer and from those below it.",
        "`tests/unit/test_imports.py` holds the order.",
    ]
    for layer in reversed(layers()):
        for name in sorted(layer - {"__init__"}):
            path = PACKAGE / name
            lines += heading(name)
            if not path.is_dir():
                lines.append(first_sentence(path.with_suffix(".py")))
                continue
            lines += [first_sentence(path / "__init__.py"), ""]
            for module in sorted(set(path.rglob("*.py")) - {path / "__init__.py"}):
                lines.append(f"* `{module.relative_to(path)}`: {first_sentence(module)}")
    return "\n".join(lines)


def layers() -> list[set[str]]:
    """``LAYERS`` of the test that holds the order of imports, read without importing it."""
    tree = ast.parse((ROOT / "tests/unit/test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "LAYERS" and node.value:
            return ast.literal_eval(node.value)
    raise LookupError("tests/unit/test_imports.py has no LAYERS.")


def first_sentence(path: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    if not text:
        log.warning("%s has no docstring", path)
    return text.replace("``", "`")


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas that arithmatex marked into MathML, and Sphinx's roles in docstrings into plain code."""
    content = re.sub(
        r":(?:attr|class|data|func|meth|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", content
    )
    formula = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
    return formula.sub(
        lambda match: convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline"), content
    )
