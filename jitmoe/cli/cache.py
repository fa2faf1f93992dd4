"""``jitmoe cache``."""

import os

import typer

from jitmoe.cli import console
from jitmoe.jit import cache

app = typer.Typer(help="Where compiled kernels are kept.")


@app.command()
def path() -> None:
    """Print the cache directory."""
    # Scripts need the bytes of the path, whatever the terminal can show.
    typer.echo(os.fsencode(cache.location()))


@app.command("list")
def list_kernels() -> None:
    """List the kernels in it and whether each is intact."""
    entries = cache.open_cache().entries()
    rows = [("kernel", "state", "KiB", "compiler", "directory")]
    for entry in entries:
        size = sum(path.stat().st_size for path in entry.directory.iterdir()) / 1024
        state = "intact" if entry.intact else "damaged"
        origin = (str(entry.meta.get("compiler", "?")), str(entry.directory))
        rows.append((str(entry.meta.get("name", "?")), state, f"{size:.0f}", *origin))
    if entries:
        console.table(rows)
    else:
        print(f"no kernels in {cache.location()}")


@app.command()
def clear() -> None:
    """Remove them all; the next use compiles again."""
    store = cache.open_cache()
    print(f"removed {store.clear()} kernels from {store.root}")
