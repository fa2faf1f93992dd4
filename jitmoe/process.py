"""The policy of the whole process for forks and threads.

A forked child has neither its parent's OpenMP threads nor the threads that held a lock there. A child that waits for
either waits for ever.
"""

import os
import sys
import threading


class _Fork:
    """Whether this process is a forked child."""

    happened = False


def _begin_child() -> None:
    _Fork.happened = True
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # torch computes on the same OpenMP pool


os.register_at_fork(after_in_child=_begin_child)


def usable_threads(threads: int) -> int:
    """``threads``, or 1 in a forked child, whose OpenMP pool has no second thread."""
    return 1 if _Fork.happened else threads


class Lock:
    """A lock that is free in a forked child, even if a thread of the parent held it."""

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
