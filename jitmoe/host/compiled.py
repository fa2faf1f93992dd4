"""Numba's decorators as this wing needs them: cached where there is a place for it, free in forked children."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from llvmlite.binding import ffi
from numba import cfunc, njit
from numba.core.compiler_lock import global_compiler_lock

from jitmoe.files import warn_once


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with the GIL released and a cache on disk; without the cache where nothing can be written."""
    return lambda function: _cached(lambda cache: njit(cache=cache, nogil=True, **options)(function))


def callback(function: Callable[..., None], signature: str) -> Any:
    """``numba.cfunc``, likewise."""
    return _cached(lambda cache: cfunc(signature, cache=cache)(function))


def _cached(compile: Callable[[bool], Any]) -> Any:
    try:
        return compile(True)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        warn_once(
            "Numba finds no directory to keep its code in, so each process compiles for some seconds: set "
            "NUMBA_CACHE_DIR to one that you can write to"
        )
        return compile(False)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C inside compiled code comes as SystemError, with the interrupt as its cause: raise the interrupt."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


class _Locks:
    """Those that Numba and LLVM compile under: a fork waits for them, or the child would wait for ever."""

    held = ExitStack()

    @classmethod
    def take(cls) -> None:
        """Before a fork: no other thread is in the middle of a compilation now."""
        cls.held.enter_context(global_compiler_lock)
        cls.held.enter_context(getattr(ffi.lib, "_lock", nullcontext()))

    @classmethod
    def free(cls) -> None:
        """After it, in both processes."""
        cls.held.close()


os.register_at_fork(before=_Locks.take, after_in_parent=_Locks.free, after_in_child=_Locks.free)
