"""Every byte of scratch of one call: shape, lifetime and address of each buffer, proved before use.

A pass is a fixed line of steps, repeated for each group of rows. A buffer is alive from its first to
its last step; two buffers may share addresses only if their lifetimes do not meet.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from jitmoe.errors import PlanError
from jitmoe.isa import ISAS
from jitmoe.plan.shapes import K_STEP, N_STRIP, PLANS_KEPT, Shape, ceil_div, round_up

FORWARD_STEPS = ("load", "gate_up", "down_low", "down")
BACKWARD_STEPS = ("load", "gate_up", "act_grad", "low_grads", "x_grad")

ALIGNMENT = 64
"""Bytes: one cache line, so that no two buffers or threads share one."""

CHUNK = 256
"""Columns of the contraction expanded at a time; mirrors kChunk in gemm/tuning.hpp."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int16": 2, "int64": 8}

SHUFFLES = 64
"""Orders tried at random where no ordinary one packs a pass as tightly as can be; few sizes need any."""


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
class ScratchPlan:
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


@lru_cache(PLANS_KEPT)
def plan_forward(shape: Shape, size: CallSize) -> ScratchPlan:
    """Scratch of a forward call."""
    load, gate_up, down_low, down = range(4)
    buffers = [
        _sums(shape, size, down),
        _panel("x_panel", shape, size, shape.hidden, load, gate_up),
        _panel("act_panel", shape, size, shape.intermediate, gate_up, down),
        *_low_rank(shape, size, {"gate_low": (load, gate_up), "up_low": (load, gate_up), "down_low": (down_low, down)}),
        *_thread_buffers(shape, size, strips=2, products=(gate_up, down), gathers=(load, load)),
    ]
    return prove(place(buffers, canary_bytes(shape)))


@lru_cache(PLANS_KEPT)
def plan_backward(shape: Shape, size: CallSize, x_grad: bool, recompute: bool) -> ScratchPlan:
    """Scratch of a backward call; ``x_grad`` where x wants one, ``recompute`` where gate and up were not saved."""
    load, gate_up, act_grad, low_grads, last = range(5)
    strips = ceil_div(shape.intermediate, N_STRIP)
    # Of gate and up: u where it is computed again, then the gradients of u. Of down: these, then u again.
    low = {name: (load if recompute else low_grads, last) for name in ("gate_low", "up_low")}
    low |= {"down_low": (load, low_grads if recompute else act_grad)}
    buffers = [
        _panel("out_panel", shape, size, shape.hidden, load, act_grad),
        _panel("gate_panel", shape, size, shape.intermediate, act_grad, last),
        _panel("up_panel", shape, size, shape.intermediate, act_grad, last),
        Buffer("dot_parts", (size.rows, strips), "float32", act_grad, low_grads),
        *_low_rank(shape, size, low),
        *_thread_buffers(
            shape,
            size,
            strips=4,
            products=(gate_up if recompute else act_grad, last),
            gathers=(load, last if size.rank else load),
        ),
    ]
    if size.rank:
        lives = {
            "down_low_rows": (load, act_grad),
            "gate_low_rows": (low_grads, last),
            "up_low_rows": (low_grads, last),
        }
        if recompute:
            lives |= {
                "gate_in_rows": (load, act_grad),
                "up_in_rows": (load, act_grad),
                "down_in_rows": (low_grads, last),
            }
            buffers.append(_panel("act_panel", shape, size, shape.intermediate, gate_up, low_grads))
        buffers += [Buffer(name, (size.rows, size.rank), "float32", *life) for name, life in lives.items()]
    if recompute:
        buffers.append(_panel("x_panel", shape, size, shape.hidden, load, gate_up))
        group = saved_shape(shape.intermediate, size.rows)
        buffers += [Buffer(name, group, "bfloat16", gate_up, act_grad) for name in ("group_gate", "group_up")]
    if x_grad:
        buffers.append(_sums(shape, size, last))
    return prove(place(buffers, canary_bytes(shape)))


