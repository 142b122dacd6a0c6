"""The watcher on a spot machine: when the cloud says that it takes the machine back, drain its Ray node.

    python -m clusterns_ray.launch.preemption                   # watch; ends once the node is draining
    python -m clusterns_ray.launch.preemption --drain-now 100   # drain, and wait up to 100 s for the work to leave

A draining node takes no new work, and Ray Train informs the workers on it, which write a checkpoint and stop. Nothing
in Ray asks for the notice: the cluster launcher knows none, and Kubernetes ends a pod by a signal (hence the second
form, for a ``preStop`` hook).

Only the notice counts, not AWS's earlier "rebalance recommendation": that may come hours before, or for nothing, and
leaving a machine costs a restart of all workers, while two minutes are many times what a checkpoint takes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

log = logging.getLogger("spot")

POLL_S = 1.0
REQUEST_TIMEOUT_S = 3.0
FIND_TIMEOUT_S = 300.0
"""How long to look for a metadata service, with ``--provider auto``."""
DRAIN_RETRY_S = 1.0
ANSWER_BYTES = 1 << 16


@dataclass(frozen=True)
class Notice:
    """The cloud's notice that it takes this machine back."""

    deadline: float
    """when it does, in seconds since 1970"""
    text: str


class MetadataError(OSError):
    """The metadata service gave no answer, or none that can be read. It is asked again."""


class Aws:
    """EC2's metadata service, version 2: a token first, then with it ``spot/instance-action``, which is not there (404)
    until about two minutes before the machine is stopped or terminated.

    Source: Amazon EC2 User Guide, "Spot Instance interruption notices" and "Use the Instance Metadata Service".
    """

    name = "aws"
    endpoint = "http://169.254.169.254"
    notice_s = 120.0

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = endpoint or self.endpoint
        self.token: str | None = None

    def notice(self) -> Notice | None:
        """The notice, if there is one.

        Raises:
            MetadataError: the service gave no answer, or none that can be read.
        """
        status, body = self._get("/latest/meta-data/spot/instance-action")
        if status == 404:
            return None
        if status != 200:
            raise MetadataError(f"{self.endpoint} answers {status} when asked for the notice")
        try:
            action = json.loads(body)
            what = str(action["action"])
        except (ValueError, KeyError, TypeError):
            raise MetadataError(f"{self.endpoint} answers {body[:80]!r}, which is not a notice") from None
        now = time.time()
        try:
            when = datetime.strptime(action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            left = when.timestamp() - now
        except (ValueError, KeyError, TypeError):
            left = self.notice_s
        # The clocks may differ.
        return Notice(now + min(max(left, 1.0), self.notice_s), f"AWS will {what} this spot machine")

    def _get(self, path: str) -> tuple[int, str]:
        for _ in range(2):
            if self.token is None:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                status, _, token = request(self.endpoint, "PUT", "/latest/api/token", lifetime)
                if status != 200 or not token.isascii() or not token.isprintable():
                    raise MetadataError(f"{self.endpoint} answers {status} when asked for a token")
                self.token = token
            status, _, body = request(self.endpoint, "GET", path, {"X-aws-ec2-metadata-token": self.token})
            if status != 401:
                return status, body
            self.token = None  # it is too old
        raise MetadataError(f"{self.endpoint} refuses the token that it gave")


class Gcp:
    """Compute Engine's metadata service: ``instance/preempted`` turns from FALSE to TRUE 30 s before the machine goes.

    Source: Compute Engine documentation, "Create and use preemptible VMs" and "About VM metadata".
    """

    name = "gcp"
    endpoint = "http://169.254.169.254"  # metadata.google.internal, without asking a name server
    notice_s = 30.0

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = endpoint or self.endpoint

    def notice(self) -> Notice | None:
        """The notice, if there is one.

        Raises:
            MetadataError: the service gave no answer, or none that can be read.
        """
        google = {"Metadata-Flavor": "Google"}
        status, headers, body = request(self.endpoint, "GET", "/computeMetadata/v1/instance/preempted", google)
        if status != 200 or headers.get("Metadata-Flavor") != "Google":
            raise MetadataError(f"{self.endpoint} answers {status}, and not as Google's metadata service does")
        if body.strip() == "FALSE":
            return None
        if body.strip() != "TRUE":
            raise MetadataError(f"{self.endpoint} answers {body[:80]!r}, neither TRUE nor FALSE")
        return Notice(time.time() + self.notice_s, "Google preempts this machine")


Metadata = Aws | Gcp
CLOUDS: dict[str, type[Aws] | type[Gcp]] = {"aws": Aws, "gcp": Gcp}


def request(
    endpoint: str, method: str, path: str, headers: dict[str, str], timeout_s: float = REQUEST_TIMEOUT_S
) -> tuple[int, http.client.HTTPMessage, str]:
    """One HTTP request, past any proxy, that ends within ``timeout_s`` even if the answer comes drop by drop.

    Returns:
        Status, headers, body.

    Raises:
        MetadataError: no whole answer came.
    """
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=timeout_s)
    try:
        connection.connect()
        end = time.monotonic() + timeout_s
        late = threading.Timer(timeout_s, _hang_up, [connection.sock])
        late.daemon = True
        late.start()
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            body = response.read(ANSWER_BYTES).decode("utf-8", "replace")
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer in {timeout_s:g} s")
            return response.status, response.headers, body
        finally:
            late.cancel()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MetadataError(f"{endpoint} gives no answer ({error or type(error).__name__})") from None
    finally:
        connection.close()


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def find_metadata(provider: str, endpoint: str | None = None, poll_s: float = POLL_S) -> Metadata:
    """The metadata service of this machine; with ``auto`` the first that answers.

    Raises:
        MetadataError: none does.
    """
    if provider != "auto":
        return CLOUDS[provider](endpoint)
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while True:
        failures: list[str] = []
        for cloud in CLOUDS.values():
            metadata = cloud(endpoint)
            try:
                metadata.notice()
            except MetadataError as error:
                failures.append(str(error))
                continue
            return metadata
        if time.monotonic() > deadline:
            raise MetadataError(f"No cloud's metadata service was found in {FIND_TIMEOUT_S:g} s: {'; '.join(failures)}")
        time.sleep(poll_s)


