"""Ctrl-C at random moments of everything that takes long: what was is whole, and the next call is right.

Interrupts come by a timer of the system, so they reach compiled code too; at every phase and line of ours they are
injected by test_faults_memory.py and test_field_files.py.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import build_kernels, case_named, config_of, copied, different, layer_of, run_python, set_lora, usable_isas
from yardstick import Inputs, Results, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.errors import WeightsChangedError
from jitmoe.host.route import route

ISA = usable_isas()[0]
CASE = case_named("medium")


class Interrupts:
    """Sends the handler of Ctrl-C to what runs, somewhere between its begin and a little behind its end."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.came: dict[str, int] = {}
        self.longest: dict[str, float] = {}
        signal.signal(signal.SIGALRM, signal.default_int_handler)

    def during(self, name: str, work: Callable[[], object]) -> bool:
        """Whether an interrupt came out of ``work``; as anything else it is the fault."""
        if name not in self.longest:
            start = time.perf_counter()
            work()
            self.longest[name] = time.perf_counter() - start
            return False
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + self.pick.random() * 1.2 * self.longest[name])
            work()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            self.came[name] = self.came.get(name, 0) + 1
            # One run was left with gradients off, as an interrupt inside of torch.no_grad's own __enter__ leaves it.
            torch.set_grad_enabled(True)
            return True
        return False


class Scene:
    """A layer and all that is done with it."""

    def __init__(self, folder: Path) -> None:
        build_kernels([CASE], [ISA])
        self.inputs: Inputs = make_inputs(CASE)
        self.layer = layer_of(self.inputs, ISA)
        self.states = [
            {name: tensor.clone() for name, tensor in MoELayer(config_of(CASE, ISA), **base).state_dict().items()}
            for base in (self.inputs.base(), make_inputs(replace(CASE, seed=1)).base())
        ]
        self.expected: Results = copied(results_of_layer(self.layer, self.inputs))
        self.path = folder / "layer.packed"
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.01)

    def results(self) -> Results:
        return results_of_layer(self.layer, self.inputs)

    def forward_backward(self) -> None:
        self.x = self.inputs.x.clone().requires_grad_()
        self.layer(self.x, self.inputs.topk_ids, self.inputs.weights).backward(self.inputs.dout)

    def after_backward(self) -> None:
        """All gradients, or none."""
        grads = {name: p.grad for name, p in self.layer.named_parameters()}
        there = {name for name, grad in grads.items() if grad is not None}
        assert there in (set(), set(grads)), f"some gradients are there: {there}"
        assert not different({n: grads[n] for n in there}, {n: self.expected[n] for n in there})

    def step(self) -> None:
        self.optimizer.step()

    def after_step(self) -> None:
        """Whatever torch has stepped, the next call uses it."""
        found = self.layer(self.inputs.x, self.inputs.topk_ids, self.inputs.weights).detach()
        other = layer_of(self.inputs, ISA)
        other.load_state_dict(self.layer.state_dict())
        assert torch.equal(found, other(self.inputs.x, self.inputs.topk_ids, self.inputs.weights))

    def numba(self) -> None:
        self.routed = [route(self.inputs.topk_ids.numpy(), CASE.experts) for _ in range(20)]

    def save(self) -> None:
        self.layer.save_packed(self.path)

    def after_save(self) -> None:
        if self.path.exists():
            MoELayer.from_packed(self.layer.config, self.path)
        self.layer.save_packed(self.path)
        assert [entry.name for entry in self.path.parent.iterdir()] == [self.path.name]

    def load(self) -> None:
        self.layer.load_state_dict(self.states[1])

    def after_load(self) -> None:
        """The old weights or the new ones, or a refusal until they are loaded."""
        try:
            state = dict(self.layer.state_dict())
            bases = [name for name in state if name.startswith("base_")]
            assert any(not different({n: state[n] for n in bases}, {n: s[n] for n in bases}) for s in self.states)
        except WeightsChangedError:
            pass
        self.layer.load_state_dict(self.states[0])


def work(rounds: int, seed: int, folder: str) -> None:
    """In a process of its own: the interrupts that came, by what they interrupted, as JSON."""
    torch.set_num_threads(2)
    scene, interrupts = Scene(Path(folder)), Interrupts(seed)
    for _ in range(rounds):
        scene.layer.zero_grad()
        set_lora(scene.layer, scene.inputs)
        interrupts.during("forward and backward", scene.forward_backward)
        scene.after_backward()
        for name, act, after in (
            ("numba", scene.numba, lambda: None),
            ("save_packed", scene.save, scene.after_save),
            ("load_state_dict", scene.load, scene.after_load),
        ):
            interrupts.during(name, act)
            after()
        assert different(scene.results(), scene.expected) == []
        interrupts.during("optimizer", scene.step)
        scene.after_step()
    print(json.dumps(interrupts.came))


@pytest.mark.field("S")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("rounds", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_interrupted_at_random_moments(rounds: int, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    program = f"from test_interrupts import work; work({rounds}, {rounds}, {str(tmp_path / 'files')!r})"
    came = json.loads(run_python(program, timeout=100 + 10 * rounds).splitlines()[-1])
    assert set(came) >= {"forward and backward", "numba", "save_packed", "load_state_dict"}, came
    assert sum(came.values()) > 1.5 * rounds, came
