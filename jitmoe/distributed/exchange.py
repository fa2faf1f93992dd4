"""One call of experts that live on several ranks, and its backward pass, as one function of autograd.

Forward tells the ranks how many rows will come, sends the rows, computes the own ones meanwhile, then those that came,
and adds up what comes back. Backward goes the same way with gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitmoe.distributed.peers import Peers, Pending
from jitmoe.distributed.rows import Operands, Routes, as_bytes, values_in
from jitmoe.distributed.traffic import Traffic
from jitmoe.errors import InputError, PeerError, WeightsChangedError
from jitmoe.experts import passes
from jitmoe.experts.functional import Base
from jitmoe.experts.ops import versions_of
from jitmoe.memory.budget import check_call
from jitmoe.plan.exchange import COUNTS_BYTES, RowBytes, row_bytes
from jitmoe.plan.shapes import plan_kernels

TRAINS, WANTS_X, WANTS_WEIGHTS, REFUSED = 1, 2, 4, 8
"""What a rank tells the others about its part of a call."""


@dataclass(frozen=True, eq=False)
class Shared:
    """The experts of all ranks, as a call needs them.

    Attributes:
        peers: the ranks.
        bounds: rank r holds the experts from ``bounds[r]`` to ``bounds[r + 1]``.
        allow_skip: ids of no expert are skipped.
        overlap: compute the own rows while others are on their way, in a call of their own.
        base_for: this rank's experts, for rows of so many slots.
        scale: of LoRA.
    """

    peers: Peers
    bounds: Sequence[int]
    allow_skip: bool
    overlap: bool
    base_for: Callable[[int], Base]
    scale: float = 0.0


def apply(
    shared: Shared, x: Tensor, topk_ids: Tensor, weights: Tensor, lora: Sequence[Tensor] = ()
) -> tuple[Tensor, Traffic]:
    """out [T, H] in x's dtype, differentiable in x [T, H], the routing weights [T, K] and LoRA.

    Raises:
        PeerError: another rank failed, or called with other things.
        InputError: an id of no expert.
    """
    call = _Call(shared, topk_ids, x.dtype)
    tensors = (x, weights, *lora)
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    call.agree(wants)
    out: Tensor = _Exchange.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return out, call.traffic


def refuse(shared: Shared) -> None:
    """Tell the other ranks that this one's part of a call is wrong, so that they need not wait for it."""
    shared.peers.tell(torch.tensor([[0, REFUSED]] * shared.peers.size), "counting rows")


