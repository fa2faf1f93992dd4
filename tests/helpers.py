"""Layers made from the yardstick's inputs, and comparisons of bits, for every test of the layer."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from yardstick import CASES, Case, Inputs, Results

from jitmoe import MoEConfig, MoELayer, build
from jitmoe.experts.observer import Launch, Observer, observing
from jitmoe.experts.supplies import supplied
from jitmoe.isa import ISAS
from jitmoe.jit import capability
from jitmoe.plan.placement import Buffer, ScratchPlan
from jitmoe.plan.scratch import backward_buffers, canary_bytes, forward_buffers
from jitmoe.plan.shapes import Shape

EMULATED = tuple(isa for isa, found in ISAS.items() if found.tiles)
"""Instruction sets that the tests run in an emulator of their own, not here."""

NATIVE = tuple(isa for isa in ISAS if isa not in EMULATED)

EVERY_ISA = pytest.mark.parametrize("isa", [pytest.param(isa, marks=pytest.mark.isa(isa)) for isa in NATIVE])
"""Runs a test on each instruction set; skipped, with the reason, where this CPU lacks it."""

only_isa: str | None = None
"""The instruction set of ``--isa``; kernels of others are compiled where a test asks for them, not beforehand."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by the bytes of an element."""


INT, POINTER = ctypes.c_int64, ctypes.c_void_p
GATHER = ctypes.CFUNCTYPE(None, POINTER, INT, POINTER, INT, INT, INT, POINTER, INT)
SUM = ctypes.CFUNCTYPE(None, POINTER, INT, POINTER, POINTER, INT, INT, INT, INT, POINTER, INT)
"""The callbacks that gather rows and add them to tokens, as ctypes calls them and makes them."""


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def usable_isas() -> list[str]:
    return [found.isa for found in capability.capabilities() if found.usable and found.isa in NATIVE]


def isas_to_build() -> list[str]:
    return [isa for isa in usable_isas() if only_isa in (None, isa)]


def any_shape(isa: str | None = None) -> Shape:
    """A small kernel of ``isa``, or of the best set that this machine executes."""
    isa = isa or usable_isas()[0]
    return Shape(isa, 64, 96, 32, ISAS[isa].m_steps[-1], lora_bf16=False)


class Launches(Observer):
    """Every pass that runs while it observes, in the order of the calls."""

    def __init__(self) -> None:
        self.seen: list[Launch] = []

    @contextmanager
    def around(self, launch: Launch) -> Iterator[None]:
        self.seen.append(launch)
        yield


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """The passes that run inside the block."""
    watcher = Launches()
    with observing(watcher):
        yield watcher.seen


class Changes(Observer):
    """Changes every pass before its kernels run."""

    def __init__(self, change: Callable[[Launch], object]) -> None:
        self.change = change

    @contextmanager
    def around(self, launch: Launch) -> Iterator[None]:
        self.change(launch)
        yield


def changed_by(change: Callable[[Launch], object]) -> AbstractContextManager[None]:
    """Every pass inside the block is changed so."""
    return observing(Changes(change))


Placement = Callable[[Sequence[Buffer], int], ScratchPlan]
"""From buffers and the gap between them to a plan."""


@contextmanager
def placed_by(forward: Placement, backward: Placement | None = None) -> Iterator[None]:
    """Calls place their scratch so, and nobody proves it, until the block ends."""
    place = {"forward": forward, "backward": backward or forward}
    with supplied(
        plan_forward=lambda shape, size: place["forward"](forward_buffers(shape, size), canary_bytes(shape)),
        plan_backward=lambda shape, *sizes: place["backward"](backward_buffers(shape, *sizes), canary_bytes(shape)),
    ):
        yield


def config_of(case: Case, isa: str, **options: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=case.experts,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        top_k=case.top_k,
        lora_rank=case.rank,
        lora_alpha=case.scale * max(case.rank, 1),
        lora_dtype=str(case.lora_dtype).removeprefix("torch."),
        isa=isa,
        allow_skip=case.routing == "skipped_slots",
        activation=case.activation.name,
        activation_alpha=case.activation.alpha,
        activation_limit=case.activation.limit,
        bias=case.bias,
        **options,
    )


def layer_of(inputs: Inputs, isa: str, **options: Any) -> MoELayer:
    """A layer with the base and LoRA values of ``inputs`` that really runs on ``isa``."""
    layer = MoELayer(config_of(inputs.case, isa, **options), **inputs.base())
    assert layer.isa == isa, f"asked for {isa}, got {layer.isa}: another instruction set proves nothing about it"
    set_lora(layer, inputs)
    return layer


def frozen_of(layer: MoELayer) -> dict[str, Tensor]:
    """What is frozen by name: packed weights, which are no buffers, and biases."""
    return {f"packed_{name}": tensor for name, tensor in layer._packed().items()} | dict(layer.named_buffers())


def set_lora(layer: MoELayer, inputs: Inputs) -> None:
    if inputs.lora:
        with torch.no_grad():
            for name, value in inputs.lora._asdict().items():
                layer.get_parameter(name).copy_(value)


def build_kernels(cases: Iterable[Case], isas: Iterable[str] | None = None) -> None:
    """Compile in parallel what the calling tests would otherwise compile one by one."""
    wanted = isas_to_build() if isas is None else list(isas)
    build([config_of(case, isa) for case in cases for isa in wanted], progress=False)


def copied(results: Results) -> Results:
    """Copies that no later call adds to."""
    return {name: value.clone() for name, value in results.items()}


@contextmanager
def on_threads(count: int) -> Iterator[int]:
    """Calls inside the block run on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that a NaN equals itself and 0 differs from -0."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def different(one: Results, other: Results) -> list[str]:
    """Names of the results whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not same_bits(one[name], other[name])]


def run_python(program: str, timeout: float = 120, **environment: str) -> str:
    """What ``program`` prints in a fresh interpreter that shares this run's kernel cache.

    Raises:
        AssertionError: with its stderr, if it failed or hung.
    """
    import os

    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as hung:
        raise AssertionError(f"did not end within {timeout} s; stderr: {hung.stderr}") from hung
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout


def killed_at(step: int, work: Callable[[], object], files: tuple[str, ...] = ("files.py", "packed_file.py")) -> bool:
    """Run ``work`` in a forked child that gets SIGKILL before the ``step``-th line of ``files``; whether it did."""
    child = os.fork()
    if child == 0:
        remaining = [step]

        def count(frame: object, event: str, _: object) -> object:
            if frame.f_code.co_filename.endswith(files):
                if event == "line":
                    remaining[0] -= 1
                    if remaining[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return count
            return None

        sys.settrace(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
