"""``jitmoe check``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jitmoe.cli import console
from jitmoe.cli.options import ConfigOptions, takes_config
from jitmoe.cli.replay import show_comparison
from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.oracle.workloads import find_workload

if TYPE_CHECKING:
    from jitmoe.experts.layer import MoELayer
    from jitmoe.oracle.yardstick import Inputs

DEFAULT = "W1"
"""The sizes at which the ancestor's first NaN was logged."""

Mode = Literal["accuracy", "perf", "real_data", "debug"]


@takes_config
def check(
    config: ConfigOptions,
    workload: Annotated[
        str | None,
        typer.Argument(metavar="WORKLOAD", help="sizes by name, as in bench; default without sizes: W1"),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="accuracy: all results beside float64 and plain torch; perf: times beside this machine's ceilings; "
            "real_data: a captured call; debug: expert by expert, to the first step that deviates"
        ),
    ] = "accuracy",
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="T, tokens of the call; default: the workload's, or 48")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="the call of real_data, as for replay")] = None,
) -> None:
    """Hold the layer to the error rule; exit 1 outside of it."""
    named = find_workload(workload or DEFAULT)
    use_named = workload is not None or not config.sizes_given
    made = config.make(asdict(named.config("auto")) if use_named else None)
    if (mode == "real_data") != (data is not None):
        raise ConfigError("--mode real_data takes its call from --data FILE; the other modes make their own")
    if data is not None:
        _check_recording(data, config.isa)
    elif mode == "perf":
        _show_speed(made, named.tokens if tokens is None else tokens)
    else:
        _check_random_call(made, named.tokens if tokens is None else tokens, debug=mode == "debug")


def _check_recording(data: Path, isa: str | None) -> None:
    from jitmoe.inspect.recording import read_recording
    from jitmoe.inspect.replay import Replay

    again = Replay(read_recording(data), isa)
    print(again.summary())
    show_comparison(again, traced=False)


def _show_speed(config: MoEConfig, tokens: int) -> None:
    from jitmoe.bench import machine, report
    from jitmoe.bench.contenders import refuse_watching
    from jitmoe.inspect.check import measure_speed

    refuse_watching()
    print(report.machine_lines(machine.describe()))
    print(report.outcome_table(measure_speed(config, tokens)))


def _check_random_call(config: MoEConfig, tokens: int, debug: bool) -> None:
    from jitmoe.inspect.check import make_call, make_layer

    inputs = make_call(config, tokens)
    layer = make_layer(config, inputs)
    print(f"{tokens} tokens, {layer}")
    if debug:
        _show_stages(layer, inputs)
    else:
        _show_accuracy(layer, inputs)


def _show_stages(layer: "MoELayer", inputs: "Inputs") -> None:
    from jitmoe.inspect.debug import stages

    for stage in stages(layer, inputs):
        print(stage, flush=True)
        if stage.deviation is not None:
            raise typer.Exit(1)


def _show_accuracy(layer: "MoELayer", inputs: "Inputs") -> None:
    from jitmoe.inspect.check import comparisons
    from jitmoe.inspect.replay import conclusion

    faults = []
    for what, comparison in comparisons(layer, inputs):
        faults += [f"{name} ({what})" for name in comparison.faults]
        print(f"\n{what}")
        console.table(comparison.rows())
    print(f"\n{conclusion(faults)}")
    if faults:
        raise typer.Exit(1)
