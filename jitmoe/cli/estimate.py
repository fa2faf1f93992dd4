"""``jitmoe estimate``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from jitmoe.cli.options import REQUIRED, ConfigOptions, takes_config


@takes_config
def estimate(
    config: ConfigOptions,
    model: Annotated[Path | None, typer.Argument(metavar="config.json", help="of a transformers model")] = None,
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
) -> None:
    """Print how much memory a model's experts will take."""
    from jitmoe.memory.estimate import Load
    from jitmoe.memory.estimate import estimate as estimate_load
    from jitmoe.memory.model import read_model

    sizes = {name: getattr(config, name) for name in REQUIRED if getattr(config, name) is not None}
    found = None if model is None else read_model(model, sizes, layers)
    made = config.make(found.fields if found else None, recompute=recompute or None, memory_budget=memory_budget)
    if layers is None:
        layers = found.layers if found else 1
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    print(estimate_load(Load(made, tokens, layers, threads, training=not inference)))
    for note in found.notes if found else ():
        print(f"Note: {note}.")
