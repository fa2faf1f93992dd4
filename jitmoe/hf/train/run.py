"""A training run: load, train with transformers' Trainer, save the adapter."""

import io
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from jitmoe.files import replacing_folder
from jitmoe.hf import models, reporting
from jitmoe.hf.loading import from_pretrained
from jitmoe.hf.train import checkpoints, picture
from jitmoe.hf.train.callbacks import Progress, Seals, duration
from jitmoe.hf.train.job import Job

ADAPTER, PICTURE = "adapter", "loss.png"


def run(job: Job) -> Iterator[str]:
    """Load, train and save; yields what is to be said, as it happens.

    Raises:
        BudgetError: it will not fit into memory; nothing was loaded.
        TrainError: the output folder has something else in it, or a loss is not finite.
    """
    job.estimate.check()
    output = job.options.output
    resume, notes = checkpoints.begin(output, job.options.resume, job.run)
    yield from notes
    # Resumed after its last step, the Trainer would take one more.
    if resume is None or checkpoints.step_of(resume) < job.steps:
        yield from _train(job, resume)
    yield from _finish(job, checkpoints.find(output).complete[-1])


def _train(job: Job, resume: Path | None) -> Iterator[str]:
    output, model = job.options.output, _load(job)
    yield from summary(model)
    began = time.perf_counter()
    trainer, progress = _trainer(job, model)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except KeyboardInterrupt:
        for folder in checkpoints.find(output).incomplete:
            checkpoints.remove(folder)
        newest = [path.name for path in checkpoints.find(output).complete][-1:]
        left = f"{newest[0]} is complete: go on with --resume" if newest else "there is no checkpoint yet"
        print(f"jitmoe: interrupted at step {trainer.state.global_step}; {left}", file=sys.stderr)
        raise
    finally:
        progress.close()
    yield f"trained for {duration(time.perf_counter() - began)}, {trainer.state.num_input_tokens_seen} tokens"


def _load(job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    options = job.options
    base = from_pretrained(options.model, local_files_only=True)
    base.config.use_cache = False
    models.pack(base)  # it is packed already, and now knows its kernels
    torch.manual_seed(options.seed)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=list(job.sketch.attention) or None,
        target_parameters=list(job.sketch.parameters),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def summary(model: Any) -> Iterator[str]:
    """The report of :func:`jitmoe.hf.report`, one line for all experts modules that are alike."""
    with redirect_stdout(io.StringIO()):
        lines = reporting.report(model).splitlines()
    alike: dict[str, list[str]] = {}
    for line in lines:
        name, _, state = line.partition(": ")
        alike.setdefault(state, []).append(name)
    for state, names in alike.items():
        yield f"{len(names)} experts modules: {state}" if len(names) > 1 else f"{names[0]}: {state}"


def _trainer(job: Job, model: Any) -> tuple[Any, Progress]:
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    options = job.options
    arguments = TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.batch_size,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        learning_rate=options.lr,
        seed=options.seed,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        # The Trainer would show the mean of former losses in the place of one that is not finite.
        logging_nan_inf_filter=False,
        save_steps=options.save_every or max(1, job.steps // 10),
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
    )
    progress = Progress()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=job.data.rows,
        data_collator=DataCollatorForSeq2Seq(job.tokenizer),
        callbacks=[progress, Seals()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, progress


def _finish(job: Job, newest: Path) -> Iterator[str]:
    """Adapter and picture, from the checkpoint of the last step."""
    output = job.options.output
    with replacing_folder(output / ADAPTER) as folder:
        for path in newest.glob("adapter_*"):
            shutil.copy(path, folder)
    yield f"adapter: {output / ADAPTER}, for peft.PeftModel.from_pretrained"
    losses = checkpoints.losses_in(newest)
    yield f"loss: {losses[0][1]:.4f} at step {losses[0][0]}, {losses[-1][1]:.4f} at step {losses[-1][0]}"
    if picture.can_draw():
        picture.draw(losses, f"{job.options.model.name}, LoRA of rank {job.options.rank}", output / PICTURE)
        yield f"picture: {output / PICTURE}"
