"""Who computes which part of a call."""

from collections.abc import Callable, Sequence

from jitmoe.plan.parts import Part

Work = Callable[[Part, int], None]
"""Does something for a part on so many threads."""


def by_part(parts: Sequence[Part], threads: int, work: Work) -> None:
    """Do ``work`` for each part, on ``threads`` threads in all."""
    for part in parts:
        work(part, threads)
