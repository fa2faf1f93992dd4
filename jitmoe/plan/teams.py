"""Who computes the parts of a call: a team of threads on each NUMA node, or all threads one part after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

from jitmoe.topology import Node


@dataclass(frozen=True)
class Team:
    """Threads that compute some parts, one after the other.

    Attributes:
        node: where they run; None where the calling thread and its pool do it, wherever they run.
        parts: numbers of the parts, ascending.
        threads: how many.
    """

    node: Node | None
    parts: tuple[int, ...]
    threads: int


def home_of(part: int, parts: int, nodes: Sequence[Node]) -> Node:
    """The node where the weights of a part lie: neighbouring parts share one where there are fewer nodes."""
    return nodes[part * min(len(nodes), parts) // parts]


def plan_teams(parts: int, threads: int, nodes: Sequence[Node]) -> tuple[Team, ...]:
    """Share the parts out among the nodes. Results never depend on it.

    Args:
        parts: of the config.
        threads: of the call, in all; a team has no more than its node has cores.
        nodes: with memory and CPUs of this process.
    """
    count = min(len(nodes), parts, threads)
    if count <= 1:
        return (Team(None, tuple(range(parts)), threads),)
    each, more = divmod(threads, count)
    teams = []
    for index in range(count):
        mine = tuple(part for part in range(parts) if part * count // parts == index)
        node = home_of(mine[0], parts, nodes)
        teams.append(Team(node, mine, min(each + (index < more), len(node.cpus))))
    return tuple(teams)
