"""The model without its weights: what it consists of, and what torch will hold of it, from shapes alone."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jitmoe.errors import TrainError, UnsupportedExpertsError
from jitmoe.formats import Packing
from jitmoe.hf.checkpoint import Checkpoint
from jitmoe.hf.layout import PARTS
from jitmoe.hf.shipped.source import Source
from jitmoe.hf.understand import Understood, class_name, is_experts, understand
from jitmoe.quantization_config import Scheme

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers that get LoRA beside the experts, where a model has them."""


@dataclass(frozen=True)
class Sketch:
    """A model on the meta device.

    Attributes:
        model: without values.
        experts: what its experts modules compute, and how many do so.
        top_k: experts a token goes to.
        attention: names of those of :data:`ATTENTION` that it has.
        parameters: names of the experts' parameters, as PEFT's ``target_parameters`` takes them.
        other_weights: elements of all weights but the experts'.
        vocabulary: number of tokens that it knows.
    """

    model: nn.Module
    experts: Counter[Understood]
    top_k: int
    attention: tuple[str, ...]
    parameters: tuple[str, ...]
    other_weights: int
    vocabulary: int


def sketch(path: Path, shards: Sequence[Path] = (), schemes: Sequence[Scheme] = ()) -> Sketch:
    """The model of the checkpoint in ``path``.

    Args:
        path: its folder.
        shards: its files of weights, whose headers tell the formats of experts where there are ``schemes``.
        schemes: how weights are quantised.

    Raises:
        TrainError: transformers cannot make a language model of its config.
        CheckpointError: tensors of a quantised weight are missing or contradict each other.
        UnsupportedExpertsError: it has no experts, or some that jitmoe does not compute; names class and reason.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="jitmoe")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise TrainError(f"transformers makes no language model of {path / 'config.json'}: {error}") from error
    experts = list(experts_of(model))
    understood = {name: understand(module) for name, module in model.named_modules() if module in experts}
    packings = _packings(model, understood, shards, schemes)
    found = Counter(replace(one, packing=packings.get(name, one.packing)) for name, one in understood.items())
    if not found:
        raise UnsupportedExpertsError(f"{type(model).__name__} has no experts: jitmoe has nothing to do in it")
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    attention = tuple(name for name in ATTENTION if name in names)
    inside = {id(parameter) for module in experts for parameter in module.parameters()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    vocabulary = model.get_input_embeddings().num_embeddings
    return Sketch(model, found, _top_k(experts[0]), attention, _parameters(model), others, vocabulary)


def _packings(
    model: Any, understood: Mapping[str, Understood], shards: Sequence[Path], schemes: Sequence[Scheme]
) -> dict[str, Packing]:
    """What the experts modules will be kept in; those that are not named, in bfloat16."""
    if not schemes:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping

    from jitmoe.hf.shipped.places import Targets, packings_of

    source = Source(Checkpoint(map(str, shards)), schemes)
    layouts = {name: one.layout for name, one in understood.items()}
    return packings_of(layouts, source, Targets(model, get_model_conversion_mapping(model)))


def experts_of(model: nn.Module) -> Iterator[Any]:
    """Its experts modules, and those that look like some but are none that transformers can exchange."""
    for module in model.modules():
        looks_like = class_name(module).endswith("Experts") and not isinstance(module, nn.ModuleList)
        if is_experts(module) or looks_like:
            yield module


def _top_k(module: Any) -> int:
    top_k = getattr(module.config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        raise TrainError(f"the config of {class_name(module)} has no num_experts_per_tok: memory cannot be estimated")
    return top_k


def _parameters(model: nn.Module) -> tuple[str, ...]:
    """Without the number of the layer: "mlp.experts.gate_up_proj"."""
    names = [name.split(".") for name, module in model.named_modules() if is_experts(module)]
    ends = {
        tuple(parts[1 + max((i for i, part in enumerate(parts) if part.isdigit()), default=-1) :]) for parts in names
    }
    return tuple(".".join((*end, name)) for end in sorted(ends) for name in PARTS)


@dataclass(frozen=True)
class Held:
    """Bytes outside of the experts, weights not counted.

    Attributes:
        peak: of all tensors of one step's forward and backward at the worst moment.
        lora: elements of LoRA on attention.
    """

    peak: int
    lora: int


def held_by_torch(found: Sketch, rank: int, batch: int, length: int) -> Held:
    """Run a step of training on tensors without memory, and count; changes the model of ``found``.

    The experts return their input. All that depends on values alone takes the dearer way: a mask is made.
    """
    from peft import LoraConfig, get_peft_model

    model: Any = found.model
    for module in experts_of(model):
        module.forward = stand_in
    if found.attention:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=list(found.attention)))
    else:
        model.requires_grad_(False)
        model.enable_input_require_grads()
    model.train()
    with FakeTensorMode():
        _move_to_fake(model)
        ids = torch.zeros(batch, length, dtype=torch.long)
        places = torch.arange(length).expand(batch, length)
        with counting() as count, torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids, position_ids=places, use_cache=False).loss.backward()
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return Held(count.peak, trained)


def stand_in(hidden_states: Tensor, _: Tensor, top_k_weights: Tensor) -> Tensor:
    """For the forward of experts: what flows through them flows through this."""
    return hidden_states * top_k_weights.sum(-1, keepdim=True).to(hidden_states.dtype)


def _move_to_fake(model: nn.Module) -> None:
    """Parameters and buffers that say that they are on the CPU, where meta ones would take other kernels."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._take(storage.nbytes())
                weakref.finalize(storage, self._take, -storage.nbytes())
        return out

    def _take(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


@contextmanager
def counting() -> Iterator[Count]:
    """Count what operators make inside the block."""
    with Count() as count:
        yield count
