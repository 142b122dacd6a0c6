"""Values of a cluster file that stand for one's own: ``my-project``, ``<bucket>``, ``registry.example.com``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import yaml

from clusterns_ray.ops.doctor.findings import Finding

# Not of names that are free to choose, such as a cluster's.
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
# Names of buckets and projects are written small, so these stand for one.
_CAPITALS = re.compile(
    r"(?<=://)[A-Z][A-Z0-9_-]*(?=/|$)|^(?:[A-Z]+_)*(?:PROJECT|BUCKET|ACCOUNT|REGISTRY|REGION|ZONE)(?:_ID|_NAME)?$"
)

_REMEDIES: tuple[tuple[str, str], ...] = (
    (r"s3://|gs://", "a bucket that the cluster's machines may read and write, such as s3://BUCKET/PREFIX with yours"),
    (r"\bimage\b", "the image that you built and pushed, as REGISTRY/NAME:TAG"),
    (r"email|gserviceaccount", "the e-mail address of the service account that the workers run as"),
    (r"project", "the id of your Google Cloud project (`gcloud config get project` shows it)"),
    (r"IamInstanceProfile|Arn\b|account", "the role or account of yours that the machines run as"),
    (r"Subnet|VpcId|zone|region|network", "the one of your cloud account that the machines are to be in"),
)


def check_placeholders(text: str) -> list[Finding]:
    """A problem for each value that has to be replaced before the file can be used, with its keys and its lines.

    Args:
        text: YAML that can be parsed, of one document or several.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for place, node in _scalars(text):
        if _PLACEHOLDER.search(node.value) or _CAPITALS.search(node.value):
            found.setdefault(node.value, (place, []))[1].append(node.start_mark.line + 1)
    return [_finding(value, place, lines) for value, (place, lines) in found.items()]


def _finding(value: str, place: str, lines: list[int]) -> Finding:
    match = _PLACEHOLDER.search(value) or _CAPITALS.search(value)
    assert match is not None
    remedy = next((words for pattern, words in _REMEDIES if re.search(pattern, f"{place}: {value}")), "your own value")
    word = next((word for word in value.split() if match[0] in word), match[0])
    what = f"{word!r} is a placeholder" if word == match[0] else f"{word!r} holds the placeholder {match[0]!r}"
    where = f"line{'s'[: len(lines) != 1]} {', '.join(map(str, lines))}"
    return Finding("problem", place, f"{what} ({where})", f"Replace it with {remedy}.")


def _scalars(text: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every value with its keys, such as ``provider.project_id``; one that is shared by an anchor, once."""
    seen: set[int] = set()

    def walk(node: yaml.Node, keys: tuple[str, ...]) -> Iterable[tuple[str, yaml.ScalarNode]]:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield ".".join(keys), node
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, (*keys, str(key.value)))
        else:
            for number, value in enumerate(node.value):
                yield from walk(value, (*keys, str(number)))

    for document in yaml.compose_all(text, Loader=yaml.SafeLoader):
        if document is not None:
            yield from walk(document, _name(document))


def _name(document: yaml.Node) -> tuple[str, ...]:
    """The kind and name of a Kubernetes document, as the other findings have them; nothing of another file."""
    values = {str(key.value): value for key, value in document.value} if isinstance(document, yaml.MappingNode) else {}
    metadata = values.get("metadata")
    names = (
        {str(key.value): value.value for key, value in metadata.value} if isinstance(metadata, yaml.MappingNode) else {}
    )
    kind = values.get("kind")
    return (f"{kind.value}/{names.get('name', '?')}",) if isinstance(kind, yaml.ScalarNode) else ()
