"""Faults from the field in numbers: activations and their slopes at both ends of the range (O)."""

import pytest
import torch
from helpers import EVERY_ISA

from jitmoe import MoEConfig, MoELayer
from jitmoe.config import ACTIVATIONS
from jitmoe.oracle.reference import Activation

SIZE = 32

GATES = (3e38, -3e38, 1e30, -1e30, 89.5, -89.5, 104.5, -104.5, 1e-38, -1e-38, 0.0)


@pytest.mark.field("O")
@EVERY_ISA
@pytest.mark.parametrize("up", [1.0, -0.5, 0.001])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_o_finite_and_right_where_float64_is(name: str, up: float, isa: str) -> None:
    """One expert of diagonal matrices, so that gate and up of each token are what they are here."""
    config = MoEConfig(1, SIZE, SIZE, 1, lora_rank=0, isa=isa, activation=name)
    one = torch.eye(SIZE).bfloat16()[None]
    for gate in GATES:
        base = [(one.float() * value).bfloat16() for value in (gate, up, 0.125)]
        x = torch.ones(1, SIZE).bfloat16().requires_grad_()
        weights = torch.ones(1, 1, requires_grad=True)
        out = MoELayer(config, *base)(x, torch.zeros(1, 1, dtype=torch.int64), weights)
        out.backward(torch.full_like(out, 0.125))
        exact_x, exact_weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
        gates, ups, down = (matrix[0].double() for matrix in base)
        exact = Activation.of(config)(exact_x @ gates.T, exact_x @ ups.T) @ down.T * exact_weights
        exact.backward(torch.full_like(exact, 0.125))
        for ours, theirs in ((out, exact), (x.grad, exact_x.grad), (weights.grad, exact_weights.grad)):
            assert theirs.to(ours.dtype).isfinite().all(), "the case itself must be in range"
            # Two roundings to bfloat16, and e^89 is the last float32: what is smaller may be flushed to zero.
            torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=1e-35)
