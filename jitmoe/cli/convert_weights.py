"""``jitmoe convert-weights``."""

from pathlib import Path
from typing import Annotated

import typer

from jitmoe.hf.quantizing.names import WrittenFormat


def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder of a transformers checkpoint in safetensors")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="folder to make; it must not exist")],
    weight_format: Annotated[WrittenFormat, typer.Option("--format", help="of the experts in DST")],
    group_size: Annotated[int, typer.Option(metavar="32|64|128", help="inputs that share a scale in int4_group")] = 32,
    max_shard_size: Annotated[int, typer.Option(metavar="BYTES", help="of tensors in a file")] = 2_000_000_000,
) -> None:
    """Quantise the experts of a checkpoint, in a layout that others read too. Everything else is copied."""
    from jitmoe.hf.quantizing.convert import write
    from jitmoe.hf.quantizing.plan import Plan

    plan = Plan(source, weight_format, group_size, max_shard_size)
    print(plan, flush=True)
    for note in plan.notes:
        print(f"NOTE: {note}", flush=True)
    print(write(plan, destination))
    print(f"written to {destination}")
