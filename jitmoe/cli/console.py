"""What commands print: tables, errors, and names that a terminal may not be able to show."""

import io
import sys
from collections.abc import Sequence

from jitmoe import text


def table(rows: Sequence[Sequence[str]], head: bool = True) -> None:
    """Print ``rows``, the first of them the head: lines and bold type on a terminal, else plain aligned text."""
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
    # Cells are names and paths: a bracket or a colon in them is no markup.
    Console(markup=False, emoji=False, highlight=False).print(grid)


def fail(message: str) -> None:
    """Say on stderr why the command ends."""
    print(f"jitmoe: {message}", file=sys.stderr)


def escape_unknown_characters() -> None:
    """From now on stdout shows what its encoding lacks, as in names of files, escaped; else it would raise."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
