"""Every byte of scratch of one call: shape, lifetime and address of each buffer, proved before use.

A pass is a fixed line of steps, repeated for each group of rows. A buffer is alive from its first to
its last step; two buffers may share addresses only if their lifetimes do not meet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jitmoe.errors import PlanError
from jitmoe.plan import K_STEP, N_STRIP, PAIRED_OPERANDS, Shape, ceil_div, round_up

FORWARD_STEPS = ("load", "gate_up", "down_low", "down")
BACKWARD_STEPS = ("load", "gate_up", "act_grad", "low_grads", "x_grad")

ALIGNMENT = 64
"""Bytes: one cache line, so that no two buffers or threads share one."""

CHUNK = 256
"""Columns of the contraction expanded at a time; mirrors kChunk in gemm.hpp."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Buffer:
    """Scratch of ``shape`` and ``dtype``, alive from step ``first`` to step ``last``, both included."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up to the alignment."""
        return ceil_div(math.prod(self.shape) * ITEM_BYTES[self.dtype], ALIGNMENT) * ALIGNMENT

    def meets(self, other: "Buffer") -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placed:
    """A buffer and its offset in the arena."""

    buffer: Buffer
    offset: int

    @property
    def end(self) -> int:
        """First byte behind the buffer."""
        return self.offset + self.buffer.nbytes


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets of all scratch buffers of one call; ``nbytes`` is the size of the arena."""

    placed: tuple[Placed, ...]
    nbytes: int

    def offsets(self) -> dict[str, int]:
        """Offset of each buffer by name."""
        return {item.buffer.name: item.offset for item in self.placed}


@dataclass(frozen=True)
class CallSize:
    """The extents that scratch depends on, from the rows that were really routed.

    Attributes:
        tokens: T.
        rows: rows of the largest group.
        blocks: row blocks of the largest group.
        segment_rows: rows of the largest segment.
        rank: LoRA rank, 0 without LoRA.
        threads: threads of the call.
    """

    tokens: int
    rows: int
    blocks: int
    segment_rows: int
    rank: int
    threads: int


def plan_forward(shape: Shape, size: CallSize) -> MemoryPlan:
    """Scratch of a forward call."""
    load, gate_up, down_low, down = range(4)
    buffers = [
        _sums(shape, size, down),
        _panel("x_panel", shape, size, shape.hidden, load, gate_up),
        _panel("act_panel", shape, size, shape.intermediate, gate_up, down),
        *_low_rank(shape, size, {"gate_low": (load, gate_up), "up_low": (load, gate_up), "down_low": (down_low, down)}),
        *_thread_buffers(shape, size, strips=2, last=down),
    ]
    return prove(place(buffers))


def plan_backward(shape: Shape, size: CallSize, x_grad: bool, recompute: bool) -> MemoryPlan:
    """Scratch of a backward call; ``x_grad`` where x wants one, ``recompute`` where gate and up were not saved."""
    load, gate_up, act_grad, low_grads, last = range(5)
    strips = ceil_div(shape.intermediate, N_STRIP)
    buffers = [
        _panel("out_panel", shape, size, shape.hidden, load, act_grad),
        _panel("act_panel", shape, size, shape.intermediate, act_grad, low_grads),
        _panel("gate_panel", shape, size, shape.intermediate, act_grad, last),
        _panel("up_panel", shape, size, shape.intermediate, act_grad, last),
        Buffer("dot_parts", (size.rows, strips), "float32", act_grad, low_grads),
        *_low_rank(shape, size, {name: (load, last) for name in ("gate_low", "up_low", "down_low")}),
        *_thread_buffers(shape, size, strips=4, last=last),
        Buffer("thread_block", (size.threads, _block_items(shape)), "float32", load, load),
    ]
    if size.rank:
        lives = {
            "gate_in_rows": (load, act_grad),
            "up_in_rows": (load, act_grad),
            "down_low_rows": (load, act_grad),
            "gate_low_rows": (low_grads, last),
            "up_low_rows": (low_grads, last),
            "down_in_rows": (low_grads, last),
        }
        buffers += [Buffer(name, (size.rows, size.rank), "float32", *life) for name, life in lives.items()]
    if recompute:
        buffers.append(_panel("x_panel", shape, size, shape.hidden, load, gate_up))
        group = saved_shape(shape.intermediate, size.rows)
        buffers += [Buffer(name, group, "bfloat16", gate_up, act_grad) for name in ("group_gate", "group_up")]
    if x_grad:
        buffers.append(_sums(shape, size, last))
    return prove(place(buffers))


def saved_shape(intermediate: int, rows: int) -> tuple[int, int, int]:
    """Shape of gate, and of up, as they are kept for backward: bfloat16, strip by strip."""
    return ceil_div(intermediate, N_STRIP), rows, N_STRIP


def operand_dtype(shape: Shape) -> str:
    """What a panel holds: the left operand of the instruction set's products."""
    return "bfloat16" if shape.isa in PAIRED_OPERANDS else "float32"


