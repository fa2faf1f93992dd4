"""What is written once in Python and once in C++: each pair is held together here, by name and in order."""

import ctypes
import dataclasses
import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from helpers import any_shape
from test_toolchain import compile_text

from jitmoe.errors import KernelError
from jitmoe.host import scan, tokens
from jitmoe.inspect import checked
from jitmoe.isa import ISAS
from jitmoe.jit import abi, programs
from jitmoe.jit.render import template_dir
from jitmoe.plan import placement, scratch, shapes
from jitmoe.plan.groups import Extents, plan_groups

TEMPLATES = template_dir()


def header(path: str) -> str:
    """The code of a header, without its comments."""
    text = TEMPLATES.joinpath(path).read_text(encoding="utf-8")
    return re.sub(r"//.*", "", text)


CALL, CHECKED = header("call.hpp"), header("watch/checked.hpp")
NESTED = {"Matrices", "PerThread", "Projection"}
"""Structs of call.hpp that are members of others."""


def members(struct: str, text: str) -> list[tuple[str, str]]:
    """Type and name of each member of a struct; a function in it would not be understood."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", text, re.DOTALL)
    assert body, f"there is no struct {struct}"
    found = []
    for statement in filter(str.strip, body[1].split(";")):
        member = re.fullmatch(r"(?:const )?(.*?)(\w+)", " ".join(statement.split()))
        assert member, f"{struct}: {statement!r} is no member"
        found.append((member[1].strip(), member[2]))
    return found


def fields_of(struct: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and types of the 8-byte fields of a struct; an address goes by the name of its view."""
    for kind, name in members(struct, CALL):
        inner = kind.partition("<")[0]
        if inner in NESTED:
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield (prefix.removesuffix(".") if name == "data" else f"{prefix}{name}"), kind


def enumerators(enum: str, text: str) -> list[str]:
    body = re.search(rf"enum class {enum}\b[^{{]*{{(.*?)}};", text, re.DOTALL)
    assert body, f"there is no enum {enum}"
    return re.findall(r"\w+", body[1])


class TestCall:
    def test_fields_by_name_and_order(self) -> None:
        assert list(abi.FIELDS) == [name for name, _ in fields_of("Call")]

    def test_the_fields_of_a_view(self) -> None:
        assert [name for name, _ in fields_of("Matrices", "a.")] == list(abi.view_fields("a"))

    def test_types(self) -> None:
        """The other fields are integers and addresses."""
        fractions = [name for name, kind in fields_of("Call") if kind == "double"]
        assert fractions == [name for name in abi.FIELDS if abi.CALL[name] == np.float64] == list(abi.NUMBERS)
        callbacks = {"GatherRows", "SumRows", "ObserveValues"}
        for name, kind in fields_of("Call"):
            assert kind.endswith("*") or kind in {"int64_t", "double", *callbacks}, name

    def test_every_field_has_eight_bytes(self, numbers: Callable[..., int]) -> None:
        """So that no compiler puts a gap between two, and order and count say all about the layout."""
        assert {abi.CALL[name].itemsize for name in abi.FIELDS} == {8}
        assert abi.CALL.itemsize == 8 * len(abi.FIELDS) == numbers("size_of_call") == 8 * numbers("fields")

    def test_segments_are_rows_of_four_numbers(self) -> None:
        assert members("Segment", CALL) == [("int64_t", name) for name in ("expert", "row", "rows", "block")]
        assert plan_groups(np.array([7]), np.array([0, 3]), 4, 1).segments.tolist() == [[7, 0, 3, 0]]

    def test_what_the_planner_places_is_what_the_kernels_can_be_told_of(self) -> None:
        shape, size = any_shape("ref"), Extents(3, 6, 2, 3, 4, 1)
        plans = [scratch.plan_forward(shape, size)]
        plans += [scratch.plan_backward(shape, size, x_grad=True, recompute=recompute) for recompute in (False, True)]
        told = {name for plan in plans for name in plan.fields(0)}
        mine = {f"{name}.{field}" for name in ("gate", "up", "down") for field in ("low", "du_rows", "u_rows")}
        mine |= {f"{name}.{field}" for name in ("gate", "up") for field in ("grad_panel", "again")}
        first, last = abi.FIELDS.index("sums"), abi.FIELDS.index("phase_seconds")
        assert told == mine | set(abi.FIELDS[first:last])
        abi.record(dict.fromkeys(told, 1))

    def test_a_field_that_no_call_has_is_refused_by_name(self) -> None:
        with pytest.raises(KernelError, match=r"no field gate\.lo, sum_row:"):
            abi.record({"gate.lo": 1, "sum_row": 2, "rows": 3})

    def test_a_record_has_what_it_was_given_and_zeros(self) -> None:
        given = {"down.b_grad.column": 5, "scale": 0.5, "tokens": 2}
        record = abi.record(given)
        assert {name: record[name] for name in abi.FIELDS if record[name]} == given


