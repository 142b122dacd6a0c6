"""YAML as this project reads it: numbers as everybody expects them, and nothing that could hang or be misread.

Dates are plain text, ``1e-3`` is a number, and what YAML reads differently from what it looks like (``010`` is 8) is
refused. Size, depth, the nodes that aliases multiply to, and the length of a number have limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.paths import check_regular_file

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_NODES = 20_000
"""Scalars, lists and mappings of a file, those that aliases repeat counted each time."""
MAX_DIGITS = 100

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "!leading-zero"
_TOO_DEEP = f"it is nested deeper than {MAX_DEPTH} levels"
_TOO_LARGE = f"it holds more than {MAX_NODES:,} values, aliases followed"


class LimitError(yaml.MarkedYAMLError):
    """YAML that is refused for what it holds, though its syntax may be right."""


def load_yaml(text: str, source: str) -> Any:
    """The one document of a text as plain values; None where there is none.

    Raises:
        ConfigError: it is not YAML, or over a limit; one line that begins with ``source``.
    """
    return _load(text, source, YamlLoader)[0]


def load_setting(text: str, source: str) -> Any:
    """:func:`load_yaml` of a value from the command line; what is not YAML is the text itself.

    Raises:
        ConfigError: it is over a limit, has a key twice, or a tag.
    """
    try:
        return _load(text, source, YamlLoader, LimitError)[0]
    except yaml.YAMLError:
        return text


def load_foreign_yaml(text: str, source: str) -> list[Any]:
    """The documents of a file that other programs read too, with YAML 1.1's octal numbers.

    Raises:
        ConfigError: as of :func:`load_yaml`.
    """
    return _load(text, source, LimitedLoader)


def read_yaml_text(key: str, path: str | Path, remedy: str = "Give a YAML file.") -> str:
    """The text of a YAML file.

    Args:
        remedy: what to do where none can be read there.

    Raises:
        ConfigError: it is no regular file, cannot be read, is too large, or not UTF-8.
    """
    check_regular_file(key, path, remedy)
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{key} {str(path)!r} cannot be read: {error.strerror}.", "Make it readable.") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{key} {str(path)!r} is larger than {MAX_BYTES // 1024} KiB, so it is no YAML file of settings.",
            "Check the path.",
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key} {str(path)!r} is not UTF-8 ({error}).", "Save it as UTF-8.") from None


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that :func:`load_yaml` reads back."""
    return yaml.dump(value, Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


class LimitedLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, with limits, and with duplicate keys and foreign tags refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way
        first: [item for item in resolvers if item[0] != _TAG + "timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", _TAG + "str"):
            raise LimitError(problem=f"the tag {tag} is not read; write the value", problem_mark=event.start_mark)
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            raise LimitError(problem=_TOO_DEEP, problem_mark=event.start_mark)
        if self._nodes > MAX_NODES:
            raise LimitError(problem=_TOO_LARGE, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_document(self) -> Any:
        node = super().compose_document()
        _check_size(node, {}, ())
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # as it is written: what is merged in later may be given anew
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen and key.tag != _TAG + "merge":
                    raise LimitError(problem=f"the key {key.value[:100]!r} is there twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if node.tag in (_TAG + "int", _TAG + "float") and len(value) > MAX_DIGITS:
            raise LimitError(problem=f"there is a number of {len(value):,} characters", problem_mark=node.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise LimitError(problem="there is half a character (a lone surrogate)", problem_mark=node.start_mark)
        return value


class YamlLoader(LimitedLoader):
    """The loader of our own files: ``1e-3`` is a number, ``1:30`` a text, and ``010`` is refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [item for item in resolvers if item[0] not in (_TAG + "int", _TAG + "float")]
        for first, resolvers in LimitedLoader.yaml_implicit_resolvers.items()
    }

    def construct_number(self, node: Any) -> int:
        return int(self.construct_scalar(node).replace("_", ""), 0)

    def refuse_number(self, node: Any) -> Any:
        sign, digits = "-" * (node.value[0] == "-"), node.value.lstrip("+-0_") or "0"
        raise LimitError(
            problem=f"{node.value[:99]} begins with 0, which some read as octal; write {sign}{digits[:99]} or quote it",
            problem_mark=node.start_mark,
        )


_SIGNS_AND_DIGITS = list("-+0123456789")
YamlLoader.add_implicit_resolver(
    _TAG + "int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)$"),
    _SIGNS_AND_DIGITS,
)
YamlLoader.add_implicit_resolver(_AMBIGUOUS, re.compile(r"^[-+]?0[0-9_]+$"), _SIGNS_AND_DIGITS)
YamlLoader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    [*_SIGNS_AND_DIGITS, "."],
)
YamlLoader.add_constructor(_TAG + "int", YamlLoader.construct_number)
YamlLoader.add_constructor(_AMBIGUOUS, YamlLoader.refuse_number)


class YamlDumper(yaml.SafeDumper):
    """Quotes the texts that :class:`YamlLoader` would not read as text."""


YamlDumper.yaml_implicit_resolvers = YamlLoader.yaml_implicit_resolvers


def _load(
    text: str, source: str, kind: type[LimitedLoader], refused: type[yaml.YAMLError] = yaml.YAMLError
) -> list[Any]:
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source} is YAML of more than {MAX_BYTES // 1024} KiB.", "Shorten it.")
    try:
        loader = kind(text)
        try:
            if kind is YamlLoader:
                return [loader.get_single_data()]
            return list(_documents(loader))
        finally:
            loader.dispose()
    except refused as error:
        raise ConfigError(f"{source} is not YAML that can be read: {_reason(error)}.", "Correct that place.") from None
    except (ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        # PyYAML lets some of Python's own errors through, such as for "\U00FFFFFF" and `!!int x`.
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source} is not YAML that can be read: a value is impossible ({reason}).") from None


def _documents(loader: LimitedLoader) -> Iterator[Any]:
    while loader.check_data():
        yield loader.get_data()


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = str(error.problem or error.context)
        reason = where + (f"{error.context} {problem}" if problem.startswith("but ") else problem)
        return reason + ("; indent with spaces" if r"'\t'" in reason else "")
    return " ".join(str(error).replace('in "<unicode string>",', "at").split())


def _check_size(node: Any, sizes: dict[int, tuple[int, int]], path: tuple[int, ...]) -> tuple[int, int]:
    """Nodes and levels at and below ``node``, with aliases followed.

    Raises:
        LimitError: over a limit, or an alias lies in what it stands for.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) in path:
        raise LimitError(problem="an alias stands for something that holds the alias", problem_mark=node.start_mark)
    if id(node) not in sizes:
        inner = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        below = [_check_size(part, sizes, (*path, id(node))) for part in inner]
        sizes[id(node)] = 1 + sum(count for count, _ in below), 1 + max((depth for _, depth in below), default=0)
    count, depth = sizes[id(node)]
    if count > MAX_NODES:
        raise LimitError(problem=_TOO_LARGE, problem_mark=node.start_mark)
    if len(path) + depth > MAX_DEPTH:
        raise LimitError(problem=_TOO_DEEP, problem_mark=node.start_mark)
    return sizes[id(node)]
