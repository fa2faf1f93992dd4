"""``jitmoe replay``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jitmoe.cli import console
from jitmoe.errors import ConfigError, TraceError
from jitmoe.isa import IsaChoice

if TYPE_CHECKING:
    from jitmoe.inspect.replay import Replay


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="of layer.capture(), or of the log's format")],
    isa: Annotated[IsaChoice | None, typer.Option(help="default: that of the file, or the best usable one")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(metavar="A", help="for a file of the log's format that does not say")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="look into each step of both passes: the first value that is not finite")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="with --trace, draw steps by experts")] = None,
) -> None:
    """Compute a captured call again, beside float64 and plain torch."""
    _check_plot(plot, trace)
    from jitmoe.inspect.recording import read_recording
    from jitmoe.inspect.replay import Replay

    again = Replay(read_recording(file, lora_alpha), isa)
    print(again.summary())
    if trace:
        # The comparison takes much longer, so it comes later.
        report = again.trace()
        print(f"\n{again.expert_numbers(report)}{report.table()}\n", flush=True)
        if plot is not None:
            report.save_png(plot)
    show_comparison(again, traced=trace)


def show_comparison(again: "Replay", traced: bool) -> None:
    """Print our results beside the others.

    Raises:
        typer.Exit: with 1 if a result is outside the error rule. A NaN that came with the call is within it.
    """
    from jitmoe.inspect.replay import conclusion

    comparison = again.compare()
    console.table(comparison.rows())
    print(f"\n{conclusion(comparison.faults)}")
    if not (traced or comparison.oracle_is_finite):
        print("float64 gives values that are not finite too: --trace says where the first one comes from")
    if comparison.faults:
        raise typer.Exit(1)


def _check_plot(plot: Path | None, trace: bool) -> None:
    """Refuse before the call is computed what would fail after it."""
    if plot is None:
        return
    if not trace:
        raise ConfigError("--plot draws what --trace finds: give both")
    folder = plot.absolute().parent
    if plot.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise TraceError(f"{plot} cannot be written: name a file in a folder that exists and is writable")
