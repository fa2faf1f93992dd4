"""``jitmoe cache``."""

import os

import typer

from jitmoe.cli import console
from jitmoe.jit import location

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