@dataclass(frozen=True)
class Saved:
    """What forward keeps of one intermediate for backward."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def saved_tensors(intermediate: int, rows: int, rank: int) -> tuple[Saved, ...]:
    """What forward keeps: gate and up before the activation, strip by strip, and the low-rank rows of all three."""
    strips = saved_shape(intermediate, rows)
    saved = [Saved(name, strips, "bfloat16") for name in ("saved_gate", "saved_up")]
    if rank:
        saved += [Saved(f"saved_{name}_u", (rows, rank), "float32") for name in ("gate", "up", "down")]
    return tuple(saved)


def saved_shape(intermediate: int, rows: int) -> tuple[int, int, int]:
    """Shape of gate, and of up, as they are kept for backward: strip by strip."""
    return ceil_div(intermediate, N_STRIP), rows, N_STRIP


def row_bytes(shape: Shape, training: bool) -> int:
    """Bytes of panels that one more row of a group takes; what the size of a group is decided by."""
    columns = 2 * shape.hidden + 4 * shape.intermediate if training else shape.hidden + shape.intermediate
    return columns * ITEM_BYTES[ISAS[shape.isa].operand]


def thread_strides(shape: Shape, size: CallSize, strips: int) -> dict[str, int]:
    """Bytes from one thread's part of a per-thread buffer to the next one's."""
    return {
        "weights_stride": _weights_items(shape) * 4,
        "strips_stride": strips * max(size.segment_rows, 1) * N_STRIP * 4,
        "rows_stride": _gathered_items(shape, size) * 2,
        "lora_stride": size.rank * N_STRIP * 4,
    }


def canary_bytes(shape: Shape) -> int:
    """Bytes before and behind each buffer that a checked instance fills and looks at; mirrors kLine in checked.hpp."""
    return ALIGNMENT if shape.watch == "memory" else 0


def place(buffers: Sequence[Buffer], gap: int = 0) -> ScratchPlan:
    """Pack lifetimes into addresses: in some order, each at the lowest offset free for its whole life.

    Orders are tried until one needs no more than :func:`lower_bound`, so the same buffers always get the same offsets.
    With a ``gap``, bytes that stay free before and behind each buffer while it lives, the first order is good enough.

    Raises:
        PlanError: for anything but scratch, which has no place in the arena.
    """
    for buffer in buffers:
        if not isinstance(buffer, Buffer):
            raise PlanError(f"only scratch can be placed in the arena, got {buffer!r}")
    bound = lower_bound(buffers)
    best: ScratchPlan | None = None
    for order in _orders(buffers):
        found = _first_fit(order, gap)
        if best is None or found.nbytes < best.nbytes:
            best = found
        if gap or best.nbytes == bound:
            return best
    assert best is not None
    return best


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """Bytes alive at the fullest step: no placement needs less."""
    starts = {buffer.first for buffer in buffers}
    return max((sum(b.nbytes for b in buffers if b.first <= step <= b.last) for step in starts), default=0)


def _orders(buffers: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """Orders to place in, the most promising first: size, size times life, life; then shuffles.

    A buffer that lives from beginning to end wastes nothing at the bottom, so shuffles leave those there.
    """
    yield sorted(buffers, key=lambda b: (-b.nbytes, b.first, b.name))
    yield sorted(buffers, key=lambda b: (-b.nbytes * (b.last - b.first + 1), b.name))
    by_life = sorted(buffers, key=lambda b: (b.first - b.last, b.first, -b.nbytes, b.name))
    yield by_life
    longest = by_life[0].last - by_life[0].first
    always = [b for b in by_life if b.last - b.first == longest]
    others = by_life[len(always) :]
    generator = random.Random(0)
    for _ in range(SHUFFLES):
        generator.shuffle(others)
        yield [*always, *others]


def _first_fit(order: Sequence[Buffer], gap: int) -> ScratchPlan:
    placed: list[Placed] = []
    for buffer in order:
        offset = gap
        for other in sorted((p for p in placed if p.buffer.meets(buffer)), key=lambda p: p.offset):
            if offset + buffer.nbytes + gap <= other.offset:
                break
            offset = max(offset, other.end + gap)
        placed.append(Placed(buffer, offset))
    return ScratchPlan(tuple(placed), max((p.end for p in placed), default=0) + gap)


def prove(plan: ScratchPlan) -> ScratchPlan:
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
    isa = ISAS[shape.isa]
    extent = (size.blocks * shape.m_step, round_up(columns, isa.column_step))
    return Buffer(name, extent, isa.operand, first, last)


def _low_rank(shape: Shape, size: CallSize, lives: dict[str, tuple[int, int]]) -> list[Buffer]:
    if not size.rank:
        return []
    extent = (size.blocks, size.rank, shape.m_step)
    return [Buffer(name, extent, "float32", *life) for name, life in lives.items()]


def _thread_buffers(
    shape: Shape, size: CallSize, strips: int, products: tuple[int, int], gathers: tuple[int, int]
) -> list[Buffer]:
    """Of each thread, alive in the steps that multiply strips and in those that gather rows."""
    rows = max(size.segment_rows, 1)
    buffers = [
        Buffer("thread_weights", (size.threads, _weights_items(shape)), "float32", *products),
        Buffer("thread_strips", (size.threads, strips, rows, N_STRIP), "float32", *products),
        Buffer("thread_rows", (size.threads, _gathered_items(shape, size)), "bfloat16", *gathers),
    ]
    if size.rank:
        buffers.append(Buffer("thread_lora", (size.threads, size.rank, N_STRIP), "float32", *products))
    return buffers


def _weights_items(shape: Shape) -> int:
    """Weights expanded or paired; on AMX pairs of the whole contraction."""
    longest = round_up(max(shape.hidden, shape.intermediate), K_STEP)
    return (longest // 2 if shape.isa == "amx" else CHUNK) * N_STRIP


def _gathered_items(shape: Shape, size: CallSize) -> int:
    """Whole rows of one block, or 32 columns of a segment: a multiple of a cache line."""
    return max(shape.m_step * round_up(shape.hidden, K_STEP), size.segment_rows * N_STRIP)
