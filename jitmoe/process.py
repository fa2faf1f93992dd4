"""The policy of the whole process for forks and threads.

A forked child has neither its parent's OpenMP threads nor the threads that held a lock there. A child that waits for
either waits for ever. So a fork waits for what other threads are in the middle of: an import, which holds the lock of
its module, and a first call of compiled code, which imports and compiles.
"""

import importlib
import os
import sys
import threading
import time

IMPORT_SECONDS = 30.0
"""Longest wait of a fork for the imports of other threads, which may wait for something themselves."""


class _Fork:
    """Whether this process is a forked child."""

    happened = False


def _begin_child() -> None:
    _Fork.happened = True
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)  # torch computes on the same OpenMP pool


def _others_import() -> bool:
    """Whether another thread is importing a module."""
    locks = [lock() for lock in list(getattr(importlib._bootstrap, "_module_locks", {}).values())]
    return any(getattr(lock, "owner", None) not in (None, threading.get_ident()) for lock in locks)


def _wait_for_imports() -> None:
    end = time.monotonic() + IMPORT_SECONDS
    while _others_import() and time.monotonic() < end:
        time.sleep(0.001)


class _Calls:
    """Calls of compiled code that are under way in all threads: a fork waits until none is, and none begins then."""

    condition = threading.Condition()
    running: dict[int, int] = {}  # noqa: RUF012 - by thread; calls can be nested

    @classmethod
    def change(cls, by: int) -> None:
        with cls.condition:
            thread = threading.get_ident()
            cls.running[thread] = cls.running.get(thread, 0) + by
            if not cls.running[thread]:
                del cls.running[thread]
                cls.condition.notify_all()

    @classmethod
    def take(cls) -> None:
        cls.condition.acquire()
        cls.condition.wait_for(lambda: not cls.running.keys() - {threading.get_ident()})

    @classmethod
    def free(cls) -> None:
        cls.condition.release()


def _from_interrupt(error: BaseException | None) -> bool:
    """Whether a chain of SystemErrors began with Ctrl-C: each call of C on the way adds one."""
    while isinstance(error, SystemError):
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


class compiled_call:  # noqa: N801 - a context manager, as small as can be: every call of a layer enters some
    """A call of compiled code, which may have to be compiled first: no fork comes into its middle.

    Ctrl-C inside comes as a chain of SystemErrors that begins with it; who called sees the interrupt.
    """

    def __enter__(self) -> None:
        _Calls.change(1)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _Calls.change(-1)
        if isinstance(error, SystemError) and _from_interrupt(error):
            raise KeyboardInterrupt from error


os.register_at_fork(before=_wait_for_imports, after_in_child=_begin_child)
os.register_at_fork(before=_Calls.take, after_in_parent=_Calls.free, after_in_child=_Calls.free)


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
