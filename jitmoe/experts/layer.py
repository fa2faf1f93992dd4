"""The layer that users see: a normal ``nn.Module`` around the experts."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jitmoe.config import MoEConfig
from jitmoe.errors import InputError, InputTypeError
from jitmoe.experts import observer
from jitmoe.experts.functional import Adapters, Base, moe_experts, pack_base
from jitmoe.experts.pack import PackedExperts, decode_parts, open_packed, pack_parts, unpack_parts
from jitmoe.experts.packed_file import write_packed
from jitmoe.experts.passes import spec_of
from jitmoe.experts.quantized import ExpertSource, Quantized, check_base, flat, with_scales
from jitmoe.jit import kernels
from jitmoe.jit.capability import describe
from jitmoe.plan.parts import parts_of
from jitmoe.plan.projections import LORA_NAMES, Projection, lora_shapes, projections
from jitmoe.plan.shapes import plan_kernels

STATE_PREFIX = "base_"
"""Before the names of the base weights in a state dict: a bare ``experts.down_proj`` is what transformers calls its
fused experts, and splits when it saves."""

NEXT_CALL, ON_NONFINITE = "next_call", "on_nonfinite"
"""What :meth:`MoELayer.capture` writes."""


def _warn_if_frozen(lora: Sequence[torch.Tensor]) -> None:
    if not any(tensor.requires_grad for tensor in lora):
        warnings.warn(
            "all LoRA parameters of a MoELayer in training mode are frozen: nothing in it will be trained. PEFT's "
            "get_peft_model() freezes what is not its own: call jitmoe.train_lora(model) after it. Where that is "
            "wanted, call layer.eval()",
            RuntimeWarning,
            stacklevel=2,
        )


class MoELayer(nn.Module):
    """Mixture-of-Experts feed-forward with frozen experts, bfloat16 or quantised, and trainable LoRA.

    ``out[t] = sum_k weights[t, k] * down_e(silu(gate_e(x[t])) * up_e(x[t]))`` with ``e = topk_ids[t, k]``, where
    each projection is ``v W^T + s (v A^T) B^T`` (LoRA, Hu et al. 2021).

    Args:
        config: sizes and options.
        gate_proj: [E, I, H] as ``config.weight_format`` has it, bfloat16 or
            :class:`~jitmoe.experts.quantized.Quantized`; a stacked one, a sequence of E matrices, or a function from an
            expert's number to its matrix (see :data:`~jitmoe.experts.quantized.ExpertSource`). Packed expert by expert
            into the layer's only copy; the layer keeps no reference to the source.
        up_proj: [E, I, H], likewise.
        down_proj: [E, H, I], likewise.
        gate_bias: bfloat16 or float32 [E, I], frozen; with ``config.bias`` alone, and kept as float32.
        up_bias: likewise.
        down_bias: bfloat16 or float32 [E, H], likewise.

    Parameters (``config.lora_dtype``, absent with ``lora_rank=0``): ``gate_lora_a``, ``up_lora_a`` [E, r, H];
    ``gate_lora_b``, ``up_lora_b`` [E, I, r]; ``down_lora_a`` [E, r, I]; ``down_lora_b`` [E, H, r]. A is initialised
    as PEFT does (Kaiming uniform, a = sqrt 5), B with zeros.

    Attributes:
        lora_enabled: False computes the base alone; see :func:`jitmoe.lora_disabled`.

    Raises:
        InputError: a base weight has the wrong shape or device.
        InputTypeError: a base weight is not of the config's format.
        IsaError: ``config.isa`` names a set that this machine cannot execute.
        BudgetError: weights and parameters take more than ``config.memory_budget``.
    """

    def __init__(
        self,
        config: MoEConfig,
        gate_proj: ExpertSource | PackedExperts,
        up_proj: ExpertSource | PackedExperts,
        down_proj: ExpertSource | PackedExperts,
        *,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        base = pack_base(
            config, gate_proj, up_proj, down_proj, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias
        )
        self.config, self.isa, self.lora_enabled = config, base.isa, True
        self._seal, self._spec, self._packed_names = base.seal, base.spec, tuple(base.packed)
        for name, packed in base.packed.items():
            # No buffers: they never change, and DDP would broadcast them, AveragedModel write to them, .to() move them.
            setattr(self, f"packed_{name}", packed)
        for name, bias in base.biases.items():
            self.register_buffer(name, bias)
        for name, shape in self._lora_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=getattr(torch, config.lora_dtype))))
        self.reset_lora_parameters()

    @classmethod
    def from_packed(
        cls, config: MoEConfig, path: str | os.PathLike[str], verify: bool = True, **biases: torch.Tensor
    ) -> "MoELayer":
        """A layer whose base weights stay in a file that :meth:`save_packed` wrote.

        The file is mapped, not read: all processes share its pages, and what was not used for long may leave memory.
        LoRA parameters are new. Loading base weights into the layer gives this process a copy of its own; the file is
        never written to. Replace it with :meth:`save_packed` only: what is cut off a mapped file ends its readers.

        Args:
            config: of the layer; E, H and I must be those of the file.
            path: the file.
            verify: read all of it once and compare digests, or a damaged weight would be a wrong result. False maps
                it at once: for files larger than memory, or that another process has just verified. What the header
                says, sizes and length are checked in any case.
            **biases: as for the constructor; the file does not hold them.

        Raises:
            PackedFileError: no such file, of another layout version or other sizes, or damaged.
        """
        experts = open_packed(Path(path), config, verify)
        return cls(config, *experts.values(), **biases)

    def save_packed(self, path: str | os.PathLike[str]) -> None:
        """Write the packed base weights, without LoRA, to a file for :meth:`from_packed`.

        Any instruction set reads it. If this process is killed, ``path`` is the old file or the new one.

        Raises:
            PackedFileError: ``path`` cannot be written; what was there is unchanged.
            WeightsChangedError: the packed weights were written to.
        """
        base = self._base()
        base.check_seal()
        write_packed(Path(path), self.config, {name: tensor.numpy() for name, tensor in base.packed.items()})

    def reset_lora_parameters(self) -> None:
        """A uniform as in PEFT (Kaiming with a = sqrt 5: bound 1 / sqrt(in)), B zero: the layer equals its base."""
        with torch.no_grad():
            for name in self._lora_shapes:
                parameter = getattr(self, name)
                if name.endswith("_a"):
                    bound = 1.0 / math.sqrt(parameter.shape[-1])
                    parameter.uniform_(-bound, bound)
                else:
                    parameter.zero_()

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Apply the experts.

        Args:
            x: [..., H] bfloat16 or float32 (rounded to bfloat16 on entry).
            topk_ids: [..., K] int64 or int32, expert of each slot.
            weights: [..., K] float32 or bfloat16, routing weight of each slot.

        Returns:
            [..., H] in x's dtype.

        Raises:
            InputError: wrong shape, device or expert id; names the tensor, or the token and slot.
            InputTypeError: wrong dtype.
            WeightsChangedError: the packed weights were written to.
            BudgetError: the call could take more than ``config.memory_budget``.
        """
        return moe_experts(x, topk_ids, weights, self._base(), self._adapters())

    def capture(self, path: str | os.PathLike[str], when: str = NEXT_CALL) -> None:
        """Write a call to a file that ``jitmoe replay`` computes again, here or elsewhere.

        The file holds config, versions, base weights of the experts that were chosen, LoRA, inputs and results, and
        after backward the gradients too; ``torch.load(path, weights_only=True)`` reads it.

        Args:
            path: the file; the second one of ``"on_nonfinite"`` is called ``name-2.ext``, and so on.
            when: "next_call" writes the next call; "on_nonfinite" each one, up to 8, with a NaN or an infinity in
                its result or a gradient.

        Raises:
            CaptureError: ``path`` cannot be written; now, or in the call that would be captured.
            ConfigError: an unknown value of ``when``.
        """
        observer.watchers().capture(self, Path(path), when)

    def unpack(self, experts: Sequence[int] | None = None) -> dict[str, torch.Tensor | Quantized]:
        """Copies of the base weights as they came, bit for bit: gate_proj, up_proj [E, I, H], down_proj [E, H, I].

        With ``experts`` of these alone, in this order. What came as ``Quantized`` goes as ``Quantized``.
        """
        packing, any_kernels, parts = self.config.packing, self._any_kernels(), parts_of(self.config)
        return {
            p.base_name: unpack_parts(any_kernels, self._packed_parts(p), p, parts, experts, packing)
            for p in self._projections
        }

    def decode(self, experts: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """The bfloat16 base weights that the layer computes with, under the names of :meth:`unpack`."""
        any_kernels, parts = self._any_kernels(), parts_of(self.config)
        return {
            p.base_name: decode_parts(any_kernels, self._packed_parts(p), p, parts, experts) for p in self._projections
        }

    def biases(self) -> dict[str, torch.Tensor]:
        """The frozen biases, float32 gate_bias, up_bias [E, I], down_bias [E, H]; none without ``config.bias``."""
        biases = {p.bias_name: getattr(self, p.bias_name) for p in self._projections if self.config.bias}
        return {name: bias.to(torch.float32).contiguous() for name, bias in biases.items()}  # they may have been cast

    def extra_repr(self) -> str:
        """Sizes and instruction set, shown by ``print(model)``."""
        c = self.config
        weights = f", weight_format={c.weight_format}" if c.packing.quantized else ""
        parts = f", tensor_parallel={c.parts}" if c.parts > 1 else ""
        return (
            f"num_experts={c.num_experts}, hidden_size={c.hidden_size}, intermediate_size={c.intermediate_size}, "
            f"top_k={c.top_k}, lora_rank={c.lora_rank}{weights}{parts}, isa={describe(self.isa)}"
        )

    def _base(self) -> Base:
        """The base as it is now: buffers may have been replaced or cast, and tests change config and set."""
        if not torch.compiler.is_compiling():
            self._spec = spec_of(self.config, self.isa)
        return Base(self.config, self.isa, self._spec, self._packed(), self.biases(), self._seal)

    def _adapters(self) -> Adapters | None:
        if not (self.config.lora_rank and self.lora_enabled):
            return None
        lora = [getattr(self, name) for name in LORA_NAMES]
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_if_frozen(lora)
        gate_a, gate_b, up_a, up_b, down_a, down_b = lora
        return Adapters(gate_a, gate_b, up_a, up_b, down_a, down_b, self.config.lora_scale)

    def _packed(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"packed_{name}") for name in self._packed_names}

    def _packed_parts(self, projection: Projection) -> list[torch.Tensor]:
        return [getattr(self, f"packed_{projection.name}{part.suffix}") for part in parts_of(self.config)]

    def _any_kernels(self) -> kernels.Kernels:
        """Some instance: packing is the same in all those of this config."""
        return kernels.load(plan_kernels(self.config, self.isa).shapes[-1])

    @property
    def _projections(self) -> tuple[Projection, Projection, Projection]:
        return projections(self.config.hidden_size, self.config.intermediate_size)

    @property
    def _lora_shapes(self) -> dict[str, tuple[int, int, int]]:
        config = self.config
        return lora_shapes(config.hidden_size, config.intermediate_size, config.num_experts, config.lora_rank)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._base().check_seal()
        destination.update({f"{prefix}{STATE_PREFIX}{name}": tensor for name, tensor in flat(self.unpack()).items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        keys = {f"{prefix}{STATE_PREFIX}{p.base_name}": p for p in self._projections}
        scales = {f"{key}_scale" for key in keys if self.config.packing.quantized}
        rest = {key: value for key, value in state_dict.items() if key not in keys.keys() | scales}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in (*keys, *sorted(scales)) if strict and key not in state_dict)
        present = {key: projection for key, projection in keys.items() if key in state_dict}
        packing, sources = self.config.packing, {}
        try:
            for key, p in present.items():
                sources[key] = source = with_scales(state_dict, key, f"{key}_scale", packing)
                check_base(key, source, (self.config.num_experts,), p.out, p.in_, packing)
        except (InputError, InputTypeError) as error:
            error_msgs.append(str(error))
            return
        parts = parts_of(self.config)
        names = {key: [f"{p.name}{part.suffix}" for part in parts] for key, p in present.items()}
        self._seal.open(name for mine in names.values() for name in mine)
        for key, p in present.items():
            packed = self._packed_parts(p)
            pack_parts(self._any_kernels(), key, sources[key], packed, p, parts, packing)
            for name, tensor in zip(names[key], packed, strict=True):
                self._seal.close(name, tensor)
