"""Which kernels a config needs and which one a call takes, as frozen, printable shapes."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from jitmoe.config import Activation, MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.formats import Packing, ScaleDtype, WeightFormat, packing_of
from jitmoe.isa import ISAS
from jitmoe.plan.parts import parts_of

K_STEP = 32
"""Columns of one packed block along the contraction; ranks are padded to it."""

N_STRIP = 32
"""Output columns of one strip of packed weights."""

PACKED_LAYOUT = 1
"""Version of the packed layout (gemm/interface.hpp) and of packed files (experts/packed_file.py). Raise it when either
changes."""

Watch = Literal["nothing", "time", "memory", "values"]
"""What an instance records about its calls; mirrors ``Watch`` in shape.hpp."""

PLANS_KEPT = 256
"""Plans that each cache keeps for calls of the same sizes: planning takes 0.2 ms, decoding a token 3 ms."""


def ceil_div(value: int, step: int) -> int:
    """``value / step``, rounded up."""
    return -(-value // step)


def round_up(value: int, step: int) -> int:
    """Smallest multiple of ``step`` that is not below ``value``."""
    return ceil_div(value, step) * step


def packed_elements(out: int, in_: int) -> int:
    """Elements of one packed bfloat16 matrix [out, in]; mirrors ``packed_elements`` in gemm/pack.hpp."""
    return round_up(out, N_STRIP) * round_up(in_, K_STEP)


@dataclass(frozen=True)
class Shape:
    """The template parameter of one kernel instance; mirrors ``Shape`` in shape.hpp.

    Attributes:
        isa: name of the instruction set.
        hidden: H, elements of a token row.
        intermediate: I, elements of a row between the up and the down projection.
        padded_rank: LoRA rank rounded up to :data:`K_STEP`; 0 without LoRA.
        m_step: rows of a register block.
        lora_bf16: LoRA parameters are bfloat16 instead of float32.
        activation: the function that makes a of gate and up.
        bias: gate, up and down have biases.
        format: how the base weights are kept.
        group_size: inputs that share a scale in ``int4_group``, else 0.
        scale: dtype of the scales.
        watch: what the instance records about its calls.
    """

    isa: str
    hidden: int
    intermediate: int
    padded_rank: int
    m_step: int
    lora_bf16: bool
    activation: Activation = "silu"
    bias: bool = False
    format: WeightFormat = "bfloat16"
    group_size: int = 0
    scale: ScaleDtype = "none"
    watch: Watch = "nothing"

    @property
    def packing(self) -> Packing:
        """How the base weights are packed."""
        return packing_of(self.format, self.group_size, self.scale)

    @property
    def name(self) -> str:
        """Short readable identity, for reports and cache entries."""
        lora = "bf16" if self.lora_bf16 else "f32"
        weights = f"{self.format}{self.group_size or ''}_{self.scale}" if self.packing.quantized else ""
        words = (self.activation, "bias" if self.bias else "", weights, self.watch)
        special = [word for word in words if word not in ("silu", "", "nothing")]
        sizes = f"h{self.hidden}_i{self.intermediate}_r{self.padded_rank}_m{self.m_step}"
        return "_".join([self.isa, sizes, lora, *special])


@dataclass(frozen=True)
class KernelPlan:
    """The kernels of one config on one instruction set; the first is for the fewest rows.

    Attributes:
        config: of the layer.
        isa: the instruction set.
        shapes: of all kernels.
        parts: the plan of each part of ``config.tensor_parallel``; that of the only part is this one, and not in here.
    """

    config: MoEConfig
    isa: str
    shapes: tuple[Shape, ...]
    parts: tuple["KernelPlan", ...] = ()

    @property
    def by_part(self) -> tuple["KernelPlan", ...]:
        """The plan of each part; a call selects a kernel of each."""
        return self.parts or (self,)

    def select(self, rows: int, active_experts: int) -> Shape:
        """The kernel for a call with ``rows`` routed rows on ``active_experts`` experts, in a plan of one part."""
        assert not self.parts, "each part has a kernel of its own"
        if self.config.batch_invariant:
            return self.shapes[-1]
        passed = sum(rows > limit * active_experts for limit in ISAS[self.isa].row_limits)
        return self.shapes[min(passed, len(self.shapes) - 1)]

    def reachable(self, slots: int) -> dict[Shape, tuple[int, int]]:
        """The kernels that :meth:`select` may choose for ``slots`` slots.

        Returns:
            Each such kernel with the fewest and the most active experts that it is chosen for.
        """
        rows, most = slots, min(self.config.num_experts, slots)
        if not most:
            return {self.select(0, 0): (0, 0)}
        if self.config.allow_skip:  # any number of rows
            first, last = (self.shapes.index(self.select(n, 1)) for n in (1, rows))
            return {shape: (1, most) for shape in self.shapes[first : last + 1]}
        # The choice changes only where rows <= limit * active begins to hold.
        changes = [ceil_div(rows, limit) for limit in ISAS[self.isa].row_limits]
        counts = sorted({1, most, *(min(max(n, 1), most) for change in changes for n in (change - 1, change))})
        found: dict[Shape, tuple[int, int]] = {}
        for active in counts:
            shape = self.select(rows, active)
            found[shape] = (found.get(shape, (active, active))[0], active)
        return found


def plan_kernels(config: MoEConfig, isa: str, lora_dtype: str | None = None) -> KernelPlan:
    """Decide which kernels ``config`` needs on ``isa`` (a concrete set, not "auto").

    ``lora_dtype`` overrides the config's where the parameters were cast after construction.

    Raises:
        ConfigError: ``config.m_step`` is not a register block of that instruction set.
    """
    assert isa in ISAS
    return _plan_kernels(config, isa, (lora_dtype or config.lora_dtype) == "bfloat16")


@lru_cache(PLANS_KEPT)
def _plan_kernels(config: MoEConfig, isa: str, lora_bf16: bool) -> KernelPlan:
    if config.parts > 1:
        parts = tuple(_plan_kernels(part.config, isa, lora_bf16) for part in parts_of(config))
        return KernelPlan(config, isa, tuple(dict.fromkeys(s for part in parts for s in part.shapes)), parts)
    few_rows, steps = ISAS[isa].few_rows, ISAS[isa].m_steps
    blocks = [(isa, step) for step in steps]
    if config.m_step is not None:
        if config.m_step not in steps:
            raise ConfigError(f"m_step must be one of {steps} on {isa}, got {config.m_step}")
        blocks = [(isa, config.m_step)]
    elif few_rows and not config.batch_invariant:
        blocks.insert(0, (few_rows, ISAS[few_rows].m_steps[0]))
    shapes = tuple(
        Shape(
            isa=block_isa,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            padded_rank=round_up(config.lora_rank, K_STEP),
            m_step=step,
            lora_bf16=lora_bf16,
            activation=config.activation,
            bias=config.bias,
            format=config.weight_format,
            group_size=config.group_size if config.weight_format == "int4_group" else 0,
            scale=config.packing.scale,
        )
        for block_isa, step in blocks
    )
    return KernelPlan(config, isa, shapes)
