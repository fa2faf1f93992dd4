"""The contract of the back ends: where sums start, and what the compiler says of a back end that lacks something."""

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from emulated import NEEDS_TILES, Emulated, tiles
from helpers import EVERY_ISA

from jitmoe import formats
from jitmoe.errors import BuildError
from jitmoe.isa import ISAS
from jitmoe.jit import capability, toolchain
from jitmoe.jit.render import template_dir
from jitmoe.plan import shapes

DRIVER = Path(__file__).parent / "back_end_driver.cpp"

ROWS = (3, 6, 17, 60)
"""Few rows, one row block, two, many: each takes another form of the product."""

CONTRACTION = 301
"""More than one chunk, and a tail that is odd."""

GARBAGE = np.float32("nan")


def compile_text(text: str, isa: str, folder: Path) -> Path:
    """Compile ``text`` with the headers of the kernels and the flags of ``isa``."""
    folder.mkdir(exist_ok=True)
    source, library = folder / "source.cpp", folder / "source.so"
    source.write_text(text, encoding="utf-8")
    compiler = toolchain.find_compiler()
    flags = tuple(flag for flag in toolchain.flags(isa, compiler.kind) if flag != "-O3")
    toolchain.compile(compiler, source, library, ("-O1", *flags), Path(str(template_dir())), 120.0, folder / "log")
    return library


