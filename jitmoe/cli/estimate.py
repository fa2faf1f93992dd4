"""``jitmoe estimate``."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from jitmoe.cli.estimate_nodes import Nodes
from jitmoe.cli.options import REQUIRED, ConfigOptions, takes_config
from jitmoe.errors import ConfigError
from jitmoe.memory.presets import PRESETS

MODEL = f"config.json of a transformers model, or one of {', '.join(PRESETS)}"

PANEL = "several machines"


def _nodes(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=PANEL)


@takes_config
def estimate(
    config: ConfigOptions,
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", help=MODEL)] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="T, tokens of one call")] = 4096,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="layers with experts; default: the model's, or 1")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="threads of a call; default: all CPUs")] = None,
    inference: Annotated[bool, typer.Option("--inference", help="no gradients, optimizer and saved tensors")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="save nothing for backward and compute gate and up again there")
    ] = False,
    memory_budget: Annotated[
        int | None, typer.Option(metavar="BYTES", help="compare one layer and its call with this memory_budget")
    ] = None,
    nodes: Annotated[
        str | None,
        _nodes("N,N,...", "predict a step of --tokens tokens a machine, experts shared out among N machines"),
    ] = None,
    network: Annotated[float, _nodes("GBIT", "line rate of each machine, Gbit/s")] = 100.0,
    zipf: Annotated[float, _nodes("S", "skew of the routing: the n-th most popular expert has odds n^-S")] = 0.0,
    dense: Annotated[
        float | None, _nodes("N", "billions of parameters beside the routed experts; default: the preset's, or 0")
    ] = None,
    node_tflops: Annotated[float | None, _nodes("N", "peak of a machine in bfloat16, TFLOP/s")] = None,
    node_bandwidth: Annotated[float | None, _nodes("N", "memory bandwidth of a machine, GB/s")] = None,
    node_memory: Annotated[float, _nodes("GB", "memory of a machine")] = 512.0,
    check_nodes: Annotated[
        bool,
        typer.Option(
            "--check-nodes",
            rich_help_panel=PANEL,
            help="with --nodes: run a step of one layer on that many processes here, compare bytes, print times",
        ),
    ] = False,
) -> None:
    """Print how much memory a model's experts will take; with --nodes, what a step takes on several machines."""
    from jitmoe.memory.estimate import Load
    from jitmoe.memory.estimate import estimate as estimate_load
    from jitmoe.memory.model import read_model

    sizes = {name: getattr(config, name) for name in REQUIRED if getattr(config, name) is not None}
    found = None if model is None else read_model(model, sizes, layers)
    made = config.make(found.fields if found else None, recompute=recompute or None, memory_budget=memory_budget)
    if layers is None:
        layers = found.layers if found else 1
    if nodes is not None:
        found_nodes = Nodes(network, zipf, dense, node_tflops, node_bandwidth, node_memory)
        print(found_nodes.answer(made, str(model or "a model"), nodes, layers, tokens, not inference, check_nodes))
        return
    if check_nodes:
        raise ConfigError("--check-nodes goes with --nodes")
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    print(estimate_load(Load(made, tokens, layers, threads, training=not inference)))
    for note in found.notes if found else ():
        print(f"Note: {note}.")
