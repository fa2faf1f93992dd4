"""Routing: which rows each expert computes, as a stable counting sort of the slots."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jitmoe.errors import InputError, InputTypeError
from jitmoe.host.compiled import jit
from jitmoe.process import compiled_call


@dataclass(frozen=True, eq=False)
class Route:
    """Slots sorted by expert: T tokens with K slots each, A experts with rows, S rows (slots that are kept).

    All arrays are contiguous int64. Slot ``t * K + k`` is the k-th choice of token t.

    Attributes:
        active: [A] ids of the experts that have rows, ascending.
        offsets: [A + 1] ``offsets[i]:offsets[i + 1]`` are the rows of ``active[i]``.
        row_token: [S] token of each row.
        row_slot: [S] slot of each row, ascending inside an expert.
    """

    active: np.ndarray
    offsets: np.ndarray
    row_token: np.ndarray
    row_slot: np.ndarray

    def absent(self, num_experts: int) -> Iterator[tuple[int, int]]:
        """Ranges ``begin, end`` of the experts without rows, ascending."""
        for before, active in pairwise((-1, *self.active.tolist(), num_experts)):
            if active - before > 1:
                yield before + 1, active


def route(topk_ids: np.ndarray, num_experts: int, allow_skip: bool = False) -> Route:
    """Sort the slots of ``topk_ids`` by expert.

    Args:
        topk_ids: [T, K] int64 or int32 expert ids, any strides; T = 0 is fine.
        num_experts: E; ids lie in [0, E).
        allow_skip: leave a slot out whose id lies outside [0, E), instead of refusing it.

    Raises:
        InputTypeError: ``topk_ids`` is not int64 or int32.
        InputError: ``topk_ids`` is not 2-D, or has an id outside [0, E) without ``allow_skip``.
    """
    if topk_ids.dtype not in (np.int64, np.int32):
        raise InputTypeError(f"topk_ids must be int64 or int32, got {topk_ids.dtype}")
    if topk_ids.ndim != 2:
        raise InputError(f"topk_ids must be 2-D [tokens, top_k], got shape {topk_ids.shape}")
    ids = np.ascontiguousarray(topk_ids)
    with compiled_call():
        if not allow_skip:
            _refuse_outside(ids, num_experts)
        return Route(*_sort_slots(ids, num_experts))


def _refuse_outside(ids: np.ndarray, num_experts: int) -> None:
    slot: int = _first_outside(ids, num_experts)
    if slot >= 0:
        token, choice = divmod(slot, ids.shape[1])
        raise InputError(
            f"topk_ids[{token}, {choice}] (token {token}, slot {choice}) is {ids[token, choice]}: "
            f"expert ids must lie in [0, {num_experts}); "
            "set allow_skip=True in MoEConfig to skip the slots of experts held elsewhere"
        )


@jit()
def _first_outside(ids: np.ndarray, num_experts: int) -> int:
    """Slot of the first id outside [0, num_experts), or -1."""
    tokens, top_k = ids.shape
    for token in range(tokens):
        for choice in range(top_k):
            if not 0 <= ids[token, choice] < num_experts:
                return int(token * top_k + choice)
    return -1


@jit()
def _count_rows(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[num_experts] rows of each expert."""
    counts = np.zeros(num_experts, np.int64)
    tokens, top_k = ids.shape
    for token in range(tokens):
        for choice in range(top_k):
            expert = ids[token, choice]
            if 0 <= expert < num_experts:
                counts[expert] += 1
    return counts


@jit()
def _row_ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``active`` and ``offsets`` of :class:`Route`; overwrites ``counts`` with each expert's first row."""
    active = np.empty(np.count_nonzero(counts), np.int64)
    offsets = np.zeros(active.size + 1, np.int64)
    index = 0
    for expert in range(counts.size):
        rows = counts[expert]
        counts[expert] = offsets[index]
        if rows > 0:
            active[index] = expert
            offsets[index + 1] = offsets[index] + rows
            index += 1
    return active, offsets


@jit()
def _sort_slots(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four arrays of :class:`Route`, in its order."""
    next_row = _count_rows(ids, num_experts)
    active, offsets = _row_ranges(next_row)
    row_token = np.empty(offsets[-1], np.int64)
    row_slot = np.empty(offsets[-1], np.int64)
    tokens, top_k = ids.shape
    for token in range(tokens):
        for choice in range(top_k):
            expert = ids[token, choice]
            if 0 <= expert < num_experts:
                row = next_row[expert]
                next_row[expert] = row + 1
                row_token[row] = token
                row_slot[row] = token * top_k + choice
    return active, offsets, row_token, row_slot
