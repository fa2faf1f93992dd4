"""Prints for commands: tables, errors, and names that a terminal may be unable to show."""

import io
import sys
from collections.abc import Sequence

from jitmoe import text


def table(rows: Sequence[Sequence[str]], head: bool = True) -> None:
    """Print ``rows``, of which the first is the head, as a rich table on a terminal and as aligned text elsewhere."""
    if not sys.stdout.isatty():
        print(text.table(rows), flush=True)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, show_header=head, pad_edge=False)
    for title in rows[0]:
        grid.add_column(title if head else "", overflow="fold")
    for row in rows[1 if head else 0 :]:
        grid.add_row(*row)
    # Cells are names and paths, in which brackets and colons are no markup.
    Console(markup=False, emoji=False, highlight=False).print(grid)


def fail(message: str) -> None:
    """Say on stderr why the command ends."""
    print(f"jitmoe: {message}", file=sys.stderr)


def escape_unknown_characters() -> None:
    """Let both streams escape characters that their encoding lacks, as in names of files, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