class _Part:
    """A call of this rank's experts on some rows, and what its backward needs beside the tensors that it saves.

    Attributes:
        out: float32 [n, H].
        saved: x bfloat16, ids and weights of the slots that are here, their places, and what forward leaves.
    """

    def __init__(self, call: "_Call", rows: Operands, lora: list[Tensor]) -> None:
        self.call, self.rows, self.slots = call, len(rows), rows.ids.shape[1]
        self.out, self.saved = torch.zeros(0, rows.x.shape[1]), list[Tensor]()
        if not self.rows:
            return
        places = rows.places()
        ids, weights = (tensor.gather(1, places) for tensor in (rows.ids, rows.weights))
        base = self.base = call.shared.base_for(ids.shape[1])
        base.check_forms()
        base.check_seal()
        _check_budget(base, self.rows, lora, call.trains)
        self.frozen = [*base.packed.values(), *base.biases.values()]
        self.versions = versions_of(self.frozen)
        self.out, *left = passes.forward(
            rows.x.float(), ids, weights, self.frozen, lora, base.spec, call.shared.scale, call.trains
        )
        self.saved = [rows.x, ids, weights, places, *left]

    def backward(
        self, out_grad: Tensor, saved: Sequence[Tensor], lora: list[Tensor], wants_lora: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of x and of the weights side by side, those that some rank wants, and of LoRA."""
        wants_x, wants_weights = self.call.wants_x, self.call.wants_weights
        hidden = out_grad.shape[1]
        if not self.rows:
            return torch.zeros(0, hidden * wants_x + self.slots * wants_weights), []
        if versions_of(self.frozen) != self.versions:
            raise WeightsChangedError(
                "base weights were loaded or written between forward and backward: run forward again"
            )
        x, ids, weights, places, *left = saved
        x_grad, weights_grad, *grads = passes.backward(
            out_grad, x.float(), ids, weights, self.frozen, lora, list(left), self.base.spec, self.call.shared.scale,
            [wants_x, wants_weights, wants_lora],
        )  # fmt: skip
        columns = [x_grad] if wants_x else []
        if wants_weights:
            columns.append(torch.zeros(self.rows, self.slots).scatter_(1, places, weights_grad))
        return torch.cat(columns, 1) if columns else torch.empty(self.rows, 0), grads


def _check_budget(base: Base, rows: int, lora: Sequence[Tensor], trains: bool) -> None:
    if base.config.memory_budget is not None:
        plan = plan_kernels(base.config, base.isa, str(lora[0].dtype).removeprefix("torch.") if lora else None)
        check_call(plan, rows, torch.get_num_threads(), trains, "float32")


class _Call:
    """What forward and backward of one call share."""

    def __init__(self, shared: Shared, topk_ids: Tensor, dtype: torch.dtype) -> None:
        self.shared, self.dtype = shared, dtype
        self.peers, self.topk_ids, self.tokens = shared.peers, topk_ids, topk_ids.shape[0]
        self.parts: list[_Part] = []

    def agree(self, wants: Sequence[bool]) -> None:
        """Route the tokens, and agree with the other ranks about rows and gradients.

        Raises:
            PeerError: another rank refused its inputs, or wants no backward pass where this one does.
            InputError: this one's ids are wrong; the others are told.
        """
        rank, size = self.peers.rank, self.peers.size
        flags = TRAINS * any(wants) | WANTS_X * wants[0] | WANTS_WEIGHTS * wants[1]
        refused: InputError | None = None
        try:
            self.routes = Routes.of(self.topk_ids, self.shared.bounds, self.shared.allow_skip)
            counts = self.routes.counts()
        except InputError as error:
            refused, counts, flags = error, [0] * size, REFUSED
        heard = self.peers.tell(torch.tensor([[count, flags] for count in counts]), "counting rows").tolist()
        if refused is not None:
            raise refused
        self._check([told for _, told in heard], flags)
        here = counts[rank]
        self.to, self.come = ([n if r != rank else 0 for r, n in enumerate(row)] for row in (counts, _first(heard)))
        self.trains = bool(flags & TRAINS)
        self.wants_x, self.wants_weights = (any(told & want for _, told in heard) for want in (WANTS_X, WANTS_WEIGHTS))
        self.traffic = Traffic(self.to, self.come, here)
        self.traffic.count("counts", COUNTS_BYTES * (size - 1), COUNTS_BYTES * (size - 1))

    def _check(self, told: Sequence[int], mine: int) -> None:
        for rank, flags in enumerate(told):
            if flags & REFUSED:
                raise PeerError(f"rank {rank} refused its inputs: its own error says why")
            if (flags ^ mine) & TRAINS:
                raise PeerError(
                    f"rank {rank} calls the experts {'with' if flags & TRAINS else 'without'} gradients and rank "
                    f"{self.peers.rank} {'with' if mine & TRAINS else 'without'}: all ranks have to do the same, with "
                    "no tokens too"
                )

    def bytes_of_rows(self, hidden: int) -> RowBytes:
        return row_bytes(hidden, self.topk_ids.shape[1], self.trains, self.wants_x, self.wants_weights)

    def exchange(self, what: str, rows: Sequence[Tensor], to: Sequence[int], come: Sequence[int]) -> Pending:
        """Send rows of bytes of each rank in turn."""
        sent = torch.cat(list(rows))
        pending = self.peers.send(sent, to, come, f"the exchange of {what}")
        self.traffic.count(what, sent, pending.received)
        return pending

    def others(self) -> list[int]:
        return [rank for rank in range(self.peers.size) if rank != self.peers.rank]

    def with_own(self, own: Tensor, came: Tensor) -> list[Tensor]:
        """Rows that came back from each rank, the own ones among them at their place."""
        parts = list(torch.split(came, self.to))
        parts[self.peers.rank] = own
        return parts

    def forward(self, x: Tensor, weights: Tensor, lora: list[Tensor]) -> Tensor:
        hidden = x.shape[1]
        x, weights = x.to(torch.bfloat16), weights.float()
        rank, routes = self.peers.rank, self.routes
        rows = [routes.operands(other, x, weights).packed() for other in self.others()]
        rows.append(torch.empty(0, self.bytes_of_rows(hidden).tokens, dtype=torch.uint8))
        pending = self.exchange("tokens", rows, self.to, self.come)
        own = routes.operands(rank, x, weights)
        if self.shared.overlap and self.peers.size > 1:
            first = _Part(self, own, lora)
            came = Operands.unpacked(pending.wait(), hidden, self.topk_ids.shape[1])
            self.parts = [first, _Part(self, came, lora)]
            mine, theirs = (part.out for part in self.parts)
        else:
            came = Operands.unpacked(pending.wait(), hidden, self.topk_ids.shape[1])
            both = [torch.cat(pair) for pair in ((own.x, came.x), (own.ids, came.ids), (own.weights, came.weights))]
            self.parts = [_Part(self, Operands(*both), lora)]
            mine, theirs = self.parts[0].out[: len(own)], self.parts[0].out[len(own) :]
        back = self.exchange("sums", [as_bytes(theirs, 4 * hidden)], self.come, self.to)
        sums = values_in(back.wait(), torch.float32, hidden)
        total = routes.add_up(self.with_own(mine, sums), self.tokens)
        return total.to(self.dtype)

    def backward(
        self, out_grad: Tensor, saved: Sequence[Sequence[Tensor]], lora: list[Tensor], wants_lora: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Float32 gradients of x and of the routing weights, [T, 0] where no rank wants them, and those of LoRA."""
        hidden, width = out_grad.shape[1], self.bytes_of_rows(out_grad.shape[1])
        out_grad, tokens = out_grad.to(torch.bfloat16), self.routes.tokens
        rows = [as_bytes(out_grad[tokens[other]], width.grads) for other in self.others()]
        rows.append(torch.empty(0, width.grads, dtype=torch.uint8))
        pending = self.exchange("grads", rows, self.to, self.come)
        own = out_grad[tokens[self.peers.rank]].float()
        if len(self.parts) == 2:
            mine, first = self.parts[0].backward(own, saved[0], lora, wants_lora)
            came = values_in(pending.wait(), torch.bfloat16, hidden).float()
            theirs, second = self.parts[1].backward(came, saved[1], lora, wants_lora)
            grads = [first, second]
        else:
            came = values_in(pending.wait(), torch.bfloat16, hidden).float()
            both, first = self.parts[0].backward(torch.cat([own, came]), saved[0], lora, wants_lora)
            mine, theirs, grads = both[: len(own)], both[len(own) :], [first]
        if not width.grad_sums:
            empty = torch.empty(self.tokens, 0)
            return empty, empty, _added(grads)
        back = self.exchange("grad_sums", [as_bytes(theirs, width.grad_sums)], self.come, self.to)
        sums = values_in(back.wait(), torch.float32, mine.shape[1])
        total = self.routes.add_up(self.with_own(mine, sums), self.tokens)
        split = hidden * self.wants_x
        return total[:, :split], total[:, split:], _added(grads)


class _Exchange(torch.autograd.Function):
    """The call for autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weights: Tensor, *lora: Tensor) -> Tensor:
        """Run forward."""
        out = call.forward(x.detach(), weights.detach(), list(lora))
        # Something is saved on each rank: a checkpoint computes anew where a saved tensor is asked for.
        saved = [part.saved for part in call.parts]
        ctx.save_for_backward(weights, *lora, *(tensor for tensors in saved for tensor in tensors))
        ctx.call, ctx.adapters, ctx.counts = call, len(lora), [len(tensors) for tensors in saved]
        for part in call.parts:
            part.out, part.saved = part.out[:0], []
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run backward: rounded once into the dtypes of those who want them."""
        weights, *rest = ctx.saved_tensors
        lora, rest = rest[: ctx.adapters], rest[ctx.adapters :]
        saved = [rest[sum(ctx.counts[:part]) :][:count] for part, count in enumerate(ctx.counts)]
        _, wants_x, wants_weights, *wants = ctx.needs_input_grad
        x_grad, weights_grad, grads = ctx.call.backward(out_grad, saved, lora, any(wants))
        if any(wants) and not grads:  # no token for any of this rank's experts
            grads = [torch.zeros_like(tensor) for tensor in lora]
        return (
            None,
            x_grad.to(ctx.call.dtype) if wants_x else None,
            weights_grad.to(weights.dtype) if wants_weights else None,
            *(grads if any(wants) else [None] * len(lora)),
        )


def _first(heard: Sequence[Sequence[int]]) -> list[int]:
    return [count for count, _ in heard]


def _added(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Gradients of LoRA, of the own rows first."""
    first, *others = [part for part in parts if part] or [()]
    total = list(first)
    for part in others:
        total = [one.add_(more) for one, more in zip(total, part, strict=True)]
    return total
