"""One call of experts that live on several ranks, and its backward pass, as one function of autograd.

Forward tells the ranks how many rows will come, sends the rows, computes the own ones meanwhile, then those that came,
and adds up what comes back. Backward goes the same way with gradients. The experts' own graph is kept between the two.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from jitmoe.distributed.peers import Peers, Pending
from jitmoe.distributed.rows import Operands, Routes, as_bytes, values_in
from jitmoe.distributed.traffic import Traffic
from jitmoe.errors import InputError, PeerError
from jitmoe.plan.exchange import COUNTS_BYTES, RowBytes, row_bytes

TRAINS, WANTS_X, WANTS_WEIGHTS, REFUSED = 1, 2, 4, 8
"""What a rank tells the others about its part of a call."""

Compute = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""From rows of x float32 [n, H], local ids and weights [n, up to K] and parameters by name to float32 [n, H]."""


@dataclass(frozen=True, eq=False)
class Shared:
    """The experts of all ranks, as a call needs them.

    Attributes:
        peers: the ranks.
        bounds: rank r holds the experts from ``bounds[r]`` to ``bounds[r + 1]``.
        allow_skip: ids of no expert are skipped.
        overlap: compute the own rows while others are on their way, in a call of their own.
        compute: the experts of this rank.
    """

    peers: Peers
    bounds: Sequence[int]
    allow_skip: bool
    overlap: bool
    compute: Compute


def apply(
    shared: Shared, x: Tensor, topk_ids: Tensor, weights: Tensor, parameters: Mapping[str, Tensor]
) -> tuple[Tensor, Traffic]:
    """out [T, H] in x's dtype, differentiable in x [T, H], the routing weights [T, K] and the parameters.

    Raises:
        PeerError: another rank failed, or called with other things.
        InputError: an id of no expert.
    """
    call = _Call(shared, list(parameters), topk_ids, x.dtype)
    tensors = (x, weights, *parameters.values())
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    call.agree(wants)
    out: Tensor = _Exchange.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return out, call.traffic


def refuse(shared: Shared) -> None:
    """Tell the other ranks that this one's part of a call is wrong, so that they need not wait for it."""
    shared.peers.tell(torch.tensor([[0, REFUSED]] * shared.peers.size), "counting rows")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Part:
    """A call of this rank's experts on some rows; its graph lives until backward."""

    def __init__(self, call: "_Call", rows: Operands, parameters: Mapping[str, Tensor]) -> None:
        self.rows, self.names = len(rows), list(parameters)
        self.out = torch.zeros(0, rows.x.shape[1])
        if not self.rows:
            return
        self.slots, self.places = rows.ids.shape[1], rows.places()
        ids, weights = (tensor.gather(1, self.places) for tensor in (rows.ids, rows.weights))
        x = rows.x.float()
        # No hooks of others: a checkpoint would compute anew for each of these graphs, on some ranks more often.
        with torch.set_grad_enabled(call.trains), saved_tensors_hooks(_as_it_is, _as_it_is):
            # Leaves of their own: hooks on the parameters belong to the graph around this one.
            leaves = {name: p.detach().requires_grad_(p.requires_grad) for name, p in parameters.items()}
            self.inputs = {"x": x.requires_grad_(call.wants_x), "weights": weights.requires_grad_(call.wants_weights)}
            self.inputs |= {f"parameter {name}": leaf for name, leaf in leaves.items()}
            self.result = call.shared.compute(x, ids, weights, leaves)
        self.out = self.result.detach()

    def backward(self, out_grad: Tensor, keep: bool) -> dict[str, Tensor]:
        """Gradients of what wants one, by name."""
        if not self.rows:
            return {}
        wanted = {name: tensor for name, tensor in self.inputs.items() if tensor.requires_grad}
        found = torch.autograd.grad(
            self.result, list(wanted.values()), out_grad, retain_graph=keep, materialize_grads=True
        )
        grads = dict(zip(wanted, found, strict=True))
        if "weights" in grads:
            grads["weights"] = torch.zeros(self.rows, self.slots).scatter_(1, self.places, grads["weights"])
        return grads


