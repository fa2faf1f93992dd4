"""Fine-tune LoRA adapters on the frozen experts of a language model, beside plain torch on the same batches.

A small decoder is pre-trained on Python's help texts and saved. From that file three runs train the same adapters,
from the same values, on the same batches of Python source: through jitmoe, through plain bfloat16 torch (the
reference), and through plain float32 torch. The distance between the last two is what bfloat16 explains: the distance
between jitmoe and the reference may be FACTOR times as large, and the validation loss must fall. Else the exit
status is 1.
"""

import argparse
import os
import sys
from pathlib import Path

# Both are read when torch is first imported. Threads that sleep while they wait cost little on an idle machine and
# save much on a shared one; and the plain experts call oneDNN with more sizes than its cache usually holds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "50000")

import torch
from report import Curves, draw, table
from text import load_corpus
from training import (
    MODEL,
    adapter_of,
    finetune,
    jitmoe_experts,
    load_model,
    plain_experts,
    pretrain,
    reloaded_loss,
    save_adapter,
)

import jitmoe
from jitmoe.isa import ISAS

FACTOR = 3.0
"""Two runs that each round to bfloat16 in their own places are sqrt(2) times as far from each other as one of them is
from float32, if nothing else differs; the rest is room for the largest of many differences being a matter of luck."""


def main() -> int:
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    config = jitmoe.MoEConfig(
        MODEL.experts, MODEL.hidden, MODEL.intermediate, MODEL.top_k, lora_rank=8, lora_alpha=16.0, isa=options.isa
    )
    jitmoe.build(config, progress=True)

    corpus = load_corpus()
    base = options.out / "base.safetensors"
    pretrain(corpus, options.pretrain_steps, options.seed, base)

    torch.manual_seed(options.seed)
    model = load_model(base, jitmoe_experts(config), torch.bfloat16)
    adapter = {name: parameter.detach().clone() for name, parameter in adapter_of(model).items()}
    ours = finetune("jitmoe", model, corpus, options.steps, options.seed)
    save_adapter(model, options.out / "adapter.safetensors")
    reloaded = reloaded_loss(base, config, options.out / "adapter.safetensors", corpus)

    others = []
    for name, dtype in (("torch bfloat16", torch.bfloat16), ("torch float32", torch.float32)):
        model = load_model(base, plain_experts(adapter, config.lora_scale, dtype), dtype)
        others.append(finetune(name, model, corpus, options.steps, options.seed))
    reference, exact = others

    bound = FACTOR * reference.largest_difference(exact)
    draw(ours, reference, bound, options.out / "loss.png")
    print("\n" + table(ours, others))
    return verdict(ours, reference, bound, reloaded)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="directory to write to (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=60, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument(
        "--pretrain-steps", type=positive, default=100, help="steps for the base (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the values and the batches (default: %(default)s)")
    parser.add_argument(
        "--isa", default="auto", choices=("auto", *ISAS), help="instruction set of the kernels (default: %(default)s)"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def verdict(ours: Curves, reference: Curves, bound: float, reloaded: float) -> int:
    """Exit status: 0 where everything this example promises holds; says which does not."""
    difference = ours.largest_difference(reference)
    promises = {
        f"validation loss falls: {ours.before:.4f} -> {ours.after:.4f}": ours.after < ours.before,
        f"largest difference from the reference {difference:.4f} <= {bound:.4f}, "
        f"which is {FACTOR:g} x what separates {reference.name} from float32": difference <= bound,
        f"the saved adapter, loaded into a new model, gives the same loss: {reloaded:.4f}": reloaded == ours.after,
    }
    for promise, holds in promises.items():
        print(f"{'ok    ' if holds else 'FAILED'}  {promise}")
    return 0 if all(promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
