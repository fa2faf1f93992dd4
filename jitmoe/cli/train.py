"""``jitmoe train``."""

from pathlib import Path
from typing import Annotated

import typer

from jitmoe.cli import console
from jitmoe.hf.train.options import Options


def train(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="checkpoint of transformers, with its tokenizer")],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA.jsonl",
            help="rows of text, of messages (chat template), or of prompt and completion (of which the latter counts)",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="new folder for the results; default: MODEL_DIR's name and -lora")
    ] = None,
    rank: Annotated[int, typer.Option(metavar="N", help="r of LoRA, on all experts and on attention's q, k, v, o")] = 8,
    alpha: Annotated[float, typer.Option(metavar="A", help="LoRA's scale is alpha / r")] = 16.0,
    lr: Annotated[float, typer.Option(metavar="X", help="learning rate of AdamW, falling linearly to 0")] = 2e-4,
    epochs: Annotated[float | None, typer.Option(metavar="X", help="passes over the data; default: 1")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="optimizer steps, instead of epochs")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="rows of a step")] = 4,
    max_length: Annotated[int, typer.Option(metavar="N", help="tokens of a row; longer rows are cut")] = 1024,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest complete checkpoint in the output folder")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="of LoRA's first values and the order of the rows")] = 0,
    memory_budget: Annotated[
        int | None, typer.Option(metavar="BYTES", help="refuse to hold more; default: the machine's free memory")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="steps between checkpoints; default: a tenth of the run")
    ] = None,
) -> None:
    """Fine-tune a model with LoRA on its experts and attention."""
    if epochs is not None and steps is not None:
        raise typer.BadParameter("--steps is not allowed with --epochs")
    options = Options(
        model, data, output or Path(f"{model.resolve().name}-lora"), rank, alpha, lr,
        1.0 if epochs is None else epochs, steps, batch_size, max_length, resume, seed, memory_budget, save_every,
    )  # fmt: skip
    require_packages()
    from jitmoe.hf.train.job import prepare
    from jitmoe.hf.train.run import run

    prepared = prepare(options)
    console.table(prepared.facts(), head=False)
    print()
    console.table(prepared.estimate.rows())
    for note in prepared.notes():
        print(note, flush=True)
    for line in run(prepared):
        print(line, flush=True)


def require_packages() -> None:
    """Say what is to be installed, before an import fails in the middle."""
    from importlib.util import find_spec

    from jitmoe.errors import TrainError

    missing = [name for name in ("transformers", "peft", "accelerate") if find_spec(name) is None]
    if missing:
        raise TrainError(f"jitmoe train needs {', '.join(missing)}: pip install 'jitmoe[hf]'")