class TestNames:
    def test_phases(self) -> None:
        assert [*abi.PHASES, "count"] == enumerators("Phase", header("watch/timed.hpp"))

    def test_tensors(self) -> None:
        assert [*abi.TENSORS, "count"] == enumerators("Tensor", header("watch/traced.hpp"))

    @pytest.mark.parametrize("pass_name", ["Forward", "Backward"])
    def test_steps(self, pass_name: str) -> None:
        steps = {"Forward": scratch.FORWARD_STEPS, "Backward": scratch.BACKWARD_STEPS}[pass_name]
        assert list(steps) == enumerators(f"{pass_name}Step", header(f"{pass_name.lower()}.hpp"))

    def test_faults(self) -> None:
        assert ["none", *checked.FAULTS] == enumerators("Fault", CHECKED)

    @pytest.mark.parametrize(("struct", "mirror"), [("Life", abi.LIFE), ("Checks", abi.CHECKS)])
    def test_of_checks(self, struct: str, mirror: np.dtype, numbers: Callable[..., int]) -> None:
        assert [name for _, name in members(struct, CHECKED)] == list(mirror.names)
        assert numbers(f"size_of_{struct.lower()}") == mirror.itemsize

    def test_instruction_sets(self) -> None:
        assert set(enumerators("Isa", header("shape.hpp"))) == set(ISAS)

    def test_the_shape(self) -> None:
        names = [name for _, name in members("Shape", header("shape.hpp"))]
        assert [field.name for field in dataclasses.fields(shapes.Shape)] == names


C_TYPES = {
    "const bf16*": "CPointer(uint16)",
    "bf16*": "CPointer(uint16)",
    "const int64_t*": "CPointer(int64)",
    "const float*": "CPointer(float32)",
    "float*": "CPointer(float32)",
    "double*": "CPointer(float64)",
    "int64_t": "int64",
}


@pytest.mark.parametrize(
    ("callback", "signature", "function"),
    [
        ("GatherRows", tokens._GATHER_ROWS, tokens._gather_rows_at),
        ("SumRows", tokens._SUM_ROWS, tokens._sum_rows_at),
        ("ObserveValues", scan._OBSERVE, scan._observe_at),
    ],
)
def test_a_callback_takes_what_the_kernels_give(callback: str, signature: str, function: Callable[..., None]) -> None:
    declared = re.search(rf"using {callback} = void \(\*\)\((.*?)\);", CALL, re.DOTALL)
    assert declared, callback
    given = [re.fullmatch(r"(.*?)(\w+)", " ".join(part.split())) for part in declared[1].split(",")]
    expected = [C_TYPES[part[1].strip()] for part in given if part]
    if callback == "ObserveValues":
        expected[1] = "voidptr"  # the function reads the floats as bits too
    assert signature == f"void({', '.join(expected)})"
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    assert list(names) == [part[2] for part in given if part]


NUMBERS = """
#include "gemm/pack.hpp"
#include "gemm/tuning.hpp"
#include "watch/checked.hpp"
#include "watch/traced.hpp"
using namespace jitmoe;
extern "C" {
int64_t abi_version() { return kAbiVersion; }
int64_t size_of_call() { return sizeof(Call); }
int64_t size_of_life() { return sizeof(Life); }
int64_t size_of_checks() { return sizeof(Checks); }
int64_t fields() { return kFields; }
int64_t line() { return kLine; }
int64_t chunk() { return kChunk; }
int64_t k_step() { return kKStep; }
int64_t strip() { return kStrip; }
int64_t census() { return kCensus; }
int64_t packed(int64_t out, int64_t in) { return packed_elements(out, in); }
}
"""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """What the headers say: a name of :data:`NUMBERS` and its arguments."""
    library = compile_text(tmp_path_factory.mktemp("numbers"), NUMBERS, include=TEMPLATES)

    def number(name: str, *arguments: int) -> int:
        function = library[name]
        function.restype = ctypes.c_int64
        return function(*map(ctypes.c_int64, arguments))

    return number


@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("abi_version", abi.ABI_VERSION),
        ("line", placement.ALIGNMENT),
        ("chunk", scratch.CHUNK),
        ("k_step", shapes.K_STEP),
        ("strip", shapes.N_STRIP),
        ("census", len(scan.RECORD)),
    ],
)
def test_a_constant(name: str, mirror: int, numbers: Callable[..., int]) -> None:
    """Shapes of the tests are too small to fill a chunk, and so on: the wrong number would not be missed."""
    assert numbers(name) == mirror


@pytest.mark.parametrize(("out", "in_"), [(1, 1), (32, 32), (33, 64), (65, 47), (1408, 2048)])
def test_packed_elements(out: int, in_: int, numbers: Callable[..., int]) -> None:
    assert numbers("packed", out, in_) == shapes.packed_elements(out, in_)


def test_every_register_block_is_allowed_by_the_header(tmp_path_factory: pytest.TempPathFactory) -> None:
    checks = "".join(
        f"  check_shape<Shape{{.isa = Isa::{isa}, .hidden = 1, .intermediate = 1, .m_step = {step}}}>();\n"
        for isa, found in ISAS.items()
        for step in found.m_steps
    )
    text = f'#include "shape.hpp"\nusing namespace jitmoe;\nextern "C" int checked() {{\n{checks}  return 1;\n}}\n'
    assert compile_text(tmp_path_factory.mktemp("checks"), text, include=TEMPLATES).checked() == 1


def test_verdicts_of_the_probe() -> None:
    found = re.search(r"kWrong = (-\d+), kNoProcess = (-\d+)", header("tools/probe.cpp"))
    assert found
    wrong, no_process = (programs.tile_test_fault(int(number)) for number in found.groups())
    assert wrong and "wrong product" in wrong
    assert no_process and "no process" in no_process
