"""How far a long loop is, on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The ``items``: a bar counts them on a terminal, elsewhere a line for each tenth of the ``total``."""
    return _with_bar(items, total, what) if sys.stderr.isatty() else _with_lines(items, total, what)


def _with_bar(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    columns = (TextColumn(f"{what:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A thread that redraws the bar would disturb what is measured: it is drawn when an item is done.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.update(task, advance=1, refresh=True)


def _with_lines(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    start = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        if 10 * done // total > 10 * (done - 1) // total:
            print(f"{what:14} {done:4}/{total}  {time.perf_counter() - start:5.1f} s", file=sys.stderr, flush=True)
