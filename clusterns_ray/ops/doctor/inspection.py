"""A process of its own that looks at this machine and at the Ray cluster, so that the doctor can wait with a deadline.

Ray tries for minutes where nothing answers, and may end its process; so may a broken GPU or faiss. Each answer is
written as a line of JSON at once, so that those that came before are not lost with the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from clusterns_ray.errors import ClusterNSError
from clusterns_ray.ops.doctor import node as one_node

OnFact = Callable[[dict[str, Any]], None]


def main() -> None:
    """Read a request from stdin and write to stdout; see :func:`inspect`."""
    request = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints
    inspect(request, lambda fact: print(json.dumps(fact), file=out, flush=True))


def inspect(request: dict[str, Any], on_fact: OnFact) -> None:
    """Look at this machine and, where ``request["ray"]``, at every node that is up.

    Args:
        request: ``node``: what :func:`node.describe` takes; ``ray``: whether to join or start Ray; ``cpus``: the fewest
            that a Ray started here has; ``state_api``: whether it is needed; ``seconds``: for the nodes to answer.
        on_fact: called with ``{"kind": ...}``: ``driver``, then ``cluster`` or ``cluster_error``, ``state_api``, and
            ``node`` twice for each node: with what ``describe`` returns, and with what ``compute`` returns.
    """
    on_fact({"kind": "driver", **one_node.describe(request["node"])})
    if not request["ray"]:
        on_fact({"kind": "node", "node": "driver", **one_node.compute()})
        return
    from clusterns_ray.launch.ray_cluster import connect

    try:
        with connect(request["cpus"], lambda text: None, dashboard=request["state_api"]):
            _inspect_nodes(request, on_fact)
    except (ClusterNSError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(getattr(error, "message", error)).split())[:600]
        on_fact({"kind": "cluster_error", "error": text, "remedy": getattr(error, "remedy", "")})


def _inspect_nodes(request: dict[str, Any], on_fact: OnFact) -> None:
    import ray
    import ray.cloudpickle
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from clusterns_ray.launch.ray_cluster import cluster_capacity, state_api_error

    nodes = [node for node in ray.nodes() if node["Alive"]]
    keys = {"id": "NodeID", "address": "NodeManagerAddress", "resources": "Resources"}
    on_fact(
        {
            "kind": "cluster",
            "nodes": [{name: node[key] for name, key in keys.items()} for node in nodes],
            "capacity": cluster_capacity(request["label_selector"]).values(),
            "authenticated": is_token_auth_enabled(),
        }
    )
    ray.cloudpickle.register_pickle_by_value(one_node)
    waiting: dict[Any, str] = {}
    for node in nodes:
        # No CPU, so that it runs beside whatever the node does; there and nowhere else.
        there: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)
        waiting[remote(one_node.describe).remote(request["node"])] = node["NodeID"]
        waiting[remote(one_node.compute).remote()] = node["NodeID"]
    deadline = time.monotonic() + request["seconds"]
    error = state_api_error(min(request["seconds"], 20.0))
    on_fact({"kind": "state_api", "error": error and error.partition(". ")[0][:300]})
    while waiting and time.monotonic() < deadline:
        for task in ray.wait(list(waiting), num_returns=1, timeout=1.0)[0]:
            node = waiting.pop(task)
            try:
                answer = ray.get(task)
            except RayError as error:
                answer = {"error": str(error).strip().splitlines()[-1][:500]}
            on_fact({"kind": "node", "node": node, **answer})
