"""The shell of a report: words, tables and plots as one HTML file that needs no network.

It knows nothing of runs. Plots are plotly figures as JSON, drawn in the browser by the plotly.js that the plotly
package carries, gzipped here and unpacked there. Their colours are those of ``COLORS`` for the light theme; the
page's script exchanges them when the reader's theme is dark.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

import clusterns_ray
from clusterns_ray.io.files import check_writable, json_text, write_atomic

COLORS: dict[str, tuple[str, str]] = {
    "ink": ("#1c2126", "#e6e9ec"),
    "muted": ("#5a636e", "#a0a9b4"),
    "rule": ("#dfe3e7", "#343b43"),
    "paper": ("#ffffff", "#15181c"),
    "raised": ("#f5f6f8", "#1e2227"),
    "blue": ("#0b66ad", "#62b4ee"),
    "orange": ("#b84d00", "#f5a14c"),
    "green": ("#00795c", "#45c9a3"),
    "purple": ("#9c3f86", "#e09ccb"),
    "ochre": ("#846800", "#e3cf55"),
}
"""Light and dark. The five hues are darkened and lightened Okabe-Ito colours, which colour-blind readers tell apart;
each has a contrast of at least 4.5 to ``paper`` and ``raised`` in its theme."""

HUES = ("blue", "orange", "green", "purple", "ochre")


def color(name: str, opacity: float = 1.0) -> str:
    """A colour for a figure, as plotly reads it; the page's script finds its dark counterpart."""
    light = COLORS[name][0]
    if opacity == 1:
        return light
    return f"rgba({int(light[1:3], 16)}, {int(light[3:5], 16)}, {int(light[5:7], 16)}, {opacity})"


@dataclass(frozen=True)
class Link:
    """A cell of a table, or a part of one, that leads somewhere."""

    text: str
    href: str
    """``#anchor`` of this page, or a relative path"""


@dataclass(frozen=True)
class Examples:
    """A cell that holds several texts, one below the other."""

    texts: Sequence[str]


Cell = str | Link | Examples


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    text_columns: Sequence[int] = (0,)
    """numbers of the columns that hold text; the others are aligned as figures"""
    strong_rows: Sequence[int] = ()
    """numbers of the rows that the page is about"""
    cards: bool = False
    """on a narrow screen a row becomes a block with labels, rather than the table scrolling; for long texts"""
    folded: bool = False
    """shown behind its caption"""


@dataclass(frozen=True)
class Figure:
    title: str
    figure: dict[str, Any]
    """``{"data": [...], "layout": {...}}``, as plotly has it"""
    words: str = ""
    """what it shows and how to read it"""
    wide: bool = False
    """over the whole width of the page"""


@dataclass(frozen=True)
class Fold:
    """Preformatted text behind a title."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folds: Sequence[Fold] = ()
    anchor: str = ""
    """if empty, made from the title"""
    code: str = ""
    """a command, shown after the words"""
    footnotes: Sequence[str] = ()
    map: dict[str, Any] | None = None
    """what ``map.js`` draws, of one section of a page at most"""

    @property
    def id(self) -> str:
        return self.anchor or "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Fact:
    """One figure of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Warning:
    text: str
    level: Literal["problem", "note"] = "problem"
    """``problem``: what was made may be of no use. ``note``: what to keep in mind."""


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    headline: Sequence[str]
    """paragraphs"""
    sections: Sequence[Section]
    facts: Sequence[Fact] = ()
    warnings: Sequence[Warning] = ()
    footer: str = ""


def footer() -> str:
    return f"Written by clusterns {clusterns_ray.__version__}. This file is complete in itself and loads nothing."


def write_page(path: Path, page: Page) -> None:
    """Render a page into a file, in one step.

    Raises:
        ConfigError: the file cannot be written.
    """
    check_writable(path, "The report")
    write_atomic(path, render_page(page))


def render_page(page: Page) -> str:
    """The HTML. All texts are escaped, those inside the plots' JSON as well; of scripts only the page's own run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clusterns_ray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    scripts = [environment.get_template(name).render() for name in ("page.js", "map.js")]
    plotly, packed = _plotly()
    maps = [section.map for section in page.sections if section.map is not None]
    return environment.get_template("page.html").render(
        page=page,
        colors=COLORS,
        page_script=Markup(scripts[0]),
        map_script=Markup(scripts[1]),
        script_hashes=[_csp_hash(script) for script in (*scripts, plotly)],
        plotly=packed if any(section.figures for section in page.sections) else "",
        map=_packed(json_text(maps[0], indent=None)) if maps else "",
    )


def breakable(text: str) -> Markup:
    """HTML of a text whose long names and paths may break after ``.``, ``_`` and ``/``."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])(?=[^\W\d])", text))


@cache
def _plotly() -> tuple[str, str]:
    """plotly.js, and the same gzipped in base64: a third of its size."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return source, _packed(source)


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
