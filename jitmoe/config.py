"""What the user asks for: the sizes of the layer and of its adapters."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jitmoe import settings
from jitmoe.errors import ConfigError
from jitmoe.formats import FORMATS, GROUP_SIZES, Packing, ScaleDtype, WeightFormat, packing_of
from jitmoe.isa import ISAS, IsaChoice
from jitmoe.topology import usable_nodes

LoraDtype = Literal["float32", "bfloat16"]

Activation = Literal["silu", "silu_clamped", "gpt_oss"]
"""What makes a of gate and up; mirrors ``Activation`` in shape.hpp."""

TensorParallel = int | Literal["auto"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

LORA_DTYPES: tuple[LoraDtype, ...] = get_args(LoraDtype)

MAX_SIZE = 1 << 40
"""Largest value of any one size, far beyond every memory."""


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and options of one Mixture-of-Experts feed-forward layer.

    Attributes:
        num_experts: E, experts held by this layer.
        hidden_size: H, elements of a token row.
        intermediate_size: I, elements of a row between the up and the down projection.
        top_k: K, experts chosen per token.
        lora_rank: r, rank of the adapters; 0 is a layer without LoRA.
        lora_alpha: numerator of the LoRA scale (Hu 2021).
        use_rslora: scale by alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023) instead of alpha / r.
        lora_dtype: "float32" or "bfloat16", dtype of the six LoRA parameters.
        activation: what makes a of gate and up: "silu", silu(gate) * up; "silu_clamped", the same of gate clamped from
            above and up clamped on both sides by ``activation_limit`` (DeepSeek-V4); "gpt_oss",
            gate * sigmoid(alpha * gate) * (up + 1) of the clamped gate and up.
        activation_alpha: alpha of "gpt_oss".
        activation_limit: bound of the clamped ones, positive.
        bias: gate, up and down have frozen biases.
        weight_format: how the base weights are shipped and kept, one of :data:`~jitmoe.formats.FORMATS`; other than
            "bfloat16" they come as :class:`~jitmoe.experts.quantized.Quantized`.
        group_size: inputs that share a scale in "int4_group": 32, 64 or 128. Other formats have their own.
        scale_dtype: of the scales; None is the usual one of the format: "float32" of "fp8_block", "int8_row" and
            "fp8_row" (or "bfloat16"), "bfloat16" of "int4_group" (or "float16", "float32").
        isa: "auto" or one of :data:`~jitmoe.isa.ISAS`. ``JITMOE_ISA`` overrides it.
        m_step: rows per register block to force, or None to let the planner choose by rows per expert.
        allow_skip: skip a slot whose expert id lies outside [0, E) (expert parallelism) instead of refusing it.
        batch_invariant: a token's results do not depend on which other tokens share the call.
        recompute: save nothing for backward and compute gate and up again there.
        tensor_parallel: n, parts of I that are computed apart, on the NUMA nodes of the machine where it has several,
            and added in float32 in a fixed order. Bits depend on n, never on the machine. "auto" becomes the number of
            nodes that this process may use, here and now.
        memory_budget: bytes that the layer and one call of it may hold at once (see
            :class:`~jitmoe.memory.plan.MemoryPlan`); more is a :class:`~jitmoe.errors.BudgetError` before anything is
            allocated. None is no limit.

    Raises:
        ConfigError: a field has a wrong type or value; the message names the field, the value and what is allowed.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    lora_rank: int = 8
    lora_alpha: float = 16.0
    use_rslora: bool = False
    lora_dtype: LoraDtype = "float32"
    isa: IsaChoice = "auto"
    m_step: int | None = None
    allow_skip: bool = False
    batch_invariant: bool = False
    recompute: bool = False
    memory_budget: int | None = None
    activation: Activation = "silu"
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    bias: bool = False
    weight_format: WeightFormat = "bfloat16"
    group_size: int = 32
    scale_dtype: ScaleDtype | None = None
    tensor_parallel: TensorParallel = 1

    def __post_init__(self) -> None:
        for name, least in (
            ("num_experts", 1),
            ("hidden_size", 1),
            ("intermediate_size", 1),
            ("top_k", 1),
            ("lora_rank", 0),
        ):
            _check_int(name, getattr(self, name), least)
        if self.m_step is not None:
            _check_int("m_step", self.m_step, 1)
        budget = self.memory_budget
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise ConfigError(f"memory_budget must be None or a positive number of bytes, an int; got {budget!r}")
        if not isinstance(self.lora_alpha, (int, float)) or not math.isfinite(self.lora_alpha):
            raise ConfigError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        _check_choice("lora_dtype", self.lora_dtype, LORA_DTYPES)
        _check_choice("isa", self.isa, ("auto", *ISAS))
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("weight_format", self.weight_format, tuple(FORMATS))
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}; got {self.group_size!r}")
        if self.scale_dtype is not None:
            _check_choice(f"scale_dtype of {self.weight_format}", self.scale_dtype, FORMATS[self.weight_format].scales)
        for name, positive in (("activation_alpha", False), ("activation_limit", True)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or (positive and value <= 0):
                raise ConfigError(f"{name} must be a finite number{' above 0' if positive else ''}, got {value!r}")
        for name in ("bias", "use_rslora", "allow_skip", "batch_invariant", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._fix_parts()

    def _fix_parts(self) -> None:
        """Make a number of "auto", and refuse more parts than I has."""
        granule = self.packing.granule
        most = -(-self.intermediate_size // granule)
        if self.tensor_parallel == "auto":
            object.__setattr__(self, "tensor_parallel", min(len(usable_nodes()), most))
        _check_int("tensor_parallel", self.tensor_parallel, 1)
        if self.parts > most:
            raise ConfigError(
                f"tensor_parallel must be at most {most}, got {self.parts}: intermediate_size {self.intermediate_size} "
                f"is cut at multiples of {granule} columns in weight_format {self.weight_format}"
            )

    @property
    def parts(self) -> int:
        """``tensor_parallel``, which is a number once the config is made."""
        assert isinstance(self.tensor_parallel, int)
        return self.tensor_parallel

    @property
    def lora_scale(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with ``use_rslora``; 0 without LoRA."""
        if self.lora_rank == 0:
            return 0.0
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    @property
    def packing(self) -> Packing:
        """How the base weights are packed."""
        return packing_of(self.weight_format, self.group_size, self.scale_dtype)

    @property
    def requested_isa(self) -> str:
        """``isa``, or what ``JITMOE_ISA`` says instead.

        Raises:
            ConfigError: ``JITMOE_ISA`` names no instruction set.
        """
        override = settings.get("isa")
        if override is None:
            return self.isa
        _check_choice("JITMOE_ISA", override, ("auto", *ISAS))
        return str(override)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if not least <= value <= MAX_SIZE:
        raise ConfigError(f"{name} must be between {least} and 2^40, got {value}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def read_fields(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        path: the file.
        what: what the file should hold, for the error message.

    Raises:
        ConfigError: the file cannot be read or holds anything else; the message names the file.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a JSON object, {what}")
    return fields
