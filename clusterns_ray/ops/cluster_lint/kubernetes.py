"""KubeRay documents, checked without a Kubernetes at hand: idle workers, caps, authentication, versions, draining.

Field names: KubeRay API reference, ``ray.io/v1``, of KubeRay 1.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from clusterns_ray.ops.cluster_lint.common import WATCHER, check_image, is_count, listing, mapping
from clusterns_ray.ops.doctor.findings import Finding, problem


def check_documents(documents: Iterable[Mapping[str, Any]], pinned: Mapping[str, str]) -> list[Finding]:
    """The findings about RayCluster and RayJob documents; others may be with them."""
    findings: list[Finding] = []
    kinds = set()
    for document in documents:
        kind, spec = document.get("kind"), mapping(document.get("spec"))
        name = f"{kind}/{mapping(document.get('metadata')).get('name', '?')}"
        if kind == "RayCluster":
            findings += _check_cluster(name, spec, pinned)
        elif kind == "RayJob":
            findings += _check_job(name, spec, pinned)
        kinds.add(str(kind))
    if not kinds & {"RayCluster", "RayJob"}:
        findings.append(problem("kind", "there is no RayCluster and no RayJob", "See experiments/clusters/."))
    return findings


def _check_job(name: str, spec: Mapping[str, Any], pinned: Mapping[str, str]) -> Iterable[Finding]:
    if spec.get("clusterSelector"):
        return
    ends = spec.get("shutdownAfterJobFinishes")
    if ends is not True:
        value = f"is {ends!r}: the cluster would stay, and cost, after the job"
        yield problem(f"{name}.shutdownAfterJobFinishes", value, "Set it to true.")
    yield from _check_cluster(f"{name}.rayClusterSpec", mapping(spec.get("rayClusterSpec")), pinned)


def _check_cluster(name: str, spec: Mapping[str, Any], pinned: Mapping[str, str]) -> Iterable[Finding]:
    ray, version = pinned.get("ray"), spec.get("rayVersion")
    if ray and str(version) != ray:
        value = f"is {version!r}, but constraints.txt has {ray}"
        yield problem(f"{name}.rayVersion", value, f"Use {ray}, which the image has.")
    if spec.get("enableInTreeAutoscaling") is not True:
        value = f"is {spec.get('enableInTreeAutoscaling')!r}: the number of workers stays as it is"
        yield problem(f"{name}.enableInTreeAutoscaling", value, "Set it to true.")
    options = mapping(spec.get("autoscalerOptions"))
    if options.get("version") != "v2":
        yield problem(f"{name}.autoscalerOptions.version", f"is {options.get('version')!r}", "Use v2.")
    idle = options.get("idleTimeoutSeconds")
    if not is_count(idle, 1):
        value = f"is {idle!r}, so nothing here says when workers without work end"
        yield problem(f"{name}.autoscalerOptions.idleTimeoutSeconds", value, "Give it, such as 300.")
    auth = mapping(spec.get("authOptions"))
    if auth.get("mode") != "token" or not auth.get("secretName"):
        value = f"mode is {auth.get('mode')!r} and secretName {auth.get('secretName')!r}: "
        value += "whoever reaches a port of the cluster could run anything on it"
        remedy = "Use mode: token and the name of a Secret that holds auth_token."
        yield problem(f"{name}.authOptions", value, remedy)
    groups = [mapping(group) for group in listing(spec.get("workerGroupSpecs"))]
    if not groups:
        yield problem(f"{name}.workerGroupSpecs", "there is none", "Give a group of workers.")
    images = set()
    for group in (mapping(spec.get("headGroupSpec")), *groups):
        for container in _containers(group):
            images.add(str(container.get("image")))
            where = f"{name}.{group.get('groupName', 'headGroupSpec')}"
            yield from check_image(where, str(container.get("image") or ""), pinned)
    if len(images) > 1:
        value = f"head and workers have different images: {', '.join(sorted(images))}"
        yield problem(name, value, "Use one, as versions have to be equal.")
    for group in groups:
        yield from _check_group(f"{name}.{group.get('groupName', '?')}", group)


def _check_group(where: str, group: Mapping[str, Any]) -> Iterable[Finding]:
    least, count, most = group.get("minReplicas", 0), group.get("replicas", 0), group.get("maxReplicas")
    if not (is_count(least) and is_count(count) and is_count(most) and least <= count <= most):
        value = f"minReplicas {least!r}, replicas {count!r}, maxReplicas {most!r}"
        yield problem(where, value, "Give whole numbers, in rising order: maxReplicas caps what the group costs.")
    for container in _containers(group)[:1]:
        hook = mapping(mapping(mapping(container.get("lifecycle")).get("preStop")).get("exec")).get("command")
        command = " ".join(str(part) for part in listing(hook))
        waits = re.search(r"--drain-now[ =]([\d.]+)", command)
        if WATCHER not in command or waits is None:
            remedy = f"exec: python -m {WATCHER} --drain-now SECONDS"
            yield problem(f"{where}.lifecycle.preStop", "nothing drains the node before its pod ends", remedy)
            continue
        grace = _pod(group).get("terminationGracePeriodSeconds", 30)
        if not is_count(grace) or grace <= float(waits[1]):
            value = f"is {grace!r}, but the hook before the end waits up to {waits[1]} s"
            yield problem(f"{where}.terminationGracePeriodSeconds", value, "Make it longer than the hook.")


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(group.get("template")).get("spec"))


def _containers(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [mapping(container) for container in listing(_pod(group).get("containers"))]
