"""KubeRay documents, checked without a Kubernetes at hand: no more of their structure is known than is named here.

Field names: KubeRay API reference, ``ray.io/v1``, of KubeRay 1.6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from clusterns_ray.ops.cluster_lint.common import WATCHER, check_image, is_count, listing, mapping
from clusterns_ray.ops.doctor.findings import Finding

_SECRET_NAME = re.compile(r"(?i)token|secret|password|api_?key|access_?key")


def check_documents(documents: Iterable[Mapping[str, Any]], pinned: Mapping[str, str]) -> list[Finding]:
    """The findings about RayCluster and RayJob documents; others may be with them, but no Secret."""
    found: list[Finding] = []
    seen = 0
    for document in documents:
        kind, spec = document.get("kind"), mapping(document.get("spec"))
        name = f"{kind}/{mapping(document.get('metadata')).get('name', '?')}"
        if kind == "Secret":
            remedy = "Make it with kubectl create secret, so that it is in no file, and refer to it by name."
            found.append(Finding("problem", name, "a Secret is in the file", remedy))
        if kind not in ("RayCluster", "RayJob"):
            continue
        seen += 1
        if document.get("apiVersion") != "ray.io/v1":
            value = f"apiVersion is {document.get('apiVersion')!r}"
            found.append(Finding("problem", name, value, "Use ray.io/v1."))
        if kind == "RayCluster":
            found += _check_cluster(name, spec, pinned)
        else:
            found += _check_job(name, spec, pinned)
    if not seen:
        found.append(Finding("problem", "kind", "there is no RayCluster and no RayJob", "See experiments/clusters/."))
    return found


def _check_job(name: str, spec: Mapping[str, Any], pinned: Mapping[str, str]) -> Iterable[Finding]:
    if not str(spec.get("entrypoint") or "").strip():
        yield Finding("problem", f"{name}.entrypoint", "is not given", "Give the command, such as clusterns train ...")
    if spec.get("clusterSelector"):
        return
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield Finding(
            "problem",
            f"{name}.shutdownAfterJobFinishes",
            f"is {spec.get('shutdownAfterJobFinishes')!r}: the cluster would stay, and cost, after the job",
            "Set it to true.",
        )
    if not is_count(spec.get("activeDeadlineSeconds"), 1):
        yield Finding(
            "warning",
            f"{name}.activeDeadlineSeconds",
            f"is {spec.get('activeDeadlineSeconds')!r}: nothing ends a job that hangs",
            "Give the longest time that it may take.",
        )
    yield from _check_cluster(f"{name}.rayClusterSpec", mapping(spec.get("rayClusterSpec")), pinned)


def _check_cluster(name: str, spec: Mapping[str, Any], pinned: Mapping[str, str]) -> Iterable[Finding]:
    ray = pinned.get("ray")
    if ray and str(spec.get("rayVersion")) != ray:
        remedy = f"Use {ray}, which the image has."
        yield Finding(
            "problem", f"{name}.rayVersion", f"is {spec.get('rayVersion')!r}, but constraints.txt has {ray}", remedy
        )
    yield from _check_autoscaling(name, spec)
    auth = mapping(spec.get("authOptions"))
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield Finding(
            "problem",
            f"{name}.authOptions",
            f"mode is {auth.get('mode')!r} and secretName {auth.get('secretName')!r}",
            "Use mode: token and the name of a Secret that holds auth_token; else a port is enough to run anything.",
        )
    head = mapping(spec.get("headGroupSpec"))
    groups = [mapping(group) for group in listing(spec.get("workerGroupSpecs"))]
    yield from _check_head(name, head)
    if not groups:
        yield Finding("problem", f"{name}.workerGroupSpecs", "there is none", "Give a group of workers.")
    images = set()
    for group_name, group, is_head in [
        ("headGroupSpec", head, True),
        *((str(group.get("groupName", "?")), group, False) for group in groups),
    ]:
        where = f"{name}.{group_name}"
        pod = _pod(group)
        for container in _containers(pod):
            images.add(container.get("image"))
            yield from check_image(where, str(container.get("image") or ""), pinned)
            yield from _check_container(where, container)
        if pod.get("hostNetwork"):
            yield Finding("problem", where, "hostNetwork opens every port on the machine's network", "Remove it.")
        if not is_head:
            yield from _check_group(where, group, pod)
    if any(not _is_in_one_zone(_pod(group)) for group in (head, *groups)):
        yield Finding(
            "warning",
            name,
            "nothing keeps the pods in one zone, and traffic between zones is slower and is paid for",
            "Give head and workers the same nodeSelector topology.kubernetes.io/zone, or a podAffinity with that key.",
        )
    if len(images) > 1:
        value = f"head and workers have different images: {', '.join(sorted(map(str, images)))}"
        yield Finding("problem", name, value, "Use one, as versions have to be equal.")


def _check_autoscaling(name: str, spec: Mapping[str, Any]) -> Iterable[Finding]:
    options = mapping(spec.get("autoscalerOptions"))
    if spec.get("enableInTreeAutoscaling") is not True:
        value = f"is {spec.get('enableInTreeAutoscaling')!r}: the number of workers stays as it is"
        yield Finding("problem", f"{name}.enableInTreeAutoscaling", value, "Set it to true.")
    if options.get("version") != "v2":
        value = f"is {options.get('version')!r}"
        yield Finding("problem", f"{name}.autoscalerOptions.version", value, "Use v2.")
    if not is_count(options.get("idleTimeoutSeconds"), 1):
        value = f"is {options.get('idleTimeoutSeconds')!r}, so nothing here says when workers without work end"
        yield Finding("problem", f"{name}.autoscalerOptions.idleTimeoutSeconds", value, "Give it, such as 300.")


def _check_head(name: str, head: Mapping[str, Any]) -> Iterable[Finding]:
    where = f"{name}.headGroupSpec"
    parameters = mapping(head.get("rayStartParams"))
    if any(_gpus(container) for container in _containers(_pod(head))) or str(parameters.get("num-gpus", "0")) != "0":
        yield Finding("problem", where, "the head has GPUs, which would be paid for without work", "Give it none.")
    if str(parameters.get("num-cpus")) != "0":
        yield Finding(
            "warning",
            f"{where}.rayStartParams",
            f"num-cpus is {parameters.get('num-cpus')!r}, so that workers without a GPU may be placed on the head",
            'Use num-cpus: "0": drivers and controllers need none.',
        )
    service = head.get("serviceType") or mapping(mapping(head.get("headService")).get("spec")).get("type")
    if service in ("NodePort", "LoadBalancer") or head.get("enableIngress"):
        yield Finding(
            "problem",
            where,
            f"the head is reached from outside (serviceType {service!r}, enableIngress {head.get('enableIngress')!r})",
            "Use ClusterIP without an ingress, and kubectl port-forward.",
        )


def _check_group(where: str, group: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterable[Finding]:
    counts = {
        key: group.get(key, default) for key, default in (("minReplicas", 0), ("replicas", 0), ("maxReplicas", None))
    }
    wrong = {key: value for key, value in counts.items() if not is_count(value, 0)}
    if wrong:
        for key, value in wrong.items():
            yield Finding("problem", f"{where}.{key}", f"is {value!r}", "Give a whole number, 0 or more.")
    elif not counts["minReplicas"] <= counts["replicas"] <= counts["maxReplicas"]:
        value = ", ".join(f"{key} {value}" for key, value in counts.items())
        yield Finding("problem", where, f"{value}: not in rising order", "Put them so.")
    for container in _containers(pod)[:1]:
        yield from _check_gpus(where, pod, container)
        hook = mapping(mapping(mapping(container.get("lifecycle")).get("preStop")).get("exec")).get("command")
        command = " ".join(str(part) for part in listing(hook))
        waits = re.search(r"--drain-now[ =]([\d.]+)", command)
        if WATCHER not in command or waits is None:
            yield Finding(
                "problem",
                f"{where}.lifecycle.preStop",
                "nothing drains the node before its pod ends",
                f"exec: python -m {WATCHER} --drain-now SECONDS",
            )
            continue
        grace = pod.get("terminationGracePeriodSeconds", 30)
        if not is_count(grace, 0) or grace <= float(waits[1]):
            yield Finding(
                "problem",
                f"{where}.terminationGracePeriodSeconds",
                f"is {grace!r}, but the hook before the end waits up to {waits[1]} s",
                "Make it longer than the hook.",
            )


def _check_gpus(where: str, pod: Mapping[str, Any], container: Mapping[str, Any]) -> Iterable[Finding]:
    """What a pod with GPUs needs beside them."""
    if not _gpus(container):
        return
    tolerated = {mapping(each).get("key", "nvidia.com/gpu") for each in listing(pod.get("tolerations"))}
    if "nvidia.com/gpu" not in tolerated:
        yield Finding(
            "warning",
            f"{where}.tolerations",
            "none for nvidia.com/gpu, with which nodes with GPUs are commonly tainted: the pod would stay Pending",
            "Add {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}.",
        )
    shared = {mapping(each).get("name") for each in listing(container.get("volumeMounts")) if _at_shm(mapping(each))}
    memory = {
        mapping(each).get("name")
        for each in listing(pod.get("volumes"))
        if mapping(mapping(each).get("emptyDir")).get("medium") == "Memory"
    }
    if not shared & memory:
        yield Finding(
            "warning",
            f"{where}.volumeMounts",
            "/dev/shm is not in memory, or of the 64 MB of a container: Ray's objects and NCCL's buffers are there",
            "Mount an emptyDir with medium: Memory at /dev/shm.",
        )


def _at_shm(mount: Mapping[str, Any]) -> bool:
    return mount.get("mountPath") == "/dev/shm"


def _is_in_one_zone(pod: Mapping[str, Any]) -> bool:
    zone = "topology.kubernetes.io/zone"
    return zone in mapping(pod.get("nodeSelector")) or zone in repr(pod.get("affinity"))


def _check_container(where: str, container: Mapping[str, Any]) -> Iterable[Finding]:
    for variable in listing(container.get("env")):
        variable = mapping(variable)
        if _SECRET_NAME.search(str(variable.get("name"))) and variable.get("value"):
            yield Finding(
                "problem",
                f"{where}.env",
                f"{variable['name']} has its value in the file",
                "Use valueFrom.secretKeyRef.",
            )
    if any(mapping(port).get("hostPort") for port in listing(container.get("ports"))):
        yield Finding("problem", where, "a hostPort opens a port on the machine's network", "Remove it.")


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(group.get("template")).get("spec"))


def _containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [mapping(container) for container in listing(pod.get("containers"))]


def _gpus(container: Mapping[str, Any]) -> bool:
    resources = mapping(container.get("resources"))
    asked = {**mapping(resources.get("requests")), **mapping(resources.get("limits"))}
    return any(key.endswith("/gpu") and str(value) not in ("0", "") for key, value in asked.items())
