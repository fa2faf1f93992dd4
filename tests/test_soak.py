"""Thousands of steps on several layers and threads: memory ends where it began, and so do bits, descriptors, files.

``make soak`` runs it; ``make test`` takes a few hundred steps.
"""

import gc
import os
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers import build_kernels, case_named, copied, different, layer_of, usable_isas
from yardstick import Inputs, Results, make_inputs

import jitmoe
from jitmoe import MoELayer
from jitmoe.experts import workspace

ISA = usable_isas()[0]
CASES = [case_named(name) for name in ("small", "ragged_65", "no_lora")]
MOST_TOKENS = 300
THREADS = 3
SLACK = 8 << 20
"""Bytes by which the process may be larger at the end: its allocators keep some, whatever the number of steps."""


def results_of(layer: MoELayer, inputs: Inputs) -> Results:
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    leaves = {"x": x, "weights": weights, **dict(layer.named_parameters())}
    out = layer(x, inputs.topk_ids, weights)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def walk(layers: list[MoELayer], drawn: list[list[Inputs]], steps: int, seed: int) -> None:
    """Calls of changing shapes, some without backward and some that are refused."""
    pick = random.Random(seed)
    for _ in range(steps):
        number = pick.randrange(len(layers))
        layer, inputs = layers[number], pick.choice(drawn[number])
        tokens = pick.randint(0, len(inputs.x))
        cut = replace(inputs, **{name: getattr(inputs, name)[:tokens] for name in ("x", "topk_ids", "weights", "dout")})
        kind = pick.randrange(10)
        if kind == 0:
            with pytest.raises(jitmoe.InputError):
                layer(cut.x, cut.topk_ids, cut.weights[:, :-1])
        elif kind < 4:
            with torch.no_grad():
                layer(cut.x, cut.topk_ids, cut.weights)
        else:
            results_of(layer, cut)


def in_threads(work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def held() -> int:
    """Bytes of the process without what waits for the next call."""
    jitmoe.release_memory()
    gc.collect()
    return psutil.Process().memory_info().rss


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("steps", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_nothing_grows(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build_kernels(CASES, [ISA])
    drawn = [[make_inputs(replace(case, tokens=MOST_TOKENS, seed=seed)) for seed in range(2)] for case in CASES]
    layers = [layer_of(inputs[0], ISA, recompute=bool(number % 2)) for number, inputs in enumerate(drawn)]
    expected = [copied(results_of(layer, inputs[0])) for layer, inputs in zip(layers, drawn, strict=True)]

    in_threads(lambda number: walk(layers, drawn, 60, seed=number))
    before, open_files = held(), descriptors()
    in_threads(lambda number: walk(layers, drawn, steps, seed=10 + number))
    arenas = workspace.arenas.held_bytes()
    assert 0 < arenas <= THREADS * most_scratch(layers), "more than the plan has for the calls at one time"
    assert held() - before < SLACK
    assert descriptors() == open_files
    assert not any(tmp_path.iterdir())
    for layer, inputs, results in zip(layers, drawn, expected, strict=True):
        assert different(results_of(layer, inputs[0]), results) == []


def most_scratch(layers: list[MoELayer]) -> int:
    """Bytes of the largest arena that the plan of any call has."""
    threads = torch.get_num_threads()
    return max(jitmoe.MemoryPlan.of(layer.config, MOST_TOKENS, threads).arena for layer in layers)
