"""The rendered instance, byte for byte: a change of it is a change that somebody meant and read."""

import re

import pytest

from jitmoe.jit.render import render
from jitmoe.plan.shapes import Shape

SHAPES = [
    Shape(isa="avx512", hidden=2048, intermediate=1408, padded_rank=32, m_step=14, lora_bf16=False),
    Shape(isa="avx512", hidden=17, intermediate=33, padded_rank=0, m_step=4, lora_bf16=False),
    Shape(isa="ref", hidden=64, intermediate=96, padded_rank=64, m_step=4, lora_bf16=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_golden(shape, golden):
    golden(f"{shape.name}.cpp", render(shape).text)


def test_every_field_of_the_shape_reaches_the_text():
    text = render(SHAPES[0]).text
    fields = {"isa": "jitmoe::Isa::avx512", "hidden": 2048, "intermediate": 1408, "padded_rank": 32, "m_step": 14}
    for field, value in (fields | {"lora_bf16": "false", "activation": "jitmoe::Activation::silu"}).items():
        assert f".{field} = {value}," in text


def test_an_instance_is_not_a_kernel():
    lines = [line for line in render(SHAPES[0]).text.splitlines() if line and not line.startswith("//")]
    assert len(lines) < 40
    assert len([line for line in lines if line.startswith("#include")]) == 1
    assert not re.search(r"\$|\b(for|while|if)\b", "\n".join(lines))
