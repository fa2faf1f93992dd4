"""What expert parallelism sends: which rank holds which experts, and the bytes of a token on its way and back.

A token goes once to each rank that holds experts of it, however many. On the way a row is

    K expert ids (int32), K routing weights (float32), H values of x (bfloat16), zeros up to a multiple of 4 bytes

and a row of float32 sums comes back. Backward sends the row's gradient of out (bfloat16) and gets the gradients of x
and of the routing weights (float32). What stays on its rank is not sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jitmoe.errors import ConfigError
from jitmoe.plan.shapes import round_up

COUNTS_BYTES = 16
"""Bytes that each rank tells each other one before a call: how many rows will come, and what they want."""

ID_BYTES, WEIGHT_BYTES, VALUE_BYTES, SUM_BYTES, ALIGNMENT = 4, 4, 2, 4, 4


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row on the wire.

    Attributes:
        tokens: forward, to the experts.
        sums: forward, back.
        grads: backward, to the experts.
        grad_sums: backward, back.
    """

    tokens: int
    sums: int
    grads: int = 0
    grad_sums: int = 0

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.tokens + self.sums + self.grads + self.grad_sums


def row_bytes(
    hidden: int, top_k: int, training: bool = True, wants_x: bool = True, wants_weights: bool = True
) -> RowBytes:
    """Bytes of one row of each kind.

    Args:
        hidden: H.
        top_k: K.
        training: there is a backward pass.
        wants_x: some rank wants the gradient of x.
        wants_weights: some rank wants the gradient of the routing weights.
    """
    tokens = round_up(top_k * (ID_BYTES + WEIGHT_BYTES) + hidden * VALUE_BYTES, ALIGNMENT)
    sums = hidden * SUM_BYTES
    if not training:
        return RowBytes(tokens, sums)
    back = SUM_BYTES * (hidden * wants_x + top_k * wants_weights)
    return RowBytes(tokens, sums, round_up(hidden * VALUE_BYTES, ALIGNMENT), back)


def share_of(num_experts: int, rank: int, size: int) -> range:
    """The contiguous share of the experts that ``rank`` of ``size`` holds; the first ones hold one more if need be.

    Raises:
        ConfigError: there are fewer experts than ranks, or no such rank.
    """
    if not 0 <= rank < size:
        raise ConfigError(f"rank must be between 0 and {size - 1}, got {rank}")
    if num_experts < size:
        raise ConfigError(f"{num_experts} experts cannot be shared by {size} ranks: each holds one at least")
    least, more = divmod(num_experts, size)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


def bounds_of(num_experts: int, size: int) -> list[int]:
    """Where the shares of :func:`share_of` begin, and the end of the last one."""
    return [share_of(num_experts, rank, size).start for rank in range(size)] + [num_experts]


def slots_by_rank(topk_ids: npt.NDArray[np.int64], bounds: Sequence[int]) -> npt.NDArray[np.int64]:
    """Slots [T, ranks] of each token of ``topk_ids`` [T, K] whose experts each rank holds."""
    owner = np.searchsorted(np.asarray(bounds[1:]), topk_ids, side="right")
    return np.stack([(owner == rank).sum(1) for rank in range(len(bounds) - 1)], 1)


@dataclass(frozen=True)
class RankTraffic:
    """Bytes and rows that one rank exchanges with others in one step of one layer.

    Attributes:
        sent: bytes, those of the counts included.
        received: likewise.
        rows_out: rows that go to others.
        rows_in: rows that come from others.
        rows_here: rows that stay.
        slots_here: of the rows that stay.
        slots: of all rows that its experts compute.
        most_slots: of one row.
    """

    sent: int
    received: int
    rows_out: int
    rows_in: int
    rows_here: int
    slots_here: int
    slots: int
    most_slots: int


def traffic(slots: Sequence[npt.NDArray[np.int64]], each: RowBytes) -> list[RankTraffic]:
    """Of each rank, from the :func:`slots_by_rank` of each rank's tokens."""
    ranks = len(slots)
    rows = np.array([(mine > 0).sum(0) for mine in slots])  # from, to
    counts = COUNTS_BYTES * (ranks - 1)
    found = []
    for rank in range(ranks):
        here = int(rows[rank, rank])
        out, into = int(rows[rank].sum()) - here, int(rows[:, rank].sum()) - here
        mine = np.concatenate([theirs[:, rank] for theirs in slots])
        found.append(
            RankTraffic(
                sent=counts + out * (each.tokens + each.grads) + into * (each.sums + each.grad_sums),
                received=counts + into * (each.tokens + each.grads) + out * (each.sums + each.grad_sums),
                rows_out=out,
                rows_in=into,
                rows_here=here,
                slots_here=int(slots[rank][:, rank].sum()),
                slots=int(mine.sum()),
                most_slots=int(mine.max(initial=0)),
            )
        )
    return found
