"""Random weights, inputs and routing. None are zeros, whose products take less power than others."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jitmoe.oracle.reference import LoraTensors
from jitmoe.oracle.workloads import Workload


@dataclass(frozen=True)
class Base:
    """Frozen weights of all experts: gate_proj, up_proj [E, I, H], down_proj [E, H, I]."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def to(self, dtype: torch.dtype) -> "Base":
        """These weights in ``dtype``; no copy where they are already."""
        return Base(self.gate_proj.to(dtype), self.up_proj.to(dtype), self.down_proj.to(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(tensor.nbytes for tensor in (self.gate_proj, self.up_proj, self.down_proj))


def make_base(workload: Workload, generator: torch.Generator) -> Base:
    """bfloat16 weights with the variance 1 / in, about the magnitude of a trained layer."""

    def weights(out: int, in_: int) -> Tensor:
        empty = torch.empty(workload.experts, out, in_, dtype=torch.bfloat16)
        bound = math.sqrt(3.0 / in_)
        return empty.uniform_(-bound, bound, generator=generator)

    hidden, intermediate = workload.hidden, workload.intermediate
    return Base(weights(intermediate, hidden), weights(intermediate, hidden), weights(hidden, intermediate))


def make_lora(workload: Workload, generator: torch.Generator) -> LoraTensors | None:
    """float32 adapters; B is as small as after some steps of training. None with rank 0."""
    if not workload.rank:
        return None
    hidden, intermediate = workload.hidden, workload.intermediate
    pairs = []
    for out, in_ in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)):
        a = torch.randn(workload.experts, workload.rank, in_, generator=generator) / math.sqrt(in_)
        b = torch.randn(workload.experts, out, workload.rank, generator=generator) * 0.05
        pairs += [a, b]
    return LoraTensors(*pairs)


@dataclass(frozen=True)
class Batch:
    """Inputs of one call: x, out_grad [T, H] bfloat16; topk_ids [T, K] int64; weights [T, K] float32."""

    x: Tensor
    topk_ids: Tensor
    weights: Tensor
    out_grad: Tensor

    @property
    def active(self) -> int:
        """Number of experts that any token chose."""
        return int(self.topk_ids.flatten().bincount().count_nonzero())

    def to(self, dtype: torch.dtype) -> "Batch":
        """This batch with x and out_grad in ``dtype``."""
        return replace(self, x=self.x.to(dtype), out_grad=self.out_grad.to(dtype))


def batches(workload: Workload, generator: torch.Generator) -> Iterator[Batch]:
    """Fresh inputs and fresh routing for every call, without end."""
    rows = (workload.tokens, workload.hidden)
    while True:
        yield Batch(
            x=torch.randn(rows, generator=generator).bfloat16(),
            topk_ids=_choose_experts(workload, generator),
            weights=torch.rand(workload.tokens, workload.top_k, generator=generator).softmax(-1),
            out_grad=torch.randn(rows, generator=generator).bfloat16(),
        )


def _choose_experts(workload: Workload, generator: torch.Generator) -> Tensor:
    """[T, K] distinct experts of each token; with ``zipf`` the n-th most popular has odds 1/n.

    The K largest logarithms of the odds plus Gumbel noise are K draws without replacement (Kool 2019).
    """
    uniform = torch.rand(workload.tokens, workload.experts, generator=generator).clamp_min(1e-20)
    scores = -torch.log(-torch.log(uniform))
    if workload.zipf:
        popularity = torch.randperm(workload.experts, generator=generator) + 1
        scores -= torch.log(popularity.float())
    return scores.topk(workload.top_k, dim=-1).indices
