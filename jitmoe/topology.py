"""The NUMA nodes that this process may use, as the system tells them."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SYSTEM = Path("/sys/devices/system")

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Node:
    """A node with memory and CPUs that this process may use.

    Attributes:
        number: of the system.
        cpus: those of the node, one of each core.
    """

    number: int
    cpus: frozenset[int]


@dataclass(frozen=True)
class Topology:
    """What the system says of its nodes.

    Attributes:
        nodes: those with memory and with CPUs, ascending.
        left_out: why other nodes, or their CPUs, are not used; for people.
    """

    nodes: tuple[Node, ...]
    left_out: tuple[str, ...]


@cache
def topology() -> Topology:
    """That of this process, read once: nodes are numbered by the system, and a cpuset or container may hide some."""
    return read_topology(SYSTEM, STATUS, os.sched_getaffinity(0))


def usable_nodes() -> tuple[Node, ...]:
    """The nodes of this process; at least one."""
    return topology().nodes


def read_topology(system: Path, status: Path, cpus: Iterable[int]) -> Topology:
    """Read the nodes.

    Args:
        system: ``/sys/devices/system``, or a tree like it.
        status: ``/proc/self/status``, or a file like it; of it ``Mems_allowed_list`` counts.
        cpus: that this process may run on.
    """
    usable = _one_of_each_core(system / "cpu", set(cpus))
    allowed = _allowed_memory(status)
    online = _numbers(_text(system / "node" / "online"))
    members = {number: usable & _numbers(_text(_folder(system, number) / "cpulist")) for number in sorted(online)}
    homes = [number for number in members if (allowed is None or number in allowed) and _has_memory(system, number)]
    left_out = [f"node {number} has no CPU that this process may use" for number in homes if not members[number]]
    found = {number: members[number] for number in homes if members[number]}
    for number in members.keys() - set(homes):
        if members[number] and found:
            nearest = _nearest(system, number, found)
            found[nearest] |= members[number]
            left_out.append(f"node {number} has no memory that this process may use: its CPUs work for node {nearest}")
    if not found:
        return Topology((Node(min(online, default=0), frozenset(usable)),), tuple(left_out))
    return Topology(tuple(Node(number, frozenset(cpus)) for number, cpus in sorted(found.items())), tuple(left_out))


def _one_of_each_core(folder: Path, cpus: set[int]) -> set[int]:
    """The lowest of the CPUs of each core, by the physical ids of package, die and core."""
    seen: dict[tuple[str, ...], int] = {}
    for cpu in sorted(cpus):
        names = ("physical_package_id", "die_id", "core_id")
        ids = tuple(_text(folder / f"cpu{cpu}" / "topology" / name).strip() for name in names)
        seen.setdefault(ids if ids[0] and ids[2] else (f"cpu {cpu}",), cpu)
    return set(seen.values())


def _allowed_memory(status: Path) -> set[int] | None:
    """Nodes whose memory the process may use; None where the system does not say."""
    found = re.search(r"^Mems_allowed_list:[ \t]*(.*)$", _text(status), re.MULTILINE)
    return _numbers(found[1]) if found else None


def _has_memory(system: Path, number: int) -> bool:
    """Whether the node has any; a system that does not say is believed to."""
    found = re.search(r"MemTotal:\s*(\d+)", _text(_folder(system, number) / "meminfo"))
    return found is None or int(found[1]) > 0


def _nearest(system: Path, number: int, others: Iterable[int]) -> int:
    """The one of ``others`` at the least distance; distances stand in the order of the nodes that are online."""
    online = sorted(_numbers(_text(system / "node" / "online")))
    distances = dict(
        zip(online, map(int, re.findall(r"\d+", _text(_folder(system, number) / "distance"))), strict=False)
    )
    return min(others, key=lambda other: (distances.get(other, 255), other))


def _folder(system: Path, number: int) -> Path:
    return system / "node" / f"node{number}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _numbers(text: str) -> set[int]:
    """Those of a list like ``0-3,8``."""
    return set(_ranges(text))


def _ranges(text: str) -> Iterator[int]:
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        yield from range(int(first), int(last or first) + 1)
