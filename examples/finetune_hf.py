"""Fine-tune a Mixture-of-Experts model with stock transformers, PEFT and Trainer. jitmoe adds the two lines so marked.

Without MODEL a tiny Qwen3-MoE with a tokenizer of its own is trained on Python's help texts first, and is the base.
Then LoRA on all experts and on attention learns Python source, of which a part is held out. MODEL is a folder with any
checkpoint of transformers whose experts jitmoe computes, and its tokenizer. The validation loss must fall, else the
exit status is 1.
"""

import argparse
import os
import sys
from pathlib import Path

# Threads that sleep while they wait cost little on an idle machine and save much on a shared one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from base_hf import make_base
from finetune import positive
from peft import LoraConfig, get_peft_model
from report_hf import Lines, draw
from text import load_corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments
from windows import Windows

import jitmoe.hf

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def main() -> int:
    options = parse_options()
    corpus = load_corpus()
    base = options.model or make_base(options.out / "base", corpus.pretraining, options.pretrain_steps, options.seed)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    jitmoe.hf.register()  # jitmoe, line one
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16,
        local_files_only=True,
        experts_implementation="jitmoe",  # jitmoe, line two
    )
    experts = [name for name, _ in model.named_parameters() if name.endswith(EXPERTS)]
    torch.manual_seed(options.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION, target_parameters=experts, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        bf16=True,
        use_cpu=True,
        seed=options.seed,
        logging_steps=1,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(corpus.train, tokenizer, options.length),
        eval_dataset=Windows(corpus.validation, tokenizer, options.length),
        callbacks=[Lines("fine-tuning")],
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if not trainer.is_world_process_zero():  # under torchrun all processes have the same adapter
        return 0 if after < before else 1
    model.save_pretrained(options.out / "adapter")

    jitmoe.hf.report(model)
    losses = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    draw(losses, {0: before, options.steps: after}, options.out / "loss.png")
    print(f"{'ok    ' if after < before else 'FAILED'}  validation loss falls: {before:.4f} -> {after:.4f}")
    return 0 if after < before else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=folder, metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo-hf"), help="directory to write to (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=60, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument(
        "--pretrain-steps", type=positive, default=120, help="steps for the base (default: %(default)s)"
    )
    parser.add_argument("--length", type=positive, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the values and the batches (default: %(default)s)")
    return parser.parse_args()


def folder(text: str) -> Path:
    path = Path(text)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is not a folder with config.json, weights and tokenizer")
    return path


if __name__ == "__main__":
    sys.exit(main())
