"""Runs the parts of a call: on the calling thread, or side by side, each on threads that stay on its NUMA node."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

from jitmoe.experts import observer
from jitmoe.experts.supplies import supplies
from jitmoe.files import warn_once
from jitmoe.plan.parts import Part
from jitmoe.plan.teams import Team, plan_teams
from jitmoe.process import usable_threads
from jitmoe.topology import Node

Work = Callable[[Part, Team], None]
"""Does something for a part with the threads of a team."""


def by_part(parts: Sequence[Part], threads: int, work: Work) -> None:
    """Do ``work`` for each part, on ``threads`` threads in all; what the first part raised is raised.

    Whoever looks at calls sees one part after the other.
    """
    nodes = supplies().nodes()
    watcher = observer.current()
    if watcher is not None:
        watcher.check(len(parts))
    if len(parts) == 1 or watcher is not None:
        nodes = nodes[:1]
    teams = plan_teams(len(parts), usable_threads(threads), nodes)
    if threads < min(len(parts), len(nodes)):
        warn_once(
            f"{threads} thread{'s' if threads > 1 else ''} for {len(parts)} parts on {len(nodes)} NUMA nodes: some "
            "nodes wait, and weights are read from others. torch.set_num_threads() gives more"
        )
    if len(teams) == 1:
        for part in parts:
            work(part, teams[0])
        return
    futures = [_thread_of(team.node).submit(_do, work, parts, team) for team in teams if team.node]
    _finish(futures)
    for future in futures:
        future.result()


def _do(work: Work, parts: Sequence[Part], team: Team) -> None:
    for index in team.parts:
        work(parts[index], team)


def _finish(futures: Sequence[Future[None]]) -> None:
    """Wait until all are done, whatever comes: they write to memory that the caller is about to let go."""
    interrupt: BaseException | None = None
    while not all(future.done() for future in futures):
        try:
            wait(futures)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@cache
def _thread_of(node: Node) -> ThreadPoolExecutor:
    """One thread that lives as long as the process: OpenMP keeps a pool for each thread that ever used one.

    A forked child has no such threads, and no use for them: it computes on one thread.
    """
    return ThreadPoolExecutor(1, f"jitmoe-node{node.number}", _stay_on, (node,))


def _stay_on(node: Node) -> None:
    """Bind this thread, and with it those that OpenMP makes for it, which inherit that."""
    try:
        os.sched_setaffinity(0, node.cpus)
    except OSError as error:
        warn_once(f"threads cannot be bound to the CPUs of NUMA node {node.number}: {error}. They run where they may")
