"""``jitmoe cache``."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jitmoe.cli import console
from jitmoe.errors import KernelError
from jitmoe.jit import exchange, location
from jitmoe.jit.exchange import Moved

app = typer.Typer(help="Where compiled kernels are kept.")


@app.command()
def path() -> None:
    """Print the cache directory."""
    # Scripts need the bytes of the path, whatever the terminal can show.
    typer.echo(os.fsencode(location.location()))


@app.command("list")
def list_kernels() -> None:
    """List the kernels in it and whether each is intact."""
    entries = location.open_place().entries()
    rows = [("kernel", "state", "KiB", "compiler", "directory")]
    for entry in entries:
        state = "intact" if entry.intact else "damaged"
        origin = (str(entry.meta.get("compiler", "?")), str(entry.directory))
        rows.append((str(entry.meta.get("name", "?")), state, f"{entry.nbytes / 1024:.0f}", *origin))
    if entries:
        console.table(rows)
    else:
        print(f"no kernels in {location.location()}")


@app.command()
def clear() -> None:
    """Remove them all; the next use compiles again."""
    store = location.open_place().writable()
    print(f"removed {store.clear()} kernels from {store.root}")


@app.command("export")
def export_kernels(file: Annotated[Path, typer.Argument(metavar="FILE", help="to be written")]) -> None:
    """Write all kernels to one file, for machines without a compiler."""
    try:
        moved = exchange.export_kernels(file, location.open_place())
    except OSError as error:
        raise KernelError(f"{file} cannot be written: {error}") from error
    _print_moved(moved)
    with file.open("rb") as stream:
        print(f"sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()}")


@app.command("import")
def import_kernels(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="from `jitmoe cache export`; code that you trust")],
    sha256: Annotated[str | None, typer.Option(metavar="DIGEST", help="that `jitmoe cache export` printed")] = None,
) -> None:
    """Bring the kernels of a file into the cache; exit 1 if none fits this machine."""
    try:
        moved = exchange.import_kernels(file, location.open_place(), sha256)
    except OSError as error:
        raise KernelError(f"{file} cannot be read: {error}") from error
    _print_moved(moved)
    if not any(kernel.usable for kernel in moved):
        raise KernelError(f"no kernel of {file} can be used here")


def _print_moved(moved: Sequence[Moved]) -> None:
    console.table([("kernel", "outcome"), *((kernel.name, kernel.outcome) for kernel in moved)])
