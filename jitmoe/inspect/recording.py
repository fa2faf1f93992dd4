"""Reads a recorded call from a file of ``layer.capture()``, or of the format in which the ancestor logged calls.

Messages call the second one the format of the log: a dict of tensors with the keys of :data:`LOG_KEYS`.
"""

import dataclasses
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from jitmoe.config import LoraDtype, MoEConfig
from jitmoe.errors import CaptureError, JitmoeError
from jitmoe.experts.quantized import Quantized, check_base
from jitmoe.inspect.capture import FORMAT
from jitmoe.oracle.formats import dequantize
from jitmoe.oracle.reference import Activation, Biases, LoraTensors
from jitmoe.oracle.yardstick import Inputs, Results, noise_like
from jitmoe.plan.projections import NAMES, lora_shapes, projections

LOG_KEYS = {
    "num_experts": "expert_num",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "top_k": "num_experts_per_tok",
}
"""Field of MoEConfig, and its key in the format of the log."""

LOAD_ERRORS = (
    *(AttributeError, EOFError, ImportError, LookupError, OverflowError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)
"""What torch.load raises for bytes that torch.save did not write."""


@dataclass(frozen=True)
class Recording:
    """A call from a file.

    Attributes:
        config: of a layer with the experts of the file.
        inputs: of the call; base weights that are quantised in the file are decoded here.
        base: base weights and biases of the layer, under the names of its constructor.
        isa: instruction set of the recorded layer; None where the file does not say.
        results: what the recorded layer computed, as far as the file says.
        experts: for each expert of the file, its id in the recorded layer.
        notes: where the call comes from and what was assumed, for people.
    """

    config: MoEConfig
    inputs: Inputs
    base: Mapping[str, Any]
    isa: str | None
    results: Results
    experts: tuple[int, ...]
    notes: tuple[str, ...]


def read_recording(path: Path, lora_alpha: float | None = None) -> Recording:
    """Read a file of ``layer.capture()``, or of the format of the log.

    Args:
        path: the file; nothing in it is executed.
        lora_alpha: replaces that of a file in the format of the log.

    Raises:
        CaptureError: there is no such file, or it is damaged or has another format.
        ConfigError: the file's sizes make no layer.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {error.strerror or error}") from error
    except LOAD_ERRORS as error:
        raise CaptureError(f"{path} is damaged, or no file of layer.capture() or torch.save() of tensors") from error
    if not isinstance(content, dict) or not ("format" in content or "expert_num" in content):
        raise CaptureError(f"{path} holds no call: it is neither of layer.capture() nor in the format of the log")
    if content.get("format", FORMAT) != FORMAT:
        raise CaptureError(f"{path} has the format {content['format']!r}, this jitmoe reads {FORMAT!r}")
    try:
        return _read_capture(content) if "format" in content else _read_log(content, lora_alpha)
    except JitmoeError:
        raise
    except KeyError as error:
        raise CaptureError(f"{path} is no whole recording: it lacks {error}") from error
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CaptureError(f"{path} is no recording: {error}") from error


def _read_capture(content: Mapping[str, Any]) -> Recording:
    config = _captured_config(content["config"])
    experts = _integers(content, "experts")
    if not experts.numel():
        raise CaptureError("no expert was chosen in the captured call: there is nothing to compute")
    # An expert's place in the file, or -1: the call skipped the slots of experts that the file lacks.
    place = torch.full((config.num_experts,), -1)
    place[experts] = torch.arange(experts.numel())
    ids = _integers(content, "topk_ids")
    kept = (ids >= 0) & (ids < config.num_experts)
    held = replace(config, num_experts=experts.numel())
    quantized, content = _quantized(content, held)
    inputs = _inputs(content, torch.where(kept, place[ids.clamp(0, config.num_experts - 1)], -1), held)
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    notes = [f"captured with {versions}", f"{experts.numel()} of {config.num_experts} experts were chosen"]
    if "grad" not in content:
        notes.append("no backward was captured: the gradient of out is random")
    names = {"out": "out", "x_grad": "x", "weights_grad": "weights"}
    names |= {f"{name}_grad": name for name in LoraTensors._fields}
    results = {name: _tensor(content, key) for key, name in names.items() if key in content}
    isa = content["isa"]
    if not isinstance(isa, str):
        raise TypeError(f"isa is a {type(isa).__name__}, expected the name of an instruction set")
    base = {**inputs.base(), **quantized}
    return Recording(held, inputs, base, isa, results, tuple(experts.tolist()), tuple(notes))


def _quantized(content: Mapping[str, Any], config: MoEConfig) -> tuple[dict[str, Quantized], Mapping[str, Any]]:
    """The base weights of a quantised layer, and the content with bfloat16 in their place; none where they are that."""
    found = {}
    content, packing = dict(content), config.packing
    for p in projections(config.hidden_size, config.intermediate_size) if packing.quantized else ():
        source = Quantized(_tensor(content, p.base_name), _tensor(content, p.scale_name))
        check_base(p.base_name, source, (config.num_experts,), p.out, p.in_, packing)
        content[p.base_name] = dequantize(packing, source.values, source.scales, p.out, p.in_)
        found[p.base_name] = source
    return found, content


def _captured_config(fields: Mapping[str, Any]) -> MoEConfig:
    known = {field.name for field in dataclasses.fields(MoEConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise CaptureError(f"the file's config has fields that this jitmoe lacks: {', '.join(unknown)}")
    return MoEConfig(**fields)


def _read_log(content: Mapping[str, Any], lora_alpha: float | None) -> Recording:
    lora = _lora(content)
    rank = lora.gate_lora_a.shape[1] if lora else 0
    alpha = lora_alpha if lora_alpha is not None else content.get("lora_alpha")
    notes = [f"layer_idx {content['layer_idx']}", "the gradient of out is random"]
    if alpha is None and rank:
        notes.append(f"the file does not say lora_alpha: {MoEConfig.lora_alpha} assumed, --lora-alpha gives another")
    sizes: dict[str, Any] = {field: int(content[key]) for field, key in LOG_KEYS.items()}
    config = MoEConfig(
        **sizes,
        lora_rank=rank,
        lora_alpha=MoEConfig.lora_alpha if alpha is None else float(alpha),
        lora_dtype=cast(LoraDtype, str(lora.gate_lora_a.dtype).removeprefix("torch.") if lora else "float32"),
    )
    renamed = {"x": _tensor(content, "input_data"), "topk_ids": _tensor(content, "expert_ids")}
    inputs = _inputs({**content, **renamed}, renamed["topk_ids"].long(), config)
    return Recording(config, inputs, inputs.base(), None, {}, tuple(range(config.num_experts)), tuple(notes))


def _inputs(content: Mapping[str, Any], topk_ids: Tensor, config: MoEConfig) -> Inputs:
    """The call of a layer of ``config``. LoRA and the gradient of out are checked here, the rest by the layer."""
    wide = _tensor(content, "x")
    x = wide.reshape(-1, wide.shape[-1])
    if not len(x):
        raise ValueError("the call has no tokens")
    grad = _tensor(content, "grad").to(x.dtype) if "grad" in content else None
    lora = _lora(content)
    if (lora is None) != (config.lora_rank == 0):
        raise ValueError(
            f"its config has lora_rank {config.lora_rank}, and it holds {'no' if lora is None else 'a'} LoRA"
        )
    sizes = (config.hidden_size, config.intermediate_size, config.num_experts, config.lora_rank)
    expected = lora_shapes(*sizes) | {"grad": tuple(x.shape)}
    for name, tensor in {**(lora._asdict() if lora else {}), "grad": grad}.items():
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, expected {list(expected[name])}")
    return Inputs(
        x=x,
        topk_ids=topk_ids.reshape(len(x), -1),
        weights=_tensor(content, "weights").reshape(len(x), -1),
        gate_proj=_tensor(content, "gate_proj"),
        up_proj=_tensor(content, "up_proj"),
        down_proj=_tensor(content, "down_proj"),
        lora=lora,
        dout=noise_like(x, len(x), torch.Generator().manual_seed(0)) if grad is None else grad,
        scale=config.lora_scale,
        activation=Activation.of(config),
        biases=Biases(*(_tensor(content, f"{name}_bias") for name in NAMES)) if config.bias else None,
    )


def _lora(content: Mapping[str, Any]) -> LoraTensors | None:
    """All six LoRA tensors, or None where the file has none of them."""
    if all(content.get(name) is None for name in LoraTensors._fields):
        return None
    return LoraTensors(*(_tensor(content, name) for name in LoraTensors._fields))


def _integers(content: Mapping[str, Any], name: str) -> Tensor:
    tensor = _tensor(content, name)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has the dtype {tensor.dtype}, expected int64 or int32")
    return tensor.long()


def _tensor(content: Mapping[str, Any], name: str) -> Tensor:
    tensor = content[name]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    return tensor.detach()