class _Call:
    """What forward and backward of one call share."""

    def __init__(self, shared: Shared, names: list[str], topk_ids: Tensor, dtype: torch.dtype) -> None:
        self.shared, self.names, self.dtype = shared, names, dtype
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

    def forward(self, x: Tensor, weights: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        hidden = x.shape[1]
        x, weights = x.to(torch.bfloat16), weights.float()
        rank, routes = self.peers.rank, self.routes
        rows = [routes.operands(other, x, weights).packed() for other in self.others()]
        rows.append(torch.empty(0, self.bytes_of_rows(hidden).tokens, dtype=torch.uint8))
        pending = self.exchange("tokens", rows, self.to, self.come)
        own = routes.operands(rank, x, weights)
        if self.shared.overlap and self.peers.size > 1:
            first = _Part(self, own, parameters)
            came = Operands.unpacked(pending.wait(), hidden, self.topk_ids.shape[1])
            self.parts = [first, _Part(self, came, parameters)]
            mine, theirs = (part.out for part in self.parts)
        else:
            came = Operands.unpacked(pending.wait(), hidden, self.topk_ids.shape[1])
            both = [torch.cat(pair) for pair in ((own.x, came.x), (own.ids, came.ids), (own.weights, came.weights))]
            self.parts = [_Part(self, Operands(*both), parameters)]
            mine, theirs = self.parts[0].out[: len(own)], self.parts[0].out[len(own) :]
        back = self.exchange("sums", [as_bytes(theirs, 4 * hidden)], self.come, self.to)
        sums = values_in(back.wait(), torch.float32, hidden)
        total = routes.add_up(self.with_own(mine, sums), self.tokens)
        return total.to(self.dtype)

    def backward(self, out_grad: Tensor, keep: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Float32 gradients of x and of the routing weights, [T, 0] where no rank wants them, and of the parameters."""
        if not self.parts:
            raise PeerError("backward came again after its graph was freed: pass retain_graph=True to the first one")
        hidden, width = out_grad.shape[1], self.bytes_of_rows(out_grad.shape[1])
        out_grad, tokens = out_grad.to(torch.bfloat16), self.routes.tokens
        rows = [as_bytes(out_grad[tokens[other]], width.grads) for other in self.others()]
        rows.append(torch.empty(0, width.grads, dtype=torch.uint8))
        pending = self.exchange("grads", rows, self.to, self.come)
        own = out_grad[tokens[self.peers.rank]].float()
        if len(self.parts) == 2:
            first = self.parts[0].backward(own, keep)
            came = values_in(pending.wait(), torch.bfloat16, hidden).float()
            second = self.parts[1].backward(came, keep)
            mine, theirs = self._columns(first, len(own), hidden), self._columns(second, len(came), hidden)
            parts = [first, second]
        else:
            came = values_in(pending.wait(), torch.bfloat16, hidden).float()
            parts = [self.parts[0].backward(torch.cat([own, came]), keep)]
            both = self._columns(parts[0], len(own) + len(came), hidden)
            mine, theirs = both[: len(own)], both[len(own) :]
        if not keep:
            self.parts = []
        if not width.grad_sums:
            empty = torch.empty(self.tokens, 0)
            return empty, empty, _added(parts)
        back = self.exchange("grad_sums", [as_bytes(theirs, width.grad_sums)], self.come, self.to)
        sums = values_in(back.wait(), torch.float32, mine.shape[1])
        total = self.routes.add_up(self.with_own(mine, sums), self.tokens)
        split = hidden * self.wants_x
        return total[:, :split], total[:, split:], _added(parts)

    def _columns(self, grads: Mapping[str, Tensor], rows: int, hidden: int) -> Tensor:
        """Gradients of x and of the weights side by side, those that some rank wants."""
        wanted = {"x": (self.wants_x, hidden), "weights": (self.wants_weights, self.topk_ids.shape[1])}
        columns = [grads.get(name, torch.zeros(rows, n)) for name, (wants, n) in wanted.items() if wants]
        return torch.cat(columns, 1) if columns else torch.empty(rows, 0)


class _Exchange(torch.autograd.Function):
    """The call for autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        """Run forward."""
        out = call.forward(x.detach(), weights.detach(), dict(zip(call.names, parameters, strict=True)))
        # Saved last: a checkpoint that computes anew stops at the last saved tensor, on all ranks behind the exchange.
        ctx.save_for_backward(weights)
        ctx.call, ctx.shapes = call, [(p.shape, p.dtype) for p in parameters]
        ctx.weights_dtype = weights.dtype
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run backward: rounded once into the dtypes of those who want them."""
        ctx.saved_tensors  # noqa: B018 - frees them, or refuses a second backward
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        x_grad, weights_grad, found = ctx.call.backward(out_grad, keep)
        _, wants_x, wants_weights, *wants = ctx.needs_input_grad
        parameters = [
            found.get(f"parameter {name}", torch.zeros(shape, dtype=dtype)) if wanted else None
            for name, (shape, dtype), wanted in zip(ctx.call.names, ctx.shapes, wants, strict=True)
        ]
        return (
            None,
            x_grad.to(ctx.call.dtype) if wants_x else None,
            weights_grad.to(ctx.weights_dtype) if wants_weights else None,
            *parameters,
        )


def _first(heard: Sequence[Sequence[int]]) -> list[int]:
    return [count for count, _ in heard]


def _added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the parameters, of the own rows first."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, grad in part.items():
            if name.startswith("parameter "):
                total[name] = total[name].add_(grad) if name in total else grad
    return total
