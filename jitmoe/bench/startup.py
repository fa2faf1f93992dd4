"""What comes before the first result: packing the weights, compiling a kernel, starting a process."""

import importlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jitmoe.bench.contenders import our_layer
from jitmoe.errors import BenchError
from jitmoe.experts.layer import MoELayer
from jitmoe.jit.build import build_instances
from jitmoe.jit.cache import Cache
from jitmoe.jit.render import render
from jitmoe.jit.warm import build
from jitmoe.oracle.data import batches, make_base
from jitmoe.oracle.workloads import Workload
from jitmoe.plan.shapes import plan_kernels
from jitmoe.progress import track

FEW_EXPERTS = 2
"""Of the layer that a fresh process makes: its kernels are those of the workload, its weights are soon there."""


@dataclass(frozen=True)
class Startup:
    """Before the first result of a layer.

    Attributes:
        packing: time to construct the layer over that to clone the weights that it packs, of pairs in turn.
        compilation: seconds of each kernel in an empty cache, alone, by its name.
        process: seconds from the start of a process with all in its caches to a first result, less those of a process
            that imports torch.
    """

    packing: float
    compilation: dict[str, float]
    process: float


def measure_startup(workload: Workload, isa: str, repeat: int) -> Startup:
    """Measure all three for a layer of ``workload``."""
    return Startup(
        _packing(workload, isa, repeat), _compilation(workload, isa), _process(workload, isa, max(repeat, 3))
    )


def _packing(workload: Workload, isa: str, repeat: int) -> float:
    base = make_base(workload, torch.Generator().manual_seed(0))
    config = replace(workload.config(isa), lora_rank=0)  # adapters are initialised with random numbers
    build(config, progress=False)
    matrices = (base.gate_proj, base.up_proj, base.down_proj)
    ratios = []
    for _ in range(repeat):
        clone = _seconds(lambda: [matrix.clone() for matrix in matrices])
        ratios.append(_seconds(lambda: MoELayer(config, *matrices)) / clone)
    return statistics.median(ratios)


def _seconds(function: Callable[[], Any]) -> float:
    """Until ``function`` has returned; what it returned is let go later."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _compilation(workload: Workload, isa: str) -> dict[str, float]:
    found = {}
    for shape in plan_kernels(workload.config(isa), isa).shapes:
        with tempfile.TemporaryDirectory(prefix="jitmoe-bench-") as folder:
            (report,) = build_instances([render(shape)], store=Cache(Path(folder)))
        found[shape.name] = report.seconds
    return found


def _process(workload: Workload, isa: str, repeat: int) -> float:
    few = replace(workload, experts=FEW_EXPERTS, top_k=FEW_EXPERTS, tokens=1)
    first_result(few, isa)  # compiles here what is missing
    pairs = [
        (_process_seconds(first_result, few, isa), _process_seconds(importlib.import_module, "torch"))
        for _ in track(range(repeat), repeat, "pair of processes")
    ]
    return statistics.median(ours - torch_alone for ours, torch_alone in pairs)


def first_result(workload: Workload, isa: str) -> None:
    """Make a layer and call it once."""
    generator = torch.Generator().manual_seed(0)
    layer = our_layer(workload, isa, make_base(workload, generator), None)
    batch = next(batches(workload, generator))
    layer.call(batch.x, batch.topk_ids, batch.weights)


def _process_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Of a fresh interpreter that calls ``function`` and ends.

    Raises:
        BenchError: if it fails.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    start = time.perf_counter()
    process.start()
    process.join()
    elapsed = time.perf_counter() - start
    if process.exitcode:
        raise BenchError(f"a process that was to be measured ended with status {process.exitcode}")
    return elapsed
