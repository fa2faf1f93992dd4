"""Where scratch lies: buffers with lifetimes, packed into one arena, and the proof that live ones share no address."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jitmoe.errors import PlanError
from jitmoe.plan.shapes import round_up

ALIGNMENT = 64
"""Bytes: one cache line, so that no two buffers or threads share one."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int16": 2, "int64": 8}
"""Bytes of one element, by dtype."""

SHUFFLES = 64
"""Random orders to try where no sorted order reaches the lower bound; few sizes need any."""


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
        return round_up(math.prod(self.shape) * ITEM_BYTES[self.dtype], ALIGNMENT)

    @property
    def part_bytes(self) -> int:
        """Bytes from one index of the first axis to the next: one thread's part of a buffer of all threads."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    def meets(self, other: "Buffer") -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placed:
    """A buffer and its offset in the arena, in bytes."""

    buffer: Buffer
    offset: int

    @property
    def end(self) -> int:
        """First byte behind the buffer."""
        return self.offset + self.buffer.nbytes


@dataclass(frozen=True)
class ScratchPlan:
    """Offsets of all scratch buffers of one pass, and the bytes of the arena."""

    placed: tuple[Placed, ...]
    nbytes: int

    def fields(self, base: int) -> dict[str, int]:
        """Fields of a ``Call``: addresses in an arena at ``base``, and bytes from one thread's part to the next."""
        fields: dict[str, int] = {}
        for item in self.placed:
            fields[item.buffer.name] = base + item.offset
            if item.buffer.name.startswith("thread_"):
                fields[f"{item.buffer.name}.stride"] = item.buffer.part_bytes
        return fields


def place(buffers: Sequence[Buffer], gap: int = 0) -> ScratchPlan:
    """Place each buffer at the lowest offset that is free for its whole life, in the order that needs least memory.

    Orders are tried in a fixed sequence until one needs no more than :func:`lower_bound`, so the same buffers always
    get the same offsets.

    Args:
        buffers: scratch of one pass.
        gap: bytes that stay free before and behind each buffer while it lives. With a gap the first order is taken.

    Raises:
        PlanError: an item is no :class:`Buffer`; nothing but scratch has a place in the arena.
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

    Buffers with the longest life waste nothing at the bottom of the arena, so shuffles leave them there.
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
        PlanError: two live buffers share addresses, or one leaves the arena; the message names them.
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
