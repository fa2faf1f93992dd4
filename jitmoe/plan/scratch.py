"""Every byte of scratch of a pass: shape, lifetime and address of each buffer, proved before use.

A pass repeats a fixed sequence of steps for each group of rows. A buffer is alive from its first to its last step; two
buffers may share addresses only if their lifetimes do not meet.
"""

from dataclasses import dataclass
from functools import lru_cache

from jitmoe.isa import ISAS
from jitmoe.plan.groups import Extents
from jitmoe.plan.placement import ALIGNMENT, ITEM_BYTES, Buffer, ScratchPlan, place, prove
from jitmoe.plan.shapes import K_STEP, N_STRIP, PLANS_KEPT, Shape, ceil_div, round_up

FORWARD_STEPS = ("load", "gate_up", "down_low", "down")
BACKWARD_STEPS = ("load", "gate_up", "act_grad", "low_grads", "x_grad")
"""Steps of a pass in the order of ``ForwardStep`` (forward.hpp) and ``BackwardStep`` (backward.hpp)."""

TILE_ROWS = 16
"""Rows of a whole tile; kTile in shape.hpp."""

CHUNK = 256
"""Columns of the contraction whose weights are expanded or paired at a time; mirrors kChunk in gemm/tuning.hpp."""


@lru_cache(PLANS_KEPT)
def plan_forward(shape: Shape, size: Extents) -> ScratchPlan:
    """Scratch of a forward pass, placed and proved."""
    return prove(place(forward_buffers(shape, size), canary_bytes(shape)))


@lru_cache(PLANS_KEPT)
def plan_backward(shape: Shape, size: Extents, x_grad: bool, recompute: bool) -> ScratchPlan:
    """Scratch of a backward pass, placed and proved; arguments as of :func:`backward_buffers`."""
    return prove(place(backward_buffers(shape, size, x_grad, recompute), canary_bytes(shape)))


def forward_buffers(shape: Shape, size: Extents) -> list[Buffer]:
    """Scratch of a forward pass."""
    load, gate_up, down_low, down = range(4)
    return [
        _sums(shape, size, down),
        _panel("x_panel", shape, size, shape.hidden, load, gate_up),
        _panel("act_panel", shape, size, shape.intermediate, gate_up, down),
        *_low_rank(shape, size, {"gate.low": (load, gate_up), "up.low": (load, gate_up), "down.low": (down_low, down)}),
        *_thread_buffers(shape, size, strips=2, products=(gate_up, down), gathers=(load, load)),
    ]


def backward_buffers(shape: Shape, size: Extents, x_grad: bool, recompute: bool) -> list[Buffer]:
    """Scratch of a backward pass.

    Args:
        shape: of the kernels.
        size: extents of the call.
        x_grad: the gradient of x is wanted.
        recompute: forward saved nothing, so gate, up and u are computed again.
    """
    load, gate_up, act_grad, low_grads, last = range(5)
    strips = ceil_div(shape.intermediate, N_STRIP)
    # Gate and up hold u where it is computed again, and later du. Down holds du first, and later u computed again.
    low = {name: (load if recompute else low_grads, last) for name in ("gate.low", "up.low")}
    low |= {"down.low": (load, low_grads if recompute else act_grad)}
    buffers = [
        _panel("out_panel", shape, size, shape.hidden, load, act_grad),
        _panel("gate.grad_panel", shape, size, shape.intermediate, act_grad, last),
        _panel("up.grad_panel", shape, size, shape.intermediate, act_grad, last),
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
            "down.du_rows": (load, act_grad),
            "gate.du_rows": (low_grads, last),
            "up.du_rows": (low_grads, last),
        }
        if recompute or ISAS[shape.isa].tiles:  # on tiles u has another form than what forward saves
            lives |= {
                "gate.u_rows": (load, act_grad),
                "up.u_rows": (load, act_grad),
                "down.u_rows": (low_grads if recompute else load, last),
            }
        if recompute:
            buffers.append(_panel("act_panel", shape, size, shape.intermediate, gate_up, low_grads))
        buffers += [Buffer(name, _left(shape, size), "float32", *life) for name, life in lives.items()]
    if recompute:
        buffers.append(_panel("x_panel", shape, size, shape.hidden, load, gate_up))
        group = saved_shape(shape.intermediate, size.rows)
        buffers += [Buffer(name, group, "bfloat16", gate_up, act_grad) for name in ("gate.again", "up.again")]
    if x_grad:
        buffers.append(_sums(shape, size, last))
    return buffers


