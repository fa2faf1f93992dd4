"""Fine-tune LoRA adapters on the frozen experts of a language model, beside plain torch on the same batches.

A small decoder is pre-trained on one part of Python's help texts and saved. From that file three runs train the same
adapters, from the same values, on the same batches of another part: through jitmoe, through plain bfloat16 torch (the
reference), and through plain float32 torch. The distance between the last two is what bfloat16 explains: the distance
between jitmoe and the reference may be FACTOR times as large, and the validation loss must fall. Else the exit
status is 1.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from model import BASE_NAMES, DecoderLM, ModelConfig, PlainExperts
from report import Curves, draw, table
from safetensors.torch import load_file, save_file
from text import Corpus, all_windows, load_corpus, random_batches
from torch import Tensor, nn
from tqdm import tqdm

import jitmoe

MODEL = ModelConfig()
BATCH = 16
FACTOR = 3.0
"""Two runs that each round to bfloat16 in their own places are sqrt(2) times as far from each other as one of them is
from float32, if nothing else differs; the rest is room for the largest of many differences being a matter of luck."""

MakeExperts = Callable[[int, nn.Module], nn.Module]
Adapter = dict[str, Tensor]


def main() -> int:
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus()
    base = options.out / "base.safetensors"
    pretrain(corpus, options.pretrain_steps, options.seed, base)

    config = jitmoe.MoEConfig(
        MODEL.experts, MODEL.hidden, MODEL.intermediate, MODEL.top_k, lora_rank=8, lora_alpha=16.0, isa=options.isa
    )
    jitmoe.build(config, progress=True)
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
    parser.add_argument("--steps", type=positive, default=120, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument(
        "--pretrain-steps", type=positive, default=200, help="steps for the base (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the values and the batches (default: %(default)s)")
    parser.add_argument("--isa", default="auto", help="instruction set of the kernels (default: %(default)s)")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def pretrain(corpus: Corpus, steps: int, seed: int, path: Path) -> None:
    """Train the whole model in float32 and write it, its experts in bfloat16."""
    torch.manual_seed(seed)
    model = DecoderLM(MODEL)
    batches = random_batches(corpus.pretraining, BATCH, MODEL.context, steps, seed)
    for _ in train_steps("pre-training", model, batches, steps, learning_rate=2e-3):
        pass
    is_base = {name: name.endswith(BASE_NAMES) for name in model.state_dict()}
    save_file({name: t.bfloat16() if is_base[name] else t for name, t in model.state_dict().items()}, path)


def train_steps(
    name: str, model: DecoderLM, batches: Iterable[Tensor], steps: int, learning_rate: float
) -> Iterable[float]:
    """Train what requires a gradient, with one rise and fall of the learning rate; yields the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: math.sin(math.pi * ((step + 1) / (steps + 1)) ** 0.5)
    )
    start = time.perf_counter()
    with tqdm(batches, desc=f"{name:14}", total=steps, unit="step", dynamic_ncols=True) as bar:
        for step, batch in enumerate(bar, start=1):
            loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            speed = step * BATCH * MODEL.context / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:.0f} tokens/s")
            yield loss.item()


def jitmoe_experts(config: jitmoe.MoEConfig) -> MakeExperts:
    """Makes the layer that this example is about from a block's plain experts."""
    return lambda layer, old: jitmoe.MoELayer(config, *base_of(old).values())


def plain_experts(adapter: Adapter, scale: float, dtype: torch.dtype) -> MakeExperts:
    """Makes plain experts in ``dtype`` that start from the same adapter."""

    def make(layer: int, old: nn.Module) -> nn.Module:
        prefix = f"blocks.{layer}.experts."
        own = {name.removeprefix(prefix): t.clone() for name, t in adapter.items() if name.startswith(prefix)}
        experts = PlainExperts({name: t.to(dtype) for name, t in base_of(old).items()}, own, scale)
        for name in BASE_NAMES:
            experts.get_parameter(name).requires_grad_(False)
        return experts

    return make


def base_of(experts: nn.Module) -> dict[str, Tensor]:
    return {name: experts.get_parameter(name).detach().bfloat16() for name in BASE_NAMES}


def load_model(base: Path, make: MakeExperts, dtype: torch.dtype) -> DecoderLM:
    """The frozen model of the file, with experts by ``make`` that are called in ``dtype``."""
    model = DecoderLM(MODEL)
    model.load_state_dict(load_file(base))
    model.replace_experts(make, dtype)
    return model


def adapter_of(model: DecoderLM) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def finetune(name: str, model: DecoderLM, corpus: Corpus, steps: int, seed: int) -> Curves:
    """Train the adapter; the time is that of the training steps alone."""
    curves = Curves(name, tokens=steps * BATCH * MODEL.context)
    batches = random_batches(corpus.train, BATCH, MODEL.context, steps, seed + 1)
    curves.validation[0] = validation_loss(model, corpus)
    between = max(1, steps // 6)
    start = time.perf_counter()
    for step, loss in enumerate(train_steps(name, model, batches, steps, learning_rate=2e-3), start=1):
        curves.train.append(loss)
        if step % between == 0 or step == steps:
            curves.seconds += time.perf_counter() - start
            curves.validation[step] = validation_loss(model, corpus)
            start = time.perf_counter()
    return curves


def validation_loss(model: DecoderLM, corpus: Corpus) -> float:
    with torch.no_grad():
        return model.loss(all_windows(corpus.validation, MODEL.context)).item()


def save_adapter(model: DecoderLM, path: Path) -> None:
    save_file({name: parameter.detach() for name, parameter in adapter_of(model).items()}, path)


def reloaded_loss(base: Path, config: jitmoe.MoEConfig, path: Path, corpus: Corpus) -> float:
    """Validation loss of a new model with the adapter of the file."""
    model = load_model(base, jitmoe_experts(config), torch.bfloat16)
    saved, parameters = load_file(path), adapter_of(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return validation_loss(model, corpus)


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
