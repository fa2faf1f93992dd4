"""Tokens as rows of bytes: which token goes to which rank, and what its row says there."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from jitmoe.errors import InputError
from jitmoe.plan.exchange import ID_BYTES, VALUE_BYTES, WEIGHT_BYTES, row_bytes

SKIPPED = -1
"""Local id of a slot whose expert is elsewhere."""


@dataclass(frozen=True, eq=False)
class Operands:
    """Rows for the experts of one rank: x bfloat16 [n, H], local ids int32 [n, K], routing weights float32 [n, K]."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def places(self) -> Tensor:
        """Int64 [n, most]: the slots of each row that are not skipped, in their order, and then others.

        What forward saves is sized by the slots: those of other ranks' experts would cost as much as those of ours.
        """
        here = self.ids != SKIPPED
        most = int(here.sum(1).max().clamp(min=1))
        return (~here).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]

    def packed(self) -> Tensor:
        """As uint8 [n, bytes]; see :mod:`jitmoe.plan.exchange`."""
        hidden, top_k = self.x.shape[1], self.ids.shape[1]
        rows = torch.zeros(len(self), row_bytes(hidden, top_k).tokens, dtype=torch.uint8)
        ids, weights, x = _fields(rows, hidden, top_k)
        ids.copy_(self.ids)
        weights.copy_(self.weights)
        x.copy_(self.x)
        return rows

    @classmethod
    def unpacked(cls, rows: Tensor, hidden: int, top_k: int) -> "Operands":
        """The inverse of :meth:`packed`; the tensors are contiguous, in memory of their own."""
        ids, weights, x = (part.contiguous() for part in _fields(rows, hidden, top_k))
        return cls(x, ids, weights)


def _fields(rows: Tensor, hidden: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    ids, weights = ID_BYTES * top_k, WEIGHT_BYTES * top_k
    return (
        rows[:, :ids].view(torch.int32),
        rows[:, ids : ids + weights].view(torch.float32),
        rows[:, ids + weights :][:, : VALUE_BYTES * hidden].view(torch.bfloat16),
    )


def as_bytes(values: Tensor, width: int) -> Tensor:
    """[n, columns] of any dtype as uint8 [n, width], zeros at the end."""
    rows = values.contiguous().view(torch.uint8)
    missing = width - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows


def values_in(rows: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """The inverse of :func:`as_bytes`."""
    return rows.view(dtype)[:, :columns].contiguous()


@dataclass(frozen=True, eq=False)
class Routes:
    """Which of T tokens goes to which rank.

    Attributes:
        tokens: for each rank int64 [n], ascending numbers of the tokens that it gets.
        ids: for each rank int32 [n, K], ids among its experts, or SKIPPED.
    """

    tokens: Sequence[Tensor]
    ids: Sequence[Tensor]

    @classmethod
    def of(cls, topk_ids: Tensor, bounds: Sequence[int], allow_skip: bool) -> "Routes":
        """Those of global ids [T, K], where rank r holds the experts from ``bounds[r]`` to ``bounds[r + 1]``.

        Raises:
            InputError: an id of no expert, without ``allow_skip``; names token and slot.
        """
        wrong = (topk_ids < 0) | (topk_ids >= bounds[-1])
        if not allow_skip and wrong.any():
            token, slot = wrong.nonzero()[0].tolist()
            raise InputError(
                f"topk_ids[{token}, {slot}] is {topk_ids[token, slot].item()}, outside of the {bounds[-1]} experts of "
                "all ranks; set allow_skip=True in the config if such slots are to be skipped"
            )
        tokens, ids = [], []
        for start, stop in pairwise(bounds):
            here = (topk_ids >= start) & (topk_ids < stop)
            chosen = here.any(-1).nonzero().view(-1)
            local = (topk_ids - start).masked_fill_(~here, SKIPPED)
            tokens.append(chosen)
            ids.append(local[chosen].to(torch.int32))
        return cls(tokens, ids)

    def operands(self, rank: int, x: Tensor, weights: Tensor) -> Operands:
        """What ``rank`` gets of x [T, H] bfloat16 and weights [T, K] float32."""
        return Operands(x[self.tokens[rank]], self.ids[rank], weights[self.tokens[rank]])

    def counts(self) -> list[int]:
        """Rows for each rank."""
        return [len(tokens) for tokens in self.tokens]

    def add_up(self, parts: Sequence[Tensor], tokens: int) -> Tensor:
        """Float32 [T, columns]: the sum over the ranks of their rows, in the order of the ranks, from zero."""
        total = torch.zeros(tokens, parts[0].shape[1])
        for chosen, part in zip(self.tokens, parts, strict=True):
            total.index_add_(0, chosen, part)
        return total
