"""How the intermediate dimension is cut into parts, each of which is a layer of its own with fewer columns."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise

from jitmoe.config import MoEConfig
from jitmoe.plan.projections import NAMES


@dataclass(frozen=True)
class Part:
    """Columns ``first`` to ``end`` of I.

    Its out, its gradient of x and its gradients of what has no axis I are summands of those of the layer.

    Attributes:
        index: of the part; sums are taken in this order.
        first: its first column.
        end: the column behind its last one.
        config: of a layer with these columns alone.
        suffix: behind the names of what each part has; none where there is one part.
    """

    index: int
    first: int
    end: int
    config: MoEConfig
    suffix: str

    @property
    def is_whole(self) -> bool:
        """Whether it is the only part."""
        return not self.suffix

    def names(self) -> tuple[str, ...]:
        """Names of its packed gate, up and down."""
        return tuple(f"{name}{self.suffix}" for name in NAMES)


@lru_cache(maxsize=256)
def parts_of(config: MoEConfig) -> tuple[Part, ...]:
    """The parts of ``config.tensor_parallel``, as even as multiples of the granule allow; no later one is larger."""
    if config.parts == 1:
        return (Part(0, 0, config.intermediate_size, config, ""),)
    granule = config.packing.granule
    each, more = divmod(-(-config.intermediate_size // granule), config.parts)
    ends = accumulate(granule * (each + (index < more)) for index in range(config.parts))
    cuts = [0, *(min(end, config.intermediate_size) for end in ends)]
    return tuple(
        Part(index, first, end, _alone(config, end - first), f"_{index}")
        for index, (first, end) in enumerate(pairwise(cuts))
    )


def _alone(config: MoEConfig, columns: int) -> MoEConfig:
    """``config`` of a layer with so many columns of I. The budget is that of the layer, not of its parts."""
    return replace(config, intermediate_size=columns, tensor_parallel=1, memory_budget=None)
