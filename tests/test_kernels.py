"""The ctypes side of the C ABI agrees with the header, field by field."""

import ctypes
import re
from pathlib import Path

import pytest
from helpers import any_shape

from jitmoe.errors import KernelError
from jitmoe.jit import kernels
from jitmoe.jit.build import ABI_VERSION, ensure
from jitmoe.jit.render import render, template_dir
from jitmoe.plan import scratch as memory_module
from jitmoe.plan import shapes

HEADER = (template_dir() / "call.hpp").read_text(encoding="utf-8")
C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def fields_of_header(struct: str) -> list[tuple[str, type]]:
    """Names and ctypes types of a struct's members, read from call.hpp."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", HEADER, re.DOTALL)
    assert body, f"no struct {struct} in call.hpp"
    fields = []
    for line in body[1].splitlines():
        code = line.partition("//")[0].strip()
        if not code:
            continue
        member = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+);", code)
        assert member, f"call.hpp: cannot read the member {code!r}"
        pointer = member[2] or member[1] in ("GatherRows", "SumRows", "ObserveValues")
        fields.append((member[3], ctypes.c_void_p if pointer else C_TYPES[member[1]]))
    return fields


def test_call_mirrors_the_header() -> None:
    assert [tuple(field) for field in kernels.Call._fields_] == fields_of_header("Call")


def test_every_field_has_eight_bytes() -> None:
    """So that no compiler puts a gap between two, and order and count say all about the layout."""
    assert {getattr(kernels.Call, name).size for name, *_ in kernels.Call._fields_} == {8}
    assert ctypes.sizeof(kernels.Call) == 8 * len(kernels.Call._fields_)


def test_segments_are_rows_of_four_numbers() -> None:
    assert fields_of_header("Segment") == [(name, ctypes.c_int64) for name in ("expert", "row", "rows", "block")]


def test_the_abi_version_is_one_number_everywhere() -> None:
    in_header = re.search(r"kAbiVersion = (\d+)", HEADER)
    assert in_header and int(in_header[1]) == kernels.ABI_VERSION == ABI_VERSION


def test_steps_mirror_the_header() -> None:
    header = (template_dir() / "parallel.hpp").read_text(encoding="utf-8")
    names = re.search(r"enum class Step \{(.*?)\}", header, re.DOTALL)[1]
    assert [name.strip() for name in names.split(",")] == [*kernels.STEPS, "count"]


def test_observed_tensors_mirror_the_header() -> None:
    header = (template_dir() / "watch" / "traced.hpp").read_text(encoding="utf-8")
    names = re.search(r"enum class Observed \{(.*?)\}", header, re.DOTALL)[1]
    assert [name.strip() for name in names.split(",")] == [*kernels.OBSERVED, "count"]


def test_scratch_names_are_fields_and_buffers() -> None:
    """What the planner may place is exactly what the kernels can be told of."""
    shape, size = shapes.Shape("ref", 8, 8, 32, 4, False), memory_module.CallSize(3, 6, 2, 3, 4, 1)
    placed = {item.buffer.name for item in memory_module.plan_forward(shape, size).placed}
    for recompute in (False, True):
        backward = memory_module.plan_backward(shape, size, x_grad=True, recompute=recompute)
        placed |= {item.buffer.name for item in backward.placed}
    assert placed == set(kernels.SCRATCH)
    assert placed <= {name for name, _ in kernels.Call._fields_}


@pytest.fixture(scope="module")
def library() -> Path:
    return ensure(render(any_shape()))


@pytest.mark.parametrize("fault", ["abi", "size"])
def test_a_library_of_another_version_is_refused(library: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "abi":
        monkeypatch.setattr(kernels, "ABI_VERSION", kernels.ABI_VERSION + 1)
    else:
        longer = type("Longer", (kernels.Call,), {"_fields_": [("one_more", ctypes.c_int64)]})
        monkeypatch.setattr(kernels, "Call", longer)
    with pytest.raises(KernelError, match="jitmoe cache clear"):
        kernels.Kernels(library)


def test_a_matching_library_is_loaded_once(library: Path) -> None:
    assert kernels.Kernels(library).path == library
    assert kernels.load(any_shape()) is kernels.load(any_shape())
