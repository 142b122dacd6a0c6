"""Values of a cluster file that stand for one's own: ``my-project``, ``<bucket>``, ``registry.example.com``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from clusterns_ray.ops.doctor.findings import Finding, problem

_NOUN = (
    r"(?:project|bucket|registry|repo|repository|image|account|org|organi[sz]ation|company|team|zone|region|subnet|vpc"
    r"|network|role|profile|service[-_]?account|domain|id)"
)
_PLACEHOLDER = re.compile(
    rf"(?<![\w.$-])(?:my|some|example)[-_]?{_NOUN}(?:[-_](?:id|name))?(?![\w-])"  # my-project, mybucket
    r"|(?<![\w$])your[-_]\w[\w-]*"  # your-bucket, YOUR_PROJECT_ID
    r"|<[a-z][\w./-]*(?: [\w./-]+)*>"  # <project>, <your bucket>
    r"|\{\{.*?\}\}"  # {{ project }}
    r"|(?<![a-z])(?:change|replace|fill)[-_ ]?(?:me|this|in)(?![a-z])|(?<![a-z])placeholder(?![a-z])"
    r"|(?<![\w-])(?:todo|fixme|tbd)(?![\w-])"
    r"|(?<![\w.-])(?:[\w-]+\.)*example\.(?:com|org|net)(?!\w)|(?<=\w)\.(?:example|invalid)(?![\w.-])"
    r"|(?<![a-z0-9])x{3,}(?![a-z0-9])"  # subnet-xxxxxxxx
    r"|(?<!\d)123456789012(?!\d)|-0?123456789[0-9a-f]*(?!\w)"  # the ids of cloud manuals
    r"|(?<=://)(?:my)?bucket(?=/|$)|(?<=://)\.{3}",
    re.IGNORECASE,
)
# Names of buckets and projects are written in small letters, so capitals stand for one.
_CAPITALS = re.compile(
    r"(?<=://)[A-Z][A-Z0-9_-]*(?=/|$)|^(?:[A-Z]+_)*(?:PROJECT|BUCKET|ACCOUNT|REGISTRY|REGION|ZONE)(?:_ID|_NAME)?$"
)


def check_placeholders(text: str) -> list[Finding]:
    """A problem for each value that has to be replaced before the file can be used, with its key and its lines.

    Args:
        text: YAML that can be parsed, of one document or several.
    """
    lines: dict[str, list[int]] = {}
    places: dict[str, str] = {}
    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        for place, node in _scalars(document, "", set()):
            if _PLACEHOLDER.search(node.value) or _CAPITALS.search(node.value):
                places.setdefault(node.value, place)
                lines.setdefault(node.value, []).append(node.start_mark.line + 1)
    return [_finding(value, places[value], numbers) for value, numbers in lines.items()]


def _finding(value: str, place: str, lines: list[int]) -> Finding:
    match = _PLACEHOLDER.search(value) or _CAPITALS.search(value)
    assert match is not None
    word = next((word for word in value.split() if match[0] in word), match[0])
    what = f"{word!r} is a placeholder" if word == match[0] else f"{word!r} holds the placeholder {match[0]!r}"
    where = f"line{'s'[: len(lines) != 1]} {', '.join(map(str, lines))}"
    return problem(place, f"{what} ({where})", f"Replace {match[0]} with your own value.")


def _scalars(node: yaml.Node | None, place: str, seen: set[int]) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every value with its keys, such as ``provider.project_id``; one that an anchor shares, once."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield place, node
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(value, f"{place}.{key.value}".lstrip("."), seen)
    else:
        for number, value in enumerate(node.value):
            yield from _scalars(value, f"{place}.{number}".lstrip("."), seen)
