"""How the rows of a call are cut: into segments of one expert, and into groups of segments that share the panels."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from jitmoe.plan.shapes import ceil_div, round_up

GROUP_BYTES = 24 << 20
"""Bytes that the panels of one group may take. The rows of a group go through the steps of a pass together."""


@dataclass(frozen=True)
class Extents:
    """The sizes that decide the scratch of a call.

    Attributes:
        tokens: T.
        rows: rows of the largest group.
        blocks: row blocks of the largest group.
        segment_rows: rows of the largest segment.
        rank: LoRA rank, 0 without LoRA.
        threads: threads of the call; each has scratch of its own.
    """

    tokens: int
    rows: int
    blocks: int
    segment_rows: int
    rank: int
    threads: int


@dataclass(frozen=True)
class Groups:
    """Rows cut into segments, and segments into groups.

    Attributes:
        segments: [n, 4] int64: expert, first row, rows, first row block in the group (``Segment`` in call.hpp).
        bounds: [groups + 1] int64: segments ``bounds[g]:bounds[g + 1]`` form group g and share the panels.
        rows: rows of the largest group.
        blocks: row blocks of the largest group.
        segment_rows: rows of the largest segment.
    """

    segments: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
    rows: int
    blocks: int
    segment_rows: int

    def extents(self, tokens: int, rank: int, threads: int) -> Extents:
        """The extents of a call of so many tokens that is cut like this."""
        return Extents(tokens, self.rows, self.blocks, self.segment_rows, rank, threads)


def group_limit(m_step: int, row_bytes: int, group_bytes: int = GROUP_BYTES) -> int:
    """Most rows of a group, a multiple of ``m_step``; the padding of its row blocks counts.

    Args:
        m_step: rows of a row block.
        row_bytes: bytes of panels for one row, see :func:`~jitmoe.plan.scratch.row_bytes`.
        group_bytes: bytes that the panels may take; four row blocks are allowed whatever they take.
    """
    return round_up(max(group_bytes // row_bytes, 4 * m_step), m_step)


def worst_extents(
    tokens: int, rows: int, active: tuple[int, int], m_step: int, limit: int, rank: int, threads: int
) -> Extents:
    """Extents that no routing exceeds, whichever experts the rows go to.

    Some routing reaches each extent. Where an expert can fill a group, one routing reaches all three: the expert with
    most of the rows has the largest segment, and one row on each other expert gives the most row blocks.

    Args:
        tokens: T.
        rows: of the call; a call with fewer has smaller extents.
        active: fewest and most experts that these rows can go to.
        m_step: rows of a row block.
        limit: most rows of a group, from :func:`group_limit`.
        rank: LoRA rank.
        threads: of the call.
    """
    fewest, most = active
    return Extents(
        tokens,
        rows=min(rows, limit),
        blocks=min(most + (rows - most) // m_step, limit // m_step),
        segment_rows=min(rows - fewest + 1, limit) if rows else 0,
        rank=rank,
        threads=threads,
    )


def plan_groups(
    active: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    m_step: int,
    row_bytes: int,
    group_bytes: int | None = None,
) -> Groups:
    """Cut the rows of a call into groups that fit ``group_bytes``.

    An expert with more rows than a group holds is cut into even segments, no two of them in one group. The cut depends
    on the routing and the shape alone, never on the number of threads.

    Args:
        active: [A] int64 ids of the experts with rows, ascending.
        offsets: [A + 1] int64; rows ``offsets[i]:offsets[i + 1]`` are those of ``active[i]``.
        m_step: rows of a row block.
        row_bytes: bytes of panels for one row.
        group_bytes: bytes that the panels may take; :data:`GROUP_BYTES` where not given.
    """
    limit = group_limit(m_step, row_bytes, GROUP_BYTES if group_bytes is None else group_bytes)
    counts = np.diff(offsets)
    blocks_of = -(-counts // m_step)
    if counts.size and int(blocks_of.sum()) * m_step <= limit:
        return _one_group(active, offsets, counts, blocks_of)
    segments: list[tuple[int, int, int, int]] = []
    bounds = [0]
    rows = blocks = most_rows = most_blocks = 0
    for expert, begin, end in zip(active.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        pieces = ceil_div(end - begin, limit)
        cuts = [begin + (end - begin) * i // pieces for i in range(pieces + 1)]
        for first, last in pairwise(cuts):
            more = ceil_div(last - first, m_step)
            if blocks and ((blocks + more) * m_step > limit or segments[-1][0] == expert):
                bounds.append(len(segments))
                rows = blocks = 0
            segments.append((expert, first, last - first, blocks))
            rows += last - first
            blocks += more
            most_rows, most_blocks = max(most_rows, rows), max(most_blocks, blocks)
    if segments:
        bounds.append(len(segments))
    return Groups(
        np.array(segments, dtype=np.int64).reshape(-1, 4),
        np.array(bounds, dtype=np.int64),
        most_rows,
        most_blocks,
        max((count for _, _, count, _ in segments), default=0),
    )


def _one_group(
    active: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int64],
) -> Groups:
    """A segment for each expert, all in one group: what small calls come to, where a loop in Python would show."""
    segments = np.stack((active, offsets[:-1], counts, np.cumsum(blocks) - blocks), axis=1)
    bounds = np.array([0, counts.size])
    return Groups(segments, bounds, int(offsets[-1]), int(blocks.sum()), int(counts.max()))