def check_sums(isa: str, m_step: int, folder: Path) -> None:
    """Products of small integers are exact, so a sum is right or wrong to the last bit."""
    text = DRIVER.read_text(encoding="utf-8").replace("DRIVEN_ISA", isa).replace("DRIVEN_M_STEP", str(m_step))
    multiply = ctypes.CDLL(str(compile_text(text, isa, folder / str(m_step)))).jitmoe_multiply
    generator = np.random.default_rng(1)
    for forward in (True, False):
        weights = generator.integers(-4, 5, (32, CONTRACTION) if forward else (CONTRACTION, 32))
        for count in ROWS:
            rows = np.zeros((count, 32 * -(-CONTRACTION // 32)), np.int64)
            rows[:, :CONTRACTION] = generator.integers(-4, 5, (count, CONTRACTION))
            product = rows[:, :CONTRACTION] @ (weights.T if forward else weights)
            # Backward keeps columns in the order of its lanes: what it starts from must be the same in all of them.
            bias = generator.integers(-99, 100, 32) if forward else np.full(32, 7)
            begun = generator.integers(-99, 100, (count, 32 if forward else 1)) * np.ones((1, 32), np.int64)
            starts = {
                "zeros": (0, None, 0),
                "bias": (1, bias, bias),
                "strip": (2, begun, begun),
                "its own": (2, None, begun),
            }
            for name, (kind, from_, added) in starts.items():
                strip = np.full((count, 32), GARBAGE, np.float32)
                if name == "its own":
                    strip[:] = begun
                held = None if from_ is None else np.ascontiguousarray(from_, np.float32)
                multiply(
                    ctypes.c_int(forward),
                    address(bfloat16(rows)),
                    ctypes.c_int64(count),
                    ctypes.c_int64(CONTRACTION),
                    address(bfloat16(weights)),
                    ctypes.c_int(kind),
                    None if held is None else address(held),
                    address(strip),
                )
                assert (strip == product + added).all(), f"{isa} {m_step}, {forward=}, {count} rows from {name}"


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy()


def address(array: np.ndarray) -> ctypes.c_void_p:
    pointer = ctypes.c_void_p(array.ctypes.data)
    pointer.array = array  # type: ignore[attr-defined]  # alive as long as the address
    return pointer


@EVERY_ISA
def test_sums_start_from_zeros_a_bias_or_a_strip(isa: str, tmp_path: Path) -> None:
    for m_step in ISAS[isa].m_steps:
        check_sums(isa, m_step, tmp_path)


@NEEDS_TILES
def test_sums_start_on_amx(tmp_path: Path) -> None:
    process = Emulated()
    for m_step in ISAS[tiles()].m_steps:
        process(check_sums_emulated, tiles(), m_step, tmp_path)
    process.close()


def check_sums_emulated(isa: str, m_step: int, folder: Path) -> None:
    capability.resolve_isa(isa)  # installs the emulator
    check_sums(isa, m_step, folder)


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        ("Isa", reversed(ISAS)),
        ("Activation", get_args(shapes.Activation)),
        ("Format", get_args(formats.WeightFormat)),
        ("Scale", get_args(formats.ScaleDtype)),
        ("Watch", get_args(shapes.Watch)),
    ],
)
def test_names_mirror_the_header(enum: str, names: Iterable[str]) -> None:
    header = (template_dir() / "shape.hpp").read_text(encoding="utf-8")
    assert re.findall(rf"enum class {enum} {{ (.*) }};", header) == [", ".join(names)]


SHAPE = """
#include "layer.hpp"
using namespace jitmoe;
constexpr Shape shape{{.isa = Isa::{isa}, .hidden = {hidden}, .intermediate = 64, .padded_rank = {padded_rank},
                      .m_step = {m_step}, .lora_bf16 = false{weights}}};
{text}
void pass(const Call& call) {{ forward<shape>(call), backward<shape>(call); }}
"""

BROKEN = """
struct Broken : GemmRef<shape> {{ {member} }};
template <> struct jitmoe::BackEndOf<shape> {{ using type = Broken; }};
"""

GOOD = {"isa": "ref", "hidden": 64, "padded_rank": 32, "m_step": 4, "weights": ""}


def errors_of(text: str, folder: Path) -> list[str]:
    """What the compiler calls errors in ``text``."""
    with pytest.raises(BuildError):
        compile_text(text, "ref", folder)
    log = (folder / "log").read_text(encoding="utf-8")
    return re.findall(r"error: (?:static assertion failed: )?(.*)", log)


def test_a_right_shape_compiles(tmp_path: Path) -> None:
    assert compile_text(SHAPE.format(text="", **GOOD), "ref", tmp_path).is_file()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"isa": "amx", "m_step": 16}, "this shape's isa has no back end here: "),
        ({"isa": "avx2", "m_step": 7}, "m_step must be 16 or 32 on amx, 1 to 6 on avx2"),
        ({"isa": "amx", "m_step": 24}, "m_step must be 16 or 32 on amx"),
        ({"m_step": 0}, "m_step must be"),
        ({"hidden": 0}, "hidden and intermediate sizes must be positive"),
        ({"padded_rank": 8}, "padded_rank must be a multiple of 32"),
        ({"weights": ", .format = Format::int4_group, .group_size = 48"}, "group_size of int4_group must be"),
    ],
)
def test_a_wrong_shape_is_one_sentence(wrong: dict[str, object], sentence: str, tmp_path: Path) -> None:
    found = errors_of(SHAPE.format(text="", **(GOOD | wrong)), tmp_path)
    assert len(found) == 1 and found[0].startswith(sentence), found


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        ("private: using Operand = float;", "Operand"),
        ("int64_t block_elements;", "int64_t block_elements(k)"),
        ("static void block_elements(int64_t);", "int64_t block_elements(k)"),
        ("static void pack_rows();", "pack_rows(rows, stride, count, k, block)"),
        ("static void pack_strip();", "pack_strip(strip, count, column, columns, k, block)"),
        ("static void forward();", "forward(panel, rows, k, weights, start, strip, scratch)"),
        ("static void backward();", "backward(panel, rows, n, weights, start, strip, scratch)"),
        ("static void to_natural_order();", "int64_t column_at(lane) and to_natural_order(strip, rows)"),
        ("static void low_rank();", "low_rank(block, rows, k, lora, rank, low)"),
        ("static void outer();", "outer(a, a_stride, rows, b, k, c)"),
        ("static void transpose_padded();", "transpose and transpose_padded(from, stride, rows, columns, to, stride)"),
    ],
)
def test_what_a_back_end_lacks_is_one_sentence(member: str, sentence: str, tmp_path: Path) -> None:
    found = errors_of(SHAPE.format(text=BROKEN.format(member=member), **GOOD), tmp_path)
    assert found and f"a back end needs {'a type ' if sentence == 'Operand' else ''}{sentence}" in found[0], found
    assert len(found) == 1 or sentence == "Operand", found
