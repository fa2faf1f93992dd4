"""Numba's decorators as this wing needs them: cached on disk where there is a place for it."""

from collections.abc import Callable
from typing import Any

from numba import cfunc, njit

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
