"""How far a long loop is, on stderr: a bar on a terminal, elsewhere a line for each tenth of the work."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

Advance = Callable[[int, str], None]
"""Takes the number of items that are done, and the name of the last of them."""

_bars: "list[Progress]" = []
"""The display on the terminal, if any. An inner loop adds its bar to the display of the outer loop."""

_loops: list[str] = []
"""Names of the running loops that print lines, the outermost first."""


def track(items: Iterable[Item], total: int, what: str, name: Callable[[Item], str] | None = None) -> Iterator[Item]:
    """Yield ``items`` and say on stderr how many of them are done.

    On a terminal this is a bar, which is gone after the loop. Elsewhere at most ten lines are printed, none with a
    carriage return, and a loop inside another one prints nothing.

    Args:
        items: what the loop runs over.
        total: number of items.
        what: name of one item, in the singular: "W1 round".
        name: gives the name of an item, which is shown when the item is done.
    """
    with counted(total, what) as advance:
        for done, item in enumerate(items, 1):
            yield item
            advance(done, name(item) if name else "")


def counted(total: int, what: str) -> AbstractContextManager[Advance]:
    """What :func:`track` shows, for a loop that somebody else runs and that calls what it is given here."""
    return _bar(total, what) if _on_terminal() else _lines(total, what)


def _on_terminal() -> bool:
    # A service may have no stderr, or one that has only write().
    return hasattr(sys.stderr, "isatty") and sys.stderr.isatty()


@contextmanager
def _lines(total: int, what: str) -> Iterator[Advance]:
    tenth = 0

    def advance(done: int, name: str) -> None:
        nonlocal tenth
        before, tenth = tenth, 10 * done // total
        if tenth > before and len(_loops) == 1:
            print(f"jitmoe: {what} {done}/{total} {name}".rstrip(), file=sys.stderr, flush=True)

    _loops.append(what)
    try:
        yield advance
    finally:
        _loops.remove(what)


@contextmanager
def _bar(total: int, what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    outermost = not _bars
    if outermost:
        texts = (TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[name]}"))
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *texts)
        # No thread redraws the bar, for it would disturb measurements: each item that is done draws it.
        _bars.append(Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True))
        _bars[0].start()
    bars = _bars[0]
    task = bars.add_task(what, total=total, name="")
    bars.refresh()
    try:
        yield lambda done, name: bars.update(task, completed=done, name=name, refresh=True)
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            _bars.clear()