@dataclass(frozen=True)
class Saved:
    """A tensor that forward saves for backward."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def saved_tensors(intermediate: int, rows: int, rank: int) -> tuple[Saved, ...]:
    """What forward saves: gate and up before the activation, strip by strip, and u of all three projections."""
    strips = saved_shape(intermediate, rows)
    saved = [Saved(f"{name}.saved", strips, "bfloat16") for name in ("gate", "up")]
    if rank:
        saved += [Saved(f"{name}.saved_u", (rows, rank), "float32") for name in ("gate", "up", "down")]
    return tuple(saved)


def saved_shape(intermediate: int, rows: int) -> tuple[int, int, int]:
    """Shape of the saved gate, and of the saved up: strip by strip."""
    return ceil_div(intermediate, N_STRIP), rows, N_STRIP


def row_bytes(shape: Shape, training: bool) -> int:
    """Bytes of panels for one row of a group, in backward (``training``) or forward; they limit the rows of a group."""
    columns = 2 * shape.hidden + 4 * shape.intermediate if training else shape.hidden + shape.intermediate
    return columns * ITEM_BYTES[ISAS[shape.isa].operand]


def canary_bytes(shape: Shape) -> int:
    """Bytes of the canaries on each side of a buffer of a checked instance; mirrors kLine in watch/checked.hpp."""
    return ALIGNMENT if shape.watch == "memory" else 0


def _sums(shape: Shape, size: Extents, last: int) -> Buffer:
    return Buffer("sums", (ceil_div(shape.hidden, N_STRIP), size.tokens, N_STRIP), "float32", 0, last)


def _panel(name: str, shape: Shape, size: Extents, columns: int, first: int, last: int) -> Buffer:
    isa = ISAS[shape.isa]
    extent = (size.blocks * shape.m_step, round_up(columns, isa.column_step))
    return Buffer(name, extent, isa.operand, first, last)


def _low_rank(shape: Shape, size: Extents, lives: dict[str, tuple[int, int]]) -> list[Buffer]:
    if not size.rank:
        return []
    extent = (size.blocks, size.rank, shape.m_step)
    if ISAS[shape.isa].tiles:
        extent = (size.blocks, _lora_steps(shape, size.rank), shape.m_step * K_STEP // 2)
    return [Buffer(name, extent, "float32", *life) for name, life in lives.items()]


def _thread_buffers(
    shape: Shape, size: Extents, strips: int, products: tuple[int, int], gathers: tuple[int, int]
) -> list[Buffer]:
    """Buffers with a part for each thread, alive in steps that multiply strips (``products``) or gather rows."""
    rows = max(size.segment_rows, 1)
    if ISAS[shape.isa].tiles:
        rows = round_up(rows, TILE_ROWS)  # whole blocks of pairs of rows
    buffers = [
        Buffer("thread_weights", (size.threads, _weights_items(shape)), "float32", *products),
        Buffer("thread_strips", (size.threads, strips, rows, N_STRIP), "float32", *products),
        Buffer("thread_rows", (size.threads, _gathered_items(shape, size)), "bfloat16", *gathers),
    ]
    if size.rank:
        buffers.append(Buffer("thread_lora", (size.threads, _lora_items(shape, size.rank)), "float32", *products))
    return buffers


def _weights_items(shape: Shape) -> int:
    """float32 elements for expanded or paired weights: those of a chunk, on tiles of the whole contraction."""
    if not ISAS[shape.isa].tiles:
        return CHUNK * N_STRIP
    longest = max(round_up(shape.hidden, K_STEP), 2 * round_up(shape.intermediate, K_STEP))  # gate and up in one
    return longest // 2 * N_STRIP


def _left(shape: Shape, size: Extents) -> tuple[int, ...]:
    """u or du as the left operand of gradients: rows, or tiles (``left_tiles`` in gemm/lora_tiles.hpp)."""
    if ISAS[shape.isa].tiles:
        tiles = 1 if 2 * size.rank <= TILE_ROWS else 2 * ceil_div(size.rank, TILE_ROWS)
        return size.blocks, tiles, TILE_ROWS * K_STEP // 2
    return size.rows, size.rank


def _lora_steps(shape: Shape, rank: int) -> int:
    """Steps of the LoRA K-step on tiles."""
    return ceil_div(rank * (2 if shape.lora_bf16 else 3), K_STEP)


def _lora_items(shape: Shape, rank: int) -> int:
    """float32 elements of a thread for a strip of a LoRA matrix; on tiles also for two K-steps, or a gradient."""
    strip = rank * N_STRIP
    if not ISAS[shape.isa].tiles:
        return strip
    steps = 2 * _lora_steps(shape, rank) * K_STEP * N_STRIP // 2
    return strip + max(steps, ceil_div(rank, TILE_ROWS) * TILE_ROWS * N_STRIP)


def _gathered_items(shape: Shape, size: Extents) -> int:
    """bfloat16 elements for the rows of one block, or for 32 columns of a segment: a multiple of a cache line."""
    return max(shape.m_step * round_up(shape.hidden, K_STEP), size.segment_rows * N_STRIP)