def row_bytes(shape: Shape, training: bool) -> int:
    """Bytes of panels that one more row of a group takes; what the size of a group is decided by."""
    columns = 2 * shape.hidden + 4 * shape.intermediate if training else shape.hidden + shape.intermediate
    return columns * ITEM_BYTES[operand_dtype(shape)]


def thread_strides(shape: Shape, size: CallSize, strips: int) -> dict[str, int]:
    """Bytes from one thread's part of a per-thread buffer to the next one's."""
    return {
        "weights_stride": _weights_items(shape) * 4,
        "strips_stride": strips * max(size.segment_rows, 1) * N_STRIP * 4,
        "rows_stride": _gathered_items(shape, size) * 2,
        "block_stride": _block_items(shape) * 4,
    }


def place(buffers: Sequence[Buffer]) -> MemoryPlan:
    """Pack lifetimes into addresses: largest first, each at the lowest offset free for its whole life."""
    placed: list[Placed] = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first, b.name)):
        offset = 0
        for other in sorted((p for p in placed if p.buffer.meets(buffer)), key=lambda p: p.offset):
            if offset + buffer.nbytes <= other.offset:
                break
            offset = max(offset, other.end)
        placed.append(Placed(buffer, offset))
    return MemoryPlan(tuple(placed), max((p.end for p in placed), default=0))


def prove(plan: MemoryPlan) -> MemoryPlan:
    """Return ``plan`` if no two buffers overlap both in lifetime and in addresses.

    Raises:
        PlanError: naming the two buffers, or one that does not fit the arena.
    """
    for i, one in enumerate(plan.placed):
        if one.offset < 0 or one.end > plan.nbytes or one.offset % ALIGNMENT:
            raise PlanError(
                f"buffer {one.buffer.name} at {one.offset}..{one.end} leaves the arena of {plan.nbytes} bytes"
            )
        for other in plan.placed[i + 1 :]:
            overlap = one.offset < other.end and other.offset < one.end
            if overlap and one.buffer.meets(other.buffer) and one.buffer.nbytes and other.buffer.nbytes:
                raise PlanError(
                    f"live buffers share addresses: {one.buffer.name} at {one.offset}..{one.end} (steps "
                    f"{one.buffer.first}-{one.buffer.last}) and {other.buffer.name} at {other.offset}..{other.end} "
                    f"(steps {other.buffer.first}-{other.buffer.last})"
                )
    return plan


def _sums(shape: Shape, size: CallSize, last: int) -> Buffer:
    return Buffer("sums", (ceil_div(shape.hidden, N_STRIP), size.tokens, N_STRIP), "float32", 0, last)


def _panel(name: str, shape: Shape, size: CallSize, columns: int, first: int, last: int) -> Buffer:
    dtype = operand_dtype(shape)
    return Buffer(name, (size.blocks * shape.m_step, round_up(columns, _column_step(shape))), dtype, first, last)


def _column_step(shape: Shape) -> int:
    """What the rows of a panel are padded to: whole tiles, pairs, or nothing."""
    if shape.isa == "amx":
        return K_STEP
    return 2 if shape.isa in PAIRED_OPERANDS else 1


def _low_rank(shape: Shape, size: CallSize, lives: dict[str, tuple[int, int]]) -> list[Buffer]:
    if not size.rank:
        return []
    extent = (size.blocks, size.rank, shape.m_step)
    return [Buffer(name, extent, "float32", *life) for name, life in lives.items()]


def _thread_buffers(shape: Shape, size: CallSize, strips: int, last: int) -> list[Buffer]:
    rows = max(size.segment_rows, 1)
    return [
        Buffer("thread_weights", (size.threads, _weights_items(shape)), "float32", 0, last),
        Buffer("thread_strips", (size.threads, strips, rows, N_STRIP), "float32", 0, last),
        Buffer("thread_rows", (size.threads, _gathered_items(shape, size)), "bfloat16", 0, last),
    ]


def _weights_items(shape: Shape) -> int:
    """Weights expanded or paired, and one strip of a LoRA matrix; on AMX pairs of the whole contraction."""
    longest = round_up(max(shape.hidden, shape.intermediate), K_STEP)
    chunk = longest // 2 if shape.isa == "amx" else CHUNK
    return max(chunk, shape.padded_rank) * N_STRIP


def _gathered_items(shape: Shape, size: CallSize) -> int:
    """Whole rows of one block, or 32 columns of a segment: a multiple of a cache line."""
    return max(shape.m_step * round_up(shape.hidden, K_STEP), size.segment_rows * N_STRIP)


def _block_items(shape: Shape) -> int:
    return shape.m_step * round_up(shape.hidden, K_STEP)
