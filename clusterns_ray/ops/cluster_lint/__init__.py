"""Checks of a cluster file, for Ray's launcher, KubeRay or SkyPilot, before it costs anything."""

from __future__ import annotations

from pathlib import Path

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.paths import check_path
from clusterns_ray.io.yaml_text import load_foreign_yaml, read_yaml_text
from clusterns_ray.ops.cluster_lint.common import pinned_versions
from clusterns_ray.ops.cluster_lint.kubernetes import check_documents
from clusterns_ray.ops.cluster_lint.launcher import check_launcher
from clusterns_ray.ops.cluster_lint.placeholders import check_placeholders
from clusterns_ray.ops.cluster_lint.skypilot import check_task
from clusterns_ray.ops.doctor.findings import Finding


def check_cluster_file(path: str | Path) -> list[Finding]:
    """The problems and warnings about a cluster file; none where nothing is wrong with it.

    Nothing outside this machine is asked, so what the cloud itself would refuse is not found.

    Raises:
        ConfigError: it cannot be read, or is not a cluster file.
    """
    path = Path(check_path("The cluster file", path, ())).expanduser()
    text = read_yaml_text("The cluster file", path)
    documents = [
        document for document in load_foreign_yaml(text, f"The cluster file {str(path)!r}") if document is not None
    ]
    pinned = pinned_versions(path)
    if documents and all(isinstance(document, dict) and "kind" in document for document in documents):
        return check_placeholders(text) + check_documents(documents, pinned)
    only = documents[0] if len(documents) == 1 and isinstance(documents[0], dict) else {}
    if "provider" not in only and not {"resources", "run"} <= only.keys():
        raise ConfigError(
            f"The cluster file {str(path)!r} is neither one for `ray up`, which has a `provider`, nor a list of "
            "Kubernetes documents, which have a `kind`, nor a task of SkyPilot, which has `resources` and `run`. See "
            "cluster.yaml and experiments/clusters/."
        )
    if "provider" not in only:
        return [*check_placeholders(text), *check_task(only)]
    return check_placeholders(text) + check_launcher(only, pinned)