def wait_for_notice(metadata: Metadata, poll_s: float = POLL_S) -> Notice:
    """Ask until there is a notice. A failure to ask is logged, once while it stays the same, and asked again."""
    trouble = ""
    while True:
        try:
            notice = metadata.notice()
            now = ""
        except MetadataError as error:
            notice, now = None, str(error)
        if notice is not None:
            return notice
        if now != trouble:
            log.warning("%s", now or f"{metadata.endpoint} answers again")
            trouble = now
        time.sleep(poll_s)


def nodes_here() -> dict[str, str]:
    """The Ray nodes that run on this machine (there is one, as a rule): hexadecimal node id to address of the GCS.

    Read off the command lines of the raylets, as Ray itself does it, since a driver would start workers to find out.
    """
    import ray  # noqa: F401  carries psutil

    import psutil  # isort: skip

    addresses = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if command[0].endswith("/raylet"):
            flags = dict(part.lstrip("-").split("=", 1) for part in command[1:] if "=" in part)
            if "node_id" in flags and "gcs-address" in flags:
                addresses[flags["node_id"]] = flags["gcs-address"]
    return addresses


def drain_node(node_id: str, gcs_address: str, notice: Notice) -> None:
    """Drain a node, for the reason "preemption", which Ray does not refuse. To drain it twice does no harm.

    Raises:
        Exception: Ray's, of several kinds; the GCS is given 40 s to answer.
    """
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # pyright: ignore[reportAttributeAccessIssue]

    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    timeout_s = max(notice.deadline - time.time(), 1.0)
    client = GcsClient(address=gcs_address)
    accepted, why = client.drain_node(node_id, reason, notice.text, int(notice.deadline * 1000), timeout=timeout_s)
    if not accepted:
        raise RuntimeError(f"Ray refuses: {why}")


