"""Measures what comes before the first result: packing the weights, compiling a kernel, starting a process."""

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
from jitmoe.jit.location import Place
from jitmoe.jit.render import render
from jitmoe.jit.warm import build
from jitmoe.oracle.data import batches, make_base
from jitmoe.oracle.workloads import Workload
from jitmoe.plan.shapes import plan_kernels
from jitmoe.progress import track

FEW_EXPERTS = 2
"""Experts of the layer that a fresh process makes: few weights, and the kernels of the workload."""


@dataclass(frozen=True)
class Startup:
    """Time before the first result of a layer.

    Attributes:
        packing: time to construct the layer over the time to clone the weights that it packs.
        compilation: seconds to compile each kernel alone, by its name.
        process: seconds of a process with warm caches up to its first result, less those of one that imports torch.
    """

    packing: float
    compilation: dict[str, float]
    process: float


def measure_startup(workload: Workload, isa: str, repeat: int) -> Startup:
    """Measure a layer of ``workload``; ratios and differences are medians over ``repeat`` alternating pairs.

    Raises:
        BenchError: a process failed, or another instruction set ran than was asked for.
    """
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
    """Seconds until ``function`` has returned; freeing its result does not count."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _compilation(workload: Workload, isa: str) -> dict[str, float]:
    found = {}
    for shape in plan_kernels(workload.config(isa), isa).shapes:
        with tempfile.TemporaryDirectory(prefix="jitmoe-bench-") as folder:
            (report,) = build_instances([render(shape)], store=Place(Path(folder)))
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
    """Seconds of a fresh interpreter that calls ``function`` and ends.

    Raises:
        BenchError: the process fails.
    """
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    start = time.perf_counter()
    process.start()
    process.join()
    elapsed = time.perf_counter() - start
    if process.exitcode:
        raise BenchError(f"a process that was to be measured ended with status {process.exitcode}")
    return elapsed
