"""Sizes to measure, and the least work that they take. Nothing is allocated."""

from dataclasses import dataclass, replace
from typing import cast

from jitmoe.config import LoraDtype, MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.isa import IsaChoice

FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)

QUICK_DIVISOR = 4
"""What ``--quick`` divides the widths H and I by."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one layer and one call of it.

    Attributes:
        name: in tables.
        experts: E.
        hidden: H, elements of a token row.
        intermediate: I, elements of a row between the up and the down projection.
        top_k: K, experts per token.
        rank: LoRA rank, 0 without LoRA.
        tokens: T.
        zipf: skewed routing; the n-th most popular expert has odds 1/n.
        parts: ``tensor_parallel`` of the layer.

    Raises:
        ConfigError: ``top_k`` exceeds ``experts``, or there are no tokens.
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    rank: int
    tokens: int
    zipf: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise ConfigError(f"top_k={self.top_k} experts per token cannot be chosen from {self.experts}")
        if self.tokens < 1:
            raise ConfigError(f"tokens must be at least 1, got {self.tokens}")

    @property
    def slots(self) -> int:
        """S = T K, the rows that the experts compute."""
        return self.tokens * self.top_k

    @property
    def base_elements(self) -> int:
        """Elements of the base weights of gate, up and down."""
        return 3 * self.experts * self.hidden * self.intermediate

    def expected_active(self) -> float:
        """Mean number of experts with rows when every token chooses K of E with equal odds."""
        return self.experts * (1.0 - (1.0 - self.top_k / self.experts) ** self.tokens)

    def config(self, isa: str, lora_dtype: str = "float32") -> MoEConfig:
        """The config of this workload's layer."""
        return MoEConfig(
            num_experts=self.experts,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            top_k=self.top_k,
            lora_rank=self.rank,
            lora_dtype=cast(LoraDtype, lora_dtype),  # MoEConfig refuses another name
            isa=cast(IsaChoice, isa),
            tensor_parallel=self.parts,
        )

    def quick(self) -> "Workload":
        """This workload with narrower matrices, for a first look; its figures compare with none of the others."""
        hidden, intermediate = (max(size // QUICK_DIVISOR, 1) for size in (self.hidden, self.intermediate))
        return replace(self, name=f"{self.name}/quick", hidden=hidden, intermediate=intermediate)

    def in_parts(self, parts: int) -> "Workload":
        """This workload in a layer with so many parts."""
        return self if parts == 1 else replace(self, name=f"{self.name}/tp{parts}", parts=parts)


_ALL = (
    Workload("W1", experts=64, hidden=2048, intermediate=1408, top_k=6, rank=8, tokens=48),
    Workload("W2", experts=64, hidden=2048, intermediate=1408, top_k=6, rank=8, tokens=1024),
    Workload("W2z", experts=64, hidden=2048, intermediate=1408, top_k=6, rank=8, tokens=1024, zipf=True),
    Workload("W3", experts=64, hidden=2048, intermediate=1408, top_k=6, rank=8, tokens=1),
    Workload("W4", experts=128, hidden=2048, intermediate=768, top_k=8, rank=16, tokens=512),
    Workload("W5", experts=16, hidden=7168, intermediate=2048, top_k=8, rank=16, tokens=256),
    Workload("W6s", experts=64, hidden=1792, intermediate=512, top_k=8, rank=16, tokens=6400),
)

WORKLOADS = {workload.name: workload for workload in _ALL}
"""W1 few tokens on a DeepSeek-V2-Lite layer, W2 a training step on it (W2z with skewed routing), W3 decode, W4 a
Qwen3-30B-A3B layer, W5 sixteen experts of DeepSeek-V3, W6s a quarter of W6 in experts, widths and tokens."""


W6 = Workload("W6", experts=256, hidden=7168, intermediate=2048, top_k=8, rank=16, tokens=25600)
"""A whole layer of DeepSeek-V3 on a long batch: planned and predicted, too large to measure here."""


def find_workload(name: str) -> Workload:
    """The workload of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"unknown workload {name!r}; known are {', '.join(WORKLOADS)}, or give sizes of your own")
    return WORKLOADS[name]


@dataclass(frozen=True)
class Work:
    """The least that a pass must do, in floating-point operations and bytes of memory traffic."""

    flop: float
    nbytes: float

    def roofline_seconds(self, flops: float, bandwidth: float) -> float:
        """Least seconds at ``flops`` operations and ``bandwidth`` bytes a second: the roofline (Williams 2009)."""
        return max(self.flop / flops, self.nbytes / bandwidth)


def work_of(
    workload: Workload, training: bool, active: float, rank: int | None = None, recompute: bool = False
) -> Work:
    """Work of a forward pass or, with ``training``, of forward and backward together.

    A multiply-add is two operations. Base weights have no gradient, so backward multiplies each once, as forward does;
    A and B have gradients, so LoRA takes twice as much in backward. Each pass reads the bfloat16 weights of the active
    experts once; a slot moves rows of x and out, and of gate, up and a.

    Args:
        workload: sizes.
        training: count backward too.
        active: number of experts with rows.
        rank: replaces the workload's LoRA rank; 0 counts the base alone.
        recompute: backward computes gate and up again.
    """
    hidden, intermediate = workload.hidden, workload.intermediate
    rank = workload.rank if rank is None else rank
    flop = 6 * hidden * intermediate + 6 * rank * (hidden + intermediate)
    if training:
        flop += 6 * hidden * intermediate + 12 * rank * (hidden + intermediate)
        flop += 4 * hidden * intermediate if recompute else 0
    weights = active * 6 * hidden * intermediate
    activations = workload.slots * (4 * hidden + 6 * intermediate)
    return Work(float(workload.slots * flop), (2 if training else 1) * weights + activations)
