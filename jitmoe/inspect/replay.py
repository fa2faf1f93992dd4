"""A recorded call, computed again: float64 oracle, plain bfloat16 torch and our layer side by side."""

import dataclasses
import os
import pickle
import struct
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from jitmoe.config import LoraDtype, MoEConfig
from jitmoe.errors import CaptureError, ConfigError, JitmoeError, TraceError
from jitmoe.experts.layer import MoELayer
from jitmoe.inspect.capture import FORMAT
from jitmoe.inspect.trace_report import Report
from jitmoe.inspect.tracing import trace
from jitmoe.isa import IsaChoice
from jitmoe.jit import cpu
from jitmoe.oracle.reference import LoraTensors
from jitmoe.oracle.yardstick import (
    Inputs,
    Results,
    Verdict,
    as_operands,
    errors_of_redraws,
    judge,
    noise_like,
    results_of_layer,
    results_of_reference,
    title,
)
from jitmoe.plan.projections import lora_shapes
from jitmoe.text import table

LOG_KEYS = {
    "num_experts": "expert_num",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "top_k": "num_experts_per_tok",
}
"""Field of MoEConfig and key of the log's own format."""

LOAD_ERRORS = (
    *(AttributeError, EOFError, ImportError, LookupError, OverflowError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)
"""What torch.load raises for bytes that torch.save did not write."""


@dataclass(frozen=True)
class Recording:
    """A call from a file.

    Attributes:
        config: of the layer that computes it; with as many experts as the file holds.
        inputs: of the call.
        isa: it was computed on; None where the file does not say.
        results: what was computed then, as far as the file says.
        experts: numbers that the experts of the file had in the layer that was recorded.
        notes: what was assumed or where the call comes from, for people.
    """

    config: MoEConfig
    inputs: Inputs
    isa: str | None
    results: Results
    experts: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Difference of one result from the oracle, where both are finite.

    Attributes:
        nonfinite: values of the result that are NaN or infinite.
        largest: largest difference.
        mean: mean magnitude of the difference.
        relative: ``mean`` over the mean magnitude of the oracle.
    """

    nonfinite: int
    largest: float
    mean: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """Three computations of the same call: figures by result, and the verdicts on ours."""

    oracle: Mapping[str, Figures]
    plain: Mapping[str, Figures]
    ours: Mapping[str, Figures]
    verdicts: list[Verdict]

    @property
    def faults(self) -> list[str]:
        """Titles of the results outside the error rule."""
        return [title(verdict.name) for verdict in self.verdicts if verdict.fault]

    def __str__(self) -> str:
        head = ("result", *(f"NaN/Inf {who}" for who in ("oracle", "torch", "jitmoe")))
        figures_of = ("max|d|", "mean|d|", "mean|d|/mean|ref|", "torch's")
        rows: list[tuple[str, ...]] = [(*head, *figures_of, "rms / torch's", "max / torch's", "verdict")]
        for verdict in self.verdicts:
            oracle, plain, ours = (figures[verdict.name] for figures in (self.oracle, self.plain, self.ours))
            rows.append(
                (
                    title(verdict.name),
                    *(str(figures.nonfinite) for figures in (oracle, plain, ours)),
                    *(f"{value:.3g}" for value in (ours.largest, ours.mean, ours.relative, plain.relative)),
                    f"{verdict.rms:.3f} <= {verdict.rms_limit}",
                    f"{verdict.largest:.3f} <= {verdict.max_limit}",
                    verdict.fault or "ok" + (f" ({verdict.doubt})" if verdict.doubt else ""),
                )
            )
        return table(rows)


def conclusion(faults: Sequence[str]) -> str:
    """What stands under the last comparison: how to read it, and whether anything is outside the error rule."""
    verdict = f"outside the error rule: {', '.join(faults)}" if faults else "within the error rule"
    return (
        "d: result - ref, where ref is computed in float64 and torch's result in plain bfloat16. rms and max: errors\n"
        f"of jitmoe over those of torch, and what the error rule allows.\n{verdict}"
    )


def compare(layer: MoELayer, inputs: Inputs, coarse: bool = False) -> Comparison:
    """Hold ``layer``, with the LoRA values of ``inputs``, to the error rule; ``coarse`` is quicker and less strict."""
    inputs = as_operands(inputs)
    oracle = results_of_reference(inputs, torch.float64)
    plain = results_of_reference(inputs, torch.bfloat16)
    ours = results_of_layer(layer, inputs)

    def figures(found: Results) -> dict[str, Figures]:
        return {name: _figures(found[name], oracle[name]) for name in oracle}

    others = {} if coarse else errors_of_redraws(inputs)
    verdicts = judge(ours, inputs, oracle, plain, others, coarse)
    return Comparison(figures(oracle), figures(plain), figures(ours), verdicts)


def read_recording(path: Path, lora_alpha: float | None = None) -> Recording:
    """Read a file of ``layer.capture()``, or of the log's own format.

    Args:
        path: the file; nothing in it is executed.
        lora_alpha: for a file of the log's format that does not say.

    Raises:
        CaptureError: no such file, or none of these formats.
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


def run(arguments: Namespace) -> int:
    """What ``jitmoe replay`` does.

    Raises:
        CaptureError: no such file, or it holds no call.
        ConfigError: a picture is wanted without the trace that it shows.
        TraceError: the picture cannot be drawn.
    """
    if arguments.plot is not None:
        if not arguments.trace:
            raise ConfigError("--plot draws what --trace finds: give both")
        folder = arguments.plot.absolute().parent
        if arguments.plot.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise TraceError(f"{arguments.plot} cannot be written: name a file in a folder that exists and is writable")
    recording = read_recording(arguments.file, arguments.lora_alpha)
    return replay(recording, arguments.isa, arguments.trace, arguments.plot)


def replay(recording: Recording, isa: str | None = None, traced: bool = False, plot: Path | None = None) -> int:
    """Compute ``recording`` again and print what came out.

    Args:
        recording: the call.
        isa: instruction set; by default that of the recording where it is usable, else the best one.
        traced: compute it once more inside :func:`jitmoe.trace` and print the finding and the table.
        plot: of a PNG with the heat map of that report.

    Returns:
        1 if a result is outside the error rule, else 0: a NaN that came with the recording is no fault of the layer.

    Raises:
        TraceError: the heat map cannot be drawn.
    """
    isa, inputs = isa or _isa_of(recording), recording.inputs
    # A register block that was forced belongs to its instruction set.
    m_step = recording.config.m_step if isa == recording.isa else None
    config = replace(recording.config, isa=cast(IsaChoice, isa), m_step=m_step)
    layer = MoELayer(config, inputs.gate_proj, inputs.up_proj, inputs.down_proj)
    tokens, slots = inputs.topk_ids.shape[0], int(inputs.kept().sum())
    print(f"{tokens} tokens, {slots} slots, {layer}")
    print("\n".join(recording.notes))
    if recording.results:
        print(_reproduction(layer, recording))
    if traced:
        # Before the comparison, which takes much longer.
        report = _trace(layer, recording)
        print(f"\n{_expert_numbers(report, recording.experts)}{report.table()}\n", flush=True)
        if plot is not None:
            report.save_png(plot)
    comparison = compare(layer, inputs)
    print(f"{comparison}\n\n{conclusion(comparison.faults)}")
    if not traced and any(figures.nonfinite for figures in comparison.oracle.values()):
        print("float64 gives values that are not finite too: --trace says where the first one comes from")
    return 1 if comparison.faults else 0


def _reproduction(layer: MoELayer, recording: Recording) -> str:
    """Whether the layer computes the recorded bits."""
    again = results_of_layer(layer, recording.inputs)
    other = [title(name) for name, result in recording.results.items() if not _same_bits(result, again[name])]
    where = f"recorded on {recording.isa}, computed again on {layer.isa}"
    return f"{where}: {'other bits in ' + ', '.join(other) if other else 'the same bits'}"


def _trace(layer: MoELayer, recording: Recording) -> Report:
    """The report of both passes; experts in it have their numbers in the file."""
    with trace() as report:
        # On the recorded values: those of the comparison are rounded.
        results_of_layer(layer, recording.inputs)
    return report


def _expert_numbers(report: Report, experts: tuple[int, ...]) -> str:
    """Which experts of the recorded layer the numbers in the report mean; "" where they are the same."""
    if experts == tuple(range(len(experts))):
        return ""
    first = report.first()
    found = ""
    if first and first.expert is not None:
        found = f"Expert {first.expert} of the file is expert {experts[first.expert]} of the recorded layer. "
    return f"{found}The file numbers its experts from 0 on; in the layer they are {', '.join(map(str, experts))}.\n"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_type = one.dtype == other.dtype and one.shape == other.shape
    return same_type and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _isa_of(recording: Recording) -> str:
    usable = {capability.isa for capability in cpu.capabilities() if capability.usable}
    return recording.isa if recording.isa in usable else "auto"


def _figures(result: Tensor, oracle: Tensor) -> Figures:
    difference = (result.double() - oracle).abs()
    finite = difference.isfinite()
    if not finite.any():
        return Figures(int((~result.isfinite()).sum()), 0.0, 0.0, 0.0)
    mean, magnitude = difference[finite].mean().item(), oracle[finite].abs().mean().item()
    return Figures(
        nonfinite=int((~result.isfinite()).sum()),
        largest=difference[finite].max().item(),
        mean=mean,
        relative=mean / magnitude if magnitude else 0.0,
    )


def _read_capture(content: Mapping[str, Any]) -> Recording:
    config = _captured_config(content["config"])
    experts: Tensor = content["experts"]
    if not experts.numel():
        raise CaptureError("no expert was chosen in the captured call: there is nothing to compute")
    # An expert's place in the file; what no file holds was skipped in the call.
    place = torch.full((config.num_experts,), -1)
    place[experts] = torch.arange(experts.numel())
    ids: Tensor = content["topk_ids"]
    kept = (ids >= 0) & (ids < config.num_experts)
    held = replace(config, num_experts=experts.numel())
    inputs = _inputs(content, torch.where(kept, place[ids.clamp(0, config.num_experts - 1)], -1), held)
    versions = ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    notes = [f"captured with {versions}", f"{experts.numel()} of {config.num_experts} experts were chosen"]
    if "grad" not in content:
        notes.append("no backward was captured: the gradient of out is random")
    names = {"out": "out", "x_grad": "x", "weights_grad": "weights"}
    names |= {f"{name}_grad": name for name in LoraTensors._fields}
    results = {name: content[key] for key, name in names.items() if key in content}
    return Recording(held, inputs, content["isa"], results, tuple(experts.tolist()), tuple(notes))


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
    return Recording(config, inputs, None, {}, tuple(range(config.num_experts)), tuple(notes))


def _inputs(content: Mapping[str, Any], topk_ids: Tensor, config: MoEConfig) -> Inputs:
    """The call of a layer of ``config``. The layer looks at all but LoRA and the gradient of out itself."""
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
    )


def _lora(content: Mapping[str, Any]) -> LoraTensors | None:
    """All six tensors, or None where the file has none of them."""
    if all(content.get(name) is None for name in LoraTensors._fields):
        return None
    return LoraTensors(*(_tensor(content, name) for name in LoraTensors._fields))


def _tensor(content: Mapping[str, Any], name: str) -> Tensor:
    tensor = content[name]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    return tensor.detach()
