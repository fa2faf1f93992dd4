"""The three projections of an expert, as values of one type."""

from dataclasses import dataclass

from jitmoe.config import MoEConfig


@dataclass(frozen=True)
class Projection:
    """One of gate, up and down: ``lin(v) = v W^T + b + s (v A^T) B^T``, from ``in_`` columns to ``out``.

    W holds the base weights; A, B and s are those of LoRA (Hu 2021). For E experts and rank r: W is [E, out, in_],
    A is [E, r, in_], B is [E, out, r].
    """

    name: str
    out: int
    in_: int

    @property
    def cut_axis(self) -> int:
        """Axis of W [out, in_] that is I, along which parts are cut."""
        return 1 if self.name == "down" else 0

    @property
    def base_name(self) -> str:
        """Name of W in the constructor, in state dicts and in files."""
        return f"{self.name}_proj"

    @property
    def bias_name(self) -> str:
        """Name of the bias [E, out] in the constructor and in state dicts."""
        return f"{self.name}_bias"

    @property
    def scale_name(self) -> str:
        """Name of the scales of a quantised W in state dicts and in files."""
        return f"{self.base_name}_scale"

    def packed_items(self, config: MoEConfig) -> int:
        """2-byte items of the packed W of one expert."""
        return config.packing.packed_bytes(self.out, self.in_) // 2

    def lora_shapes(self, experts: int, rank: int) -> dict[str, tuple[int, int, int]]:
        """Names and shapes of A and B of ``experts`` experts."""
        return {
            f"{self.name}_lora_a": (experts, rank, self.in_),
            f"{self.name}_lora_b": (experts, self.out, rank),
        }


NAMES = ("gate", "up", "down")

LORA_NAMES = tuple(f"{name}_lora_{matrix}" for name in NAMES for matrix in ("a", "b"))
"""The six trainable tensors in the order in which they are passed along."""


def projections(hidden: int, intermediate: int) -> tuple[Projection, Projection, Projection]:
    """Gate, up and down of an expert with these sizes."""
    return (
        Projection("gate", intermediate, hidden),
        Projection("up", intermediate, hidden),
        Projection("down", hidden, intermediate),
    )


def lora_shapes(hidden: int, intermediate: int, experts: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """Names and shapes of all six LoRA tensors; none where ``rank`` is 0."""
    shapes: dict[str, tuple[int, int, int]] = {}
    for projection in projections(hidden, intermediate) if rank else ():
        shapes |= projection.lora_shapes(experts, rank)
    return shapes
