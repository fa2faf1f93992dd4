"""The parts of the fine-tuning example: pre-train a base, put experts into it, train their adapters."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from model import BASE_NAMES, DecoderLM, ModelConfig, PlainExperts
from report import Curves
from safetensors.torch import load_file, save_file
from text import Corpus, all_windows, random_batches
from torch import Tensor, nn

import jitmoe
from jitmoe.progress import track

MODEL = ModelConfig()
BATCH = 16
LEARNING_RATE = 5e-3

MakeExperts = Callable[[int, nn.Module], nn.Module]
Adapter = dict[str, Tensor]


def pretrain(corpus: Corpus, steps: int, seed: int, path: Path) -> None:
    """Train the whole model in float32 and write it, its experts in bfloat16."""
    torch.manual_seed(seed)
    model = DecoderLM(MODEL)
    batches = random_batches(corpus.pretraining, BATCH, MODEL.context, steps, seed)
    for _ in train_steps("pre-training", model, batches, steps, learning_rate=4e-3):
        pass
    is_base = {name: name.endswith(BASE_NAMES) for name in model.state_dict()}
    save_file({name: t.bfloat16() if is_base[name] else t for name, t in model.state_dict().items()}, path)


def train_steps(
    name: str, model: DecoderLM, batches: Iterable[Tensor], steps: int, learning_rate: float
) -> Iterable[float]:
    """Train what requires a gradient, with one rise and fall of the learning rate; yields the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = optimizer_of(parameters, steps, learning_rate)
    for batch in track(batches, steps, f"{name} step"):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def optimizer_of(
    parameters: list[nn.Parameter], steps: int, learning_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and one rise and fall of its learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: math.sin(math.pi * ((step + 1) / (steps + 1)) ** 0.5)
    )
    return optimizer, schedule


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
    between = max(1, steps // 4)
    start = time.perf_counter()
    for step, loss in enumerate(train_steps(name, model, batches, steps, learning_rate=LEARNING_RATE), start=1):
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
