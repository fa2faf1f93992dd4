"""What training will hold, before any of it is loaded; and the refusal where that does not fit."""

from collections import Counter
from dataclasses import dataclass, replace

from jitmoe.errors import BudgetError
from jitmoe.hf.train.sketch import Held, Sketch
from jitmoe.hf.understand import Understood
from jitmoe.limits import available_memory
from jitmoe.memory import estimate as experts_estimate
from jitmoe.memory.estimate import ADAM_STATES, Load
from jitmoe.text import size, table

BFLOAT16, FLOAT32 = 2, 4

SHARED = ("input", "result", "transient", "scratch")
"""Kinds of memory that only the layer that is being computed holds."""

LIBRARIES = 200_000_000
KEPT_SHARE = 0.5
"""What the process grew by with a model of no size, and what malloc kept of activations that were gone, rounded up
(measured 2026-11-25, 2 threads, glibc 2.36: 182 MB, and 0.3 GB beside activations of 0.5 GB)."""

HOW = (
    "All of it follows from shapes, for the worst routing, but for the libraries and the allocator: those are measured."
)


@dataclass(frozen=True)
class TrainEstimate:
    """Memory of a training run. Loading needs less: experts are packed as they are read.

    Attributes:
        items: what it is for, and bytes.
        free: bytes that may be taken, and why no more.
        unknown: what could not be estimated and why; "" where everything was.
    """

    items: tuple[tuple[str, int], ...]
    free: tuple[int, str]
    unknown: str = ""

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return sum(nbytes for _, nbytes in self.items)

    def rows(self) -> list[tuple[str, str]]:
        """A table, its head first."""
        rows = [("memory", "bytes"), *((what, size(nbytes)) for what, nbytes in self.items)]
        return [*rows, ("in all", size(self.total)), (self.free[1], size(self.free[0]))]

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            BudgetError: with the table.
        """
        if self.total > self.free[0]:
            raise BudgetError(
                f"training would hold {size(self.total)}, and {self.free[1]} is {size(self.free[0])}: take a smaller "
                f"--batch-size, --max-length or --rank, or a machine with more memory.\n{table(self.rows())}"
            )


def estimate(
    found: Sketch, held: Held | str, rank: int, tokens: int, threads: int, memory_budget: int | None
) -> TrainEstimate:
    """Bytes of everything that training holds.

    Args:
        found: the model.
        held: what torch holds outside of the experts, or why that is not known.
        rank: of LoRA.
        tokens: most tokens of a call, padding included.
        threads: of a call.
        memory_budget: bytes that may be taken, or None.
    """
    experts = _experts(found.experts, found.top_k, rank, tokens, threads)
    lora = sum(lora_elements(one, rank) * layers for one, layers in found.experts.items())
    lora += 0 if isinstance(held, str) else held.lora
    items = [
        ("experts, packed", experts["packed weight"]),
        ("all other weights, bfloat16", BFLOAT16 * found.other_weights),
        ("LoRA, float32", FLOAT32 * lora),
        ("gradients of LoRA", FLOAT32 * lora),
        ("AdamW, two moments", ADAM_STATES * FLOAT32 * lora),
        ("saved for backward by the experts", experts["saved"]),
        ("the experts layer at work, worst routing", sum(experts[kind] for kind in SHARED)),
    ]
    if not isinstance(held, str):
        items.append(("activations outside of the experts", held.peak))
    kept = experts["saved"] + (0 if isinstance(held, str) else held.peak)
    items.append(("libraries at work, and what the allocator keeps: about", LIBRARIES + int(KEPT_SHARE * kept)))
    unknown = f"activations outside of the experts are not in it ({held})" if isinstance(held, str) else ""
    return TrainEstimate(tuple(items), _free(memory_budget), unknown)


def lora_elements(understood: Understood, rank: int) -> int:
    """Of PEFT's A and B on both parameters of one module; gate and up share an A."""
    layout = understood.layout
    return layout.experts * rank * (2 * layout.hidden + 3 * layout.intermediate)


def _experts(modules: Counter[Understood], top_k: int, rank: int, tokens: int, threads: int) -> Counter[str]:
    """Bytes by kind, as ``jitmoe estimate`` counts them; of the kinds in SHARED, those of the largest layer."""
    found: Counter[str] = Counter()
    for understood, layers in modules.items():
        config = replace(understood.config(), top_k=min(top_k, understood.layout.experts), lora_rank=rank)
        for item in experts_estimate.estimate(Load(config, tokens, layers, threads)).items:
            one = item.total
            found[item.kind] = max(found[item.kind], one) if item.kind in SHARED else found[item.kind] + one
    return found


def _free(memory_budget: int | None) -> tuple[int, str]:
    available = available_memory()
    if memory_budget is None or memory_budget > available:
        return available, "free memory of this machine"
    return memory_budget, "--memory-budget"