def drain_machine(
    notice: Notice,
    only: str | None = None,
    *,
    nodes: Callable[[], dict[str, str]] = nodes_here,
    drain: Callable[[str, str, Notice], None] = drain_node,
) -> list[str]:
    """Drain every Ray node of this machine, trying until the machine goes.

    Args:
        only: the one node to drain, where several share a machine.

    Returns:
        The nodes that are draining now; none where none runs here, or Ray could not be reached in time.
    """
    drained: list[str] = []
    while True:
        here = {node: address for node, address in nodes().items() if only in (None, node)}
        for node, address in here.items():
            if node not in drained:
                try:
                    drain(node, address, notice)
                except Exception as error:
                    log.warning("Node %s of %s is not draining yet: %s", node, address, error)
                    continue
                drained.append(node)
                left = notice.deadline - time.time()
                log.info("Node %s is draining; %.0f s are left", node, left)
        if here and set(here) <= set(drained):
            return drained
        if time.time() > notice.deadline:
            return drained
        time.sleep(DRAIN_RETRY_S)


def wait_until_gone(drained: Sequence[str], deadline: float, nodes: Callable[[], dict[str, str]] = nodes_here) -> bool:
    """Wait until the last work has left: a node that is drained and idle ends by itself. False at the deadline."""
    while set(drained) & set(nodes()):
        if time.time() > deadline:
            return False
        time.sleep(DRAIN_RETRY_S)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 the node is draining (or none is here, with ``--drain-now``), 1 it could not be drained."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s spot: %(message)s", stream=sys.stderr)
    # Now, as after the notice every second counts.
    import ray  # noqa: F401

    if options.drain_now is not None:
        return _drain_now(options.drain_now, options.node_id)
    try:
        metadata = find_metadata(options.provider, options.endpoint, options.poll)
    except MetadataError as error:
        log.error("%s. Nothing is watched. Start the watcher only on a machine of AWS or Google Cloud.", error)
        return 1
    log.info("Watching %s (%s) every %g s", metadata.endpoint, metadata.name, options.poll)
    notice = wait_for_notice(metadata, options.poll)
    log.info("%s in %.0f s", notice.text, notice.deadline - time.time())
    if drain_machine(notice, options.node_id):
        return 0
    log.error("No Ray node here could be drained in time.")
    return 1


def _drain_now(seconds: float, only: str | None) -> int:
    here = nodes_here()
    if not here or (only is not None and only not in here):
        log.info("No Ray node runs here: nothing to drain.")
        return 0
    notice = Notice(time.time() + seconds, "This machine is about to be taken away")
    drained = drain_machine(notice, only)
    if drained and wait_until_gone(drained, notice.deadline):
        log.info("The work has left.")
    else:
        log.warning("Time is up.")
    return 0 if drained else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options; what is wrong with them ends the process with exit code 2, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m clusterns_ray.launch.preemption", description=main.__doc__)
    parser.add_argument("--provider", choices=["auto", *CLOUDS], default="auto", help="auto: the one that answers")
    parser.add_argument("--endpoint", type=_endpoint, help="of the metadata service, in place of the cloud's own")
    parser.add_argument("--poll", type=_seconds, default=POLL_S, metavar="SECONDS", help="between two looks")
    parser.add_argument("--node-id", metavar="HEX", help="drain this Ray node alone; all of this machine if not given")
    parser.add_argument(
        "--drain-now",
        type=_seconds,
        metavar="SECONDS",
        help="drain without a notice; wait for the work to leave",
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _endpoint(text: str) -> str:
    if not text.startswith("http://") or not urlsplit(text).hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is not http://HOST[:PORT]")
    return text


if __name__ == "__main__":
    sys.exit(main())
