"""The ``jitmoe`` command: registers the commands and runs one."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from jitmoe import settings
from jitmoe.cli import cache, console
from jitmoe.cli.bench import bench
from jitmoe.cli.build import build
from jitmoe.cli.check import check
from jitmoe.cli.convert import convert
from jitmoe.cli.convert_weights import convert_weights
from jitmoe.cli.doctor import doctor
from jitmoe.cli.estimate import estimate
from jitmoe.cli.replay import replay
from jitmoe.cli.show import show
from jitmoe.cli.train import train
from jitmoe.errors import JitmoeError
from jitmoe.version import __version__

VARIABLES = "Environment variables: " + "; ".join(
    f"{setting.variable}: {setting.meaning}" for setting in settings.SETTINGS.values()
)

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.command(epilog=VARIABLES)(doctor)
for command in (build, show, bench, estimate, replay, check, convert, convert_weights, train):
    app.command()(command)
app.add_typer(cache.app, name="cache")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, or 1 after a message on stderr (2: wrong usage)."""
    console.escape_unknown_characters()
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has ended. Python flushes at exit, and would fail again without this.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(argv: Sequence[str]) -> int:
    try:
        # app(argv) would replace the interpreter's hook for exceptions.
        typer.main.get_command(app).main(list(argv), prog_name="jitmoe")
    except JitmoeError as error:
        console.fail(str(error))
        return 1
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jitmoe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixture-of-Experts kernels for CPUs, compiled here."""
