"""``jitmoe convert``."""

from pathlib import Path
from typing import Annotated

import typer

from jitmoe.hf.adapters.names import FormatName


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder of an adapter, or a file of jitmoe's")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="folder to write; a file for jitmoe's")],
    target: Annotated[FormatName, typer.Option("--to", help="layout to write")],
    origin: Annotated[FormatName | None, typer.Option("--from", help="layout of SRC; default: told by it")] = None,
    interleaved: Annotated[
        bool | None,
        typer.Option("--interleaved/--concatenated", help="rows of gate and up in gate_up_proj; gpt-oss's alternate"),
    ] = None,
    lora_alpha: Annotated[float | None, typer.Option(metavar="A", help="for SRC without a config")] = None,
    drop_others: Annotated[
        bool, typer.Option("--drop-others", help="leave out LoRA outside the experts that DST has no place for")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace DST")] = False,
) -> None:
    """Convert LoRA of experts between the layouts of PEFT, vLLM, SGLang, KTransformers and jitmoe."""
    from jitmoe.hf.adapters import convert as adapters

    done = adapters.convert(
        source,
        destination,
        target,
        origin,
        interleaved=interleaved,
        lora_alpha=lora_alpha,
        drop_others=drop_others,
        force=force,
    )
    layers = done.adapter.layers
    experts = " or ".join(map(str, sorted({len(layer.gate.a) for layer in layers})))
    print(f"{done.source} -> {done.target}: {len(layers)} layer(s) of {experts} experts, written to {destination}")
    for note in done.notes:
        print(f"NOTE: {note}")
