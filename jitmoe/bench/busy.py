"""What a small call takes while another process computes on every CPU, beside what it takes alone."""

import itertools
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jitmoe.experts.layer import MoELayer
from jitmoe.oracle.data import batches, make_base
from jitmoe.oracle.workloads import Workload
from jitmoe.text import table

SMALL = (
    Workload("tiny", experts=4, hidden=64, intermediate=96, top_k=2, rank=8, tokens=4),
    Workload("small", experts=8, hidden=256, intermediate=512, top_k=2, rank=8, tokens=4),
    Workload("one token", experts=16, hidden=1024, intermediate=768, top_k=4, rank=8, tokens=1),
)
CALLS = 200
SETTLE_SECONDS = 1.0


@dataclass(frozen=True)
class Busy:
    """Milliseconds of the calls of one pass.

    Attributes:
        name: of the workload and the pass.
        alone: median before others compute.
        beside: median while they do.
        worst: slowest tenth begins here, while they do.
    """

    name: str
    alone: float
    beside: float
    worst: float


def measure_busy(isa: str) -> list[Busy]:
    """Forward and forward with backward of three small layers, on torch's threads."""
    found = []
    for workload in SMALL:
        for name, call in _calls(workload, isa).items():
            call()
            alone = _times(call)
            with spinning(len(os.sched_getaffinity(0))):
                beside = sorted(_times(call))
            worst = beside[len(beside) * 9 // 10]
            found.append(Busy(f"{workload.name}, {name}", statistics.median(alone), statistics.median(beside), worst))
    return found


def busy_table(found: Sequence[Busy]) -> str:
    """Medians, and how many times longer a call takes beside the others."""
    head = ("call", "alone ms", "busy ms", "times", "slowest tenth ms")
    rows = [(f.name, f"{f.alone:.2f}", f"{f.beside:.2f}", f"{f.beside / f.alone:.0f}", f"{f.worst:.1f}") for f in found]
    return f"{table([head, *rows])}\nBusy: one other process computes on every CPU."


def busy_json(found: Sequence[Busy]) -> list[dict[str, Any]]:
    """The same for files."""
    return [asdict(f) for f in found]


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """So many processes compute without end until the block ends."""
    endless = (itertools.repeat(None), 0)
    children = [multiprocessing.get_context("spawn").Process(target=deque, args=endless) for _ in range(processes)]
    try:
        for child in children:
            child.start()
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        for child in children:
            child.kill()
            child.join()


def _calls(workload: Workload, isa: str) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    layer = MoELayer(workload.config(isa), **vars(make_base(workload, generator)))
    batch = next(batches(workload, generator))
    x = batch.x.requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            layer(x, batch.topk_ids, batch.weights)

    def both() -> None:
        # No gradient is added to: that would be torch's own loop, on GOMP's own barriers.
        torch.autograd.grad(layer(x, batch.topk_ids, batch.weights), [x, *layer.parameters()], batch.out_grad)

    return {"forward": forward, "fwd+bwd": both}


def _times(call: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return found
