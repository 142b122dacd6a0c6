"""The shards of a batch: which worker has which, and the tree in which what they come to is added up.

All of it is a function of the number of shards and of workers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

from clusterns_ray.errors import ConfigError

Node = tuple[int, int]
"""A level of the tree, that of the leaves is 0, and a place in it."""
Value = TypeVar("Value")


def tree_order(shards: int) -> list[int]:
    """The shards of a batch in the order of the tree in which their gradients are added: a pure function of their
    number.

    Shards are numbered by the length of their rows. The first is paired with the last, the second with the last but
    one, and so on; these pairs are folded in the same way, and again, until one is left. So the neighbours in this
    order, and all runs of them that workers get, have about the same number of tokens.
    """
    groups = [[shard] for shard in range(shards)]
    while len(groups) > 1:
        half = len(groups) // 2
        folded = [groups[i] + groups[-1 - i] for i in range(half)]
        groups = folded + ([groups[half]] if len(groups) % 2 else [])
    return groups[0]


def assign_shards(shards: int, workers: int) -> list[list[int]]:
    """The shards of each worker, ascending: the same number for each, neighbours in the order of the tree, so that a
    worker adds up most of what it has before anything is exchanged.

    Raises:
        ConfigError: (a ValueError) the shards cannot be dealt evenly.
    """
    if workers < 1 or shards % workers:
        raise ConfigError(
            f"{shards} shards cannot be dealt to {workers} workers, as each must get the same number; make "
            "the number of shards a multiple of the number of workers"
        )
    order, each = tree_order(shards), shards // workers
    return [sorted(order[first : first + each]) for first in range(0, shards, each)]


class ShardTree(Generic[Value]):
    """Sums of leaves in a binary tree over their places; where a node has no sibling, it is its parent."""

    def __init__(self, leaves: int, add: Callable[[Value, Value], Value]) -> None:
        self.leaves, self.add = leaves, add
        self.nodes: dict[Node, Value] = {}
        """sums whose siblings are not there yet; in the end the root alone, where all leaves are there"""

    def put(self, level: int, place: int, value: Value) -> None:
        """Take the sum of a node in, and all sums that it completes."""
        while (width := -(-self.leaves // 2**level)) > 1:
            if place ^ 1 < width:
                if (level, place ^ 1) not in self.nodes:
                    break
                value = self.add(self.nodes.pop((level, place ^ 1)), value)
            level, place = level + 1, place // 2
        self.nodes[level, place] = value


@cache
def nodes_by_rank(shards: int, workers: int) -> list[list[Node]]:
    """The nodes that each worker's shards add up to, ascending."""
    order, nodes = tree_order(shards), []
    for its_shards in assign_shards(shards, workers):
        tree = ShardTree[None](shards, lambda a, b: None)
        for shard in its_shards:
            tree.put(0, order.index(shard), None)
        nodes.append(sorted(tree.nodes))
    return nodes
