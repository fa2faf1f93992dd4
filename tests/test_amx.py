"""The AMX kernels, executed: the yardstick's cases, faults of tile state, kernels broken on purpose, counts."""

import ctypes
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_faults_values
import test_lora_views
import torch
from emulated import NEEDS_TILES, TILE_ISAS, Emulated, can_emulate, tiles
from helpers import config_of, copied, different, layer_of
from mutation import Mutant, broken_templates
from test_faults_values import poison_padding
from yardstick import CASES, Case, check, make_inputs, results_of_layer

from jitmoe import build
from jitmoe.bench.tile_work import Sizes, base_products, lora_products
from jitmoe.isa import ISAS
from jitmoe.jit import capability, cpu, emulator, programs, toolchain
from jitmoe.jit.build import ensure
from jitmoe.jit.render import read_program
from jitmoe.plan import shapes

pytestmark = [NEEDS_TILES, pytest.mark.timeout(600)]

ISA = tiles()

TEMPLATES = Path(__file__).parent.parent / "templates"

HAS_NO_AMX = pytest.mark.skipif(
    not cpu.missing_features(ISA, cpu.detect()), reason="this CPU has AMX: nothing is emulated"
)

ONE_TILE_CASES = ("medium", "ragged_33")
"""Cases that `make test` also runs with M_STEP 16; M_STEP 32 runs the same code for blocks of up to 16 rows."""

SLOW_CASES = ("hidden_1", "intermediate_1", "ragged_15", "ragged_47", "one_token", "duplicates", "every_expert")
"""Cases whose kernels take longer to compile than they have that is new to these."""

TAILS = Case("tails", experts=2, hidden=65, intermediate=47, top_k=1, rank=17, tokens=100)
"""Several row blocks, partial tiles of both halves, odd contractions and two tiles of ranks."""

W1 = Case("w1", experts=64, hidden=2048, intermediate=1408, top_k=6, rank=8, tokens=48)

PEAK = 16384
"""FLOP of one tile product: 16 rows x 32 k x 16 columns, twice."""


@pytest.fixture(scope="module")
def emulated() -> Iterator[Emulated]:
    process = Emulated()
    yield process
    process.close()


def check_cell(case: Case, m_step: int, isa: str) -> None:
    inputs = make_inputs(case)
    emulator.reset_counts()
    results = results_of_layer(layer_of(inputs, isa, m_step=m_step), inputs)
    counts = emulator.counts()
    executed = counts.tdpbf16ps if ISAS[isa].tiles else counts.avx512_bf16
    assert executed or capability.describe(isa) == isa, f"no instruction of {isa} was emulated"
    check(results, inputs)


def cells() -> Iterator[pytest.param]:
    for case in (*CASES, TAILS):
        for m_step in ISAS[ISA].m_steps:
            fast = case.name in ONE_TILE_CASES or (m_step == 32 and case.name not in SLOW_CASES)
            yield pytest.param(case, m_step, marks=[] if fast else pytest.mark.slow, id=f"{case}-m{m_step}")
    yield pytest.param(W1, 32, marks=pytest.mark.slow, id="w1-m32")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built(request: pytest.FixtureRequest, emulated: Emulated) -> None:
    """Compile in parallel what the selected tests would otherwise compile one by one."""
    mine = [item for item in request.session.items if item.module is request.module]
    chosen = [item.callspec.params for item in mine if hasattr(item, "callspec") and "m_step" in item.callspec.params]
    emulated(build_cells, ISA, [(cell["case"], cell["m_step"]) for cell in chosen])


def build_cells(isa: str, chosen: list[tuple[Case, int]]) -> None:
    build([config_of(case, isa, m_step=m_step) for case, m_step in chosen], progress=False)


@pytest.mark.parametrize(("case", "m_step"), list(cells()))
def test_shape(emulated: Emulated, case: Case, m_step: int) -> None:
    emulated(check_cell, case, m_step, ISA)


@pytest.mark.skipif(
    not cpu.missing_features("avx512_bf16", cpu.detect()),
    reason="this CPU has AVX512-BF16: test_matrix.py runs the same cases natively",
)
@pytest.mark.skipif(
    not can_emulate("avx512_bf16"), reason="the emulator of AVX512-BF16 needs the AVX-512 registers of the CPU"
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_avx512_bf16_shape(emulated: Emulated, case: Case) -> None:
    emulated(check_cell, case, ISAS["avx512_bf16"].m_steps[-1], "avx512_bf16")


def check_threads(isa: str) -> None:
    inputs = make_inputs(TAILS)
    layer = layer_of(inputs, isa, m_step=32)
    found = {}
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found[threads] = results_of_layer(layer, inputs)
    torch.set_num_threads(2)
    for threads, results in found.items():
        assert different(results, found[1]) == [], f"{threads} threads"


def test_same_bits_for_any_number_of_threads(emulated: Emulated) -> None:
    emulated(check_threads, ISA)


def check_batch_invariance(isa: str) -> None:
    """A token alone takes the bottom tiles, in the batch mostly the top ones."""
    inputs = make_inputs(TAILS)
    layer = layer_of(inputs, isa, batch_invariant=True)
    with torch.no_grad():
        whole = layer(inputs.x, inputs.topk_ids, inputs.weights)
        parts = [
            layer(inputs.x[i : i + 7], inputs.topk_ids[i : i + 7], inputs.weights[i : i + 7]) for i in range(0, 100, 7)
        ]
    assert torch.equal(whole, torch.cat(parts))


def test_a_row_has_the_same_bits_in_any_batch(emulated: Emulated) -> None:
    emulated(check_batch_invariance, ISA)


def check_vectors_beside(case: Case) -> None:
    inputs = make_inputs(case)
    for options in ({}, {"recompute": True}, {"batch_invariant": True}):
        one, other = (copied(results_of_layer(layer_of(inputs, isa, **options), inputs)) for isa in TILE_ISAS)
        assert different(one, other) == [], options


@pytest.mark.skipif(not all(map(can_emulate, TILE_ISAS)), reason="AMX beside AVX-512 cannot be emulated on this CPU")
@pytest.mark.parametrize("case", [TAILS, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES)], ids=str)
def test_the_vectors_beside_the_tiles_change_no_bit(emulated: Emulated, case: Case) -> None:
    """AVX2 or AVX-512: the code for CPUs without AVX-512 is that of AMX, but for loops in place of instructions."""
    emulated(check_vectors_beside, replace(case, tokens=max(case.tokens, 20 * case.experts)))


def check_lost_configuration(isa: str, library: Path) -> None:
    """Another library's tiles before each call, on this thread and on one that starts later."""
    spoil = ctypes.CDLL(str(library)).configure_one_row
    inputs = make_inputs(TAILS)
    layer = layer_of(inputs, isa, m_step=32)
    clean = results_of_layer(layer, inputs)
    found = []

    def run() -> None:
        spoil()
        found.append(results_of_layer(layer, inputs))

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 2
    for results in found:
        assert different(results, clean) == []


def test_another_library_loads_its_own_configuration(emulated: Emulated, tmp_path: Path) -> None:
    source = """
    #include "gemm/tiles.hpp"
    extern "C" void configure_one_row() {
      jitmoe::amx::Configuration one = {};
      one.palette = 1;
      for (int tile = 0; tile < 8; ++tile) one.rows[tile] = 1, one.row_bytes[tile] = 4;
      jitmoe::amx::load_configuration(one);
    }
    """
    emulated(check_lost_configuration, ISA, compile_text(toolchain.find_compiler(), source, tmp_path, "-O2"))


def compile_text(compiler: toolchain.Compiler, text: str, folder: Path, level: str) -> Path:
    source, library = folder / "source.cpp", folder / "source.so"
    source.write_text(text)
    flags = ("-std=c++20", "-fPIC", "-shared", level, *ISAS[ISA].flags)
    toolchain.compile(compiler, source, library, flags, TEMPLATES, 120.0, folder / "log")
    return library


@pytest.mark.parametrize(
    ("fault", "arguments"),
    [
        (test_faults_values.test_nan_in_the_padding_of_the_weights, (TAILS, False)),
        (test_faults_values.test_nan_in_the_scratch, (TAILS, False)),
        (test_faults_values.test_nan_in_the_scratch, (TAILS, True)),
    ],
)
def test_fault(emulated: Emulated, fault: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Faults that every instruction set has a test for, here with several row blocks and tails everywhere."""
    emulated(fault, ISA, *arguments)


@pytest.mark.parametrize("place", ["x", "dout", "weights"])
def test_a_nan_stays_with_its_token(emulated: Emulated, place: str) -> None:
    emulated(check_nan_of_token, ISA, place)


def check_nan_of_token(isa: str, place: str) -> None:
    """All rows of an expert share tiles; LoRA gradients sum over them and are not looked at."""
    inputs = make_inputs(TAILS)
    layer = layer_of(inputs, isa, m_step=32)
    clean = results_of_layer(layer, inputs)
    poisoned = getattr(inputs, place).clone()
    poisoned[20, 0] = float("nan")
    found = results_of_layer(layer, replace(inputs, **{place: poisoned}))
    others = torch.arange(TAILS.tokens) != 20
    for name in ("out", "x", "weights"):
        assert torch.equal(found[name][others], clean[name][others]), name
    assert any(not found[name][20].isfinite().all() for name in ("out", "x", "weights"))


def check_few_rows(isa: str) -> None:
    """The planner's choice by rows per expert; few rows execute no tile instruction."""
    few = ISAS[isa].few_rows
    for tokens, expected in ((8, (few, ISAS[few].m_steps[0])), (16, (isa, 16)), (40, (isa, 32))):
        inputs = make_inputs(replace(TAILS, tokens=tokens))
        layer = layer_of(inputs, isa)
        shape = shapes.plan_kernels(layer.config, isa).select(tokens, TAILS.experts)
        assert (shape.isa, shape.m_step) == expected
        emulator.reset_counts()
        results = results_of_layer(layer, inputs)
        assert (emulator.counts().products > 0) == (shape.isa == isa) or capability.describe(isa) == isa
        check(results, inputs)


def test_few_rows_take_a_kernel_of_vectors_on_the_same_weights(emulated: Emulated) -> None:
    emulated(check_few_rows, ISA)


@pytest.mark.parametrize("layout", test_lora_views.LAYOUTS)
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_lora_of_any_strides(emulated: Emulated, lora_dtype: torch.dtype, layout: test_lora_views.Layout) -> None:
    emulated(test_lora_views.check_values, ISA, replace(TAILS, lora_dtype=lora_dtype), layout)


@pytest.mark.parametrize("layout", test_lora_views.LAYOUTS)
def test_gradients_of_any_strides(emulated: Emulated, layout: test_lora_views.Layout) -> None:
    emulated(test_lora_views.check_gradients, ISA, TAILS, layout, True)


def reports(isa: str) -> tuple[str, str, str]:
    layer = layer_of(make_inputs(TAILS), isa, m_step=32)
    report = build(layer.config, progress=False)
    found = next(entry for entry in capability.capabilities() if entry.isa == isa)
    return str(report), repr(layer), found.reason


@HAS_NO_AMX
def test_reports_say_emulated(emulated: Emulated) -> None:
    report, layer, reason = emulated(reports, ISA)
    assert f"{ISA} (emulated)" in report
    assert f"isa={ISA} (emulated)" in layer
    assert reason.startswith("emulated (JITMOE_EMULATE=1)")


def tile_test(isa: str) -> str | None:
    return programs.tile_test_fault(ctypes.CDLL(str(ensure(read_program("probe", isa)))).jitmoe_test_tiles())


def check_named_emulator(isa: str, path: Path) -> None:
    os.environ["JITMOE_EMULATE"] = str(path)
    assert f"emulated (JITMOE_EMULATE={path})" in next(c.reason for c in capability.capabilities() if c.isa == isa)
    check_cell(TAILS, 32, isa)


@HAS_NO_AMX
def test_another_emulator_can_be_named() -> None:
    process = Emulated()
    try:
        process(check_named_emulator, ISA, programs.emulator().path)
    finally:
        process.close()


@HAS_NO_AMX
def test_self_test_dies_without_amx_and_the_emulator_does_not_answer(emulated: Emulated) -> None:
    assert emulated(tile_test, ISA) == "the self-test of its tiles was killed by SIGILL"


def bug(name: str, text: str, replacement: str, header: str = "tile_product") -> Mutant:
    return Mutant(name, f"templates/gemm/{header}.hpp", text, replacement)


MUTANTS = (
    bug("wrong stride", "kStripBytes = kStrip * sizeof(float)", "kStripBytes = kTile * sizeof(float)"),
    bug("missing tail of the contraction", "if (last) step", "if (false) step", "amx"),
    bug("missing LDTILECFG", "  amx::load_configuration(kTileConfigurations.of[bottom_rows]);\n", ""),
    bug("partial rows as a whole tile", "return (rows - 1) % amx::kRows + 1", "return amx::kRows"),
    bug("padding is multiplied", "if (n % kKStep) cut_pairs", "if (false) cut_pairs", "amx"),
    bug("configuration of another block", "(configured_rows == bottom_rows)", "(configured_rows)"),
    bug("one tile of weights twice", "stream<7>(b + kTileElements", "stream<7>(b"),
    bug(
        "K-step of the first row block",
        "reinterpret_cast<const bf16*>(lora.low) + block *",
        "reinterpret_cast<const bf16*>(lora.low) + 0 *",
        "amx",
    ),
    bug("gradients of the first row block", "step(a + (b * all + half)", "step(a + (0 * all + half)", "lora_tiles"),
)
FAST_MUTANTS = 4
"""The first ones that `make test` judges too."""


def check_broken(isa: str, mutant: Mutant) -> None:
    with broken_templates(mutant):
        inputs = make_inputs(TAILS)
        layer = layer_of(inputs, isa, m_step=32)
        poison_padding(layer)
        check(results_of_layer(layer, inputs), inputs)
        emulator.reset_counts()
        layer(inputs.x[:1], inputs.topk_ids[:1], inputs.weights[:1])
        assert emulator.counts().row_use == 1 / 16, "a token alone takes more than one row of a tile"


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=mutant.name, marks=[] if place < FAST_MUTANTS else pytest.mark.slow)
        for place, mutant in enumerate(MUTANTS)
    ],
)
def test_a_broken_kernel_is_noticed(mutant: Mutant, capfd: pytest.CaptureFixture[str]) -> None:
    """By the error rule, or by the emulator, which ends the process where hardware would."""
    emulated = Emulated()
    try:
        with pytest.raises((AssertionError, BrokenProcessPool)) as failure:
            emulated(check_broken, ISA, mutant)
    finally:
        emulated.close()
    if failure.type is BrokenProcessPool:
        assert "jitmoe emulator: " in capfd.readouterr().err
    else:
        assert re.search("outside the error rule|more than one row", str(failure.value))


REFILL = """
#include "gemm/tiles.hpp"
extern "C" void refill(char* target, char value) {
  alignas(64) char scratch[1024];
  for (char& byte : scratch) byte = value;
  LOAD(0);
  for (char& byte : scratch) byte = 0x55;
  LOAD(1);
  jitmoe::amx::store<0>(target, 64);
  jitmoe::amx::store<1>(target + 1024, 64);
}
"""
OURS = "#define LOAD(tile) jitmoe::amx::load<tile>(scratch, 64)\n"
INTRINSIC = "#include <immintrin.h>\n#define LOAD(tile) _tile_loadd(tile, scratch, 64)\n"

COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]


def stores_before_loads(
    compiler: str, text: str, level: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """How many vector stores stand before the first tile load and between the two, in the machine code."""
    monkeypatch.setenv("JITMOE_CXX", compiler)
    library = compile_text(toolchain.find_compiler(), text, folder, level)
    command = ["objdump", "-d", "--no-show-raw-insn", "--disassemble=refill", str(library)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    store = re.compile(r"\sv?mov\w*\s+[^(]+,\S*\(%|memset|rep stos")
    first, second, *_ = code.split("tileload")
    return [len([line for line in part.splitlines() if store.search(line)]) for part in (first, second)]


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
@pytest.mark.parametrize("level", ["-O1", "-O2", "-O3"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_scratch_refilled_between_loads(
    compiler: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler keeps both fills: it is told that a tile load reads memory."""
    before, between = stores_before_loads(compiler, OURS + REFILL, level, tmp_path, monkeypatch)
    assert before and between


@pytest.mark.skipif(not shutil.which("objdump") or "g++" not in COMPILERS, reason="objdump or g++ is not installed")
def test_the_trap_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GCC's own intrinsic loses the first fill, which is why amx.hpp exists; if it no longer does, read its header."""
    version = toolchain.find_compiler().identity
    kept = stores_before_loads("g++", INTRINSIC + REFILL, "-O2", tmp_path, monkeypatch)
    if " 12." in version:
        assert not all(kept)


def counts_of(
    isa: str, rows: int, hidden: int, intermediate: int, rank: int
) -> tuple[emulator.Counts, emulator.Counts]:
    """What forward and backward of one expert with ``rows`` rows execute."""
    inputs = make_inputs(Case("counted", 1, hidden, intermediate, 1, rank, rows))
    layer = layer_of(inputs, isa, m_step=32)
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    emulator.reset_counts()
    out = layer(x, inputs.topk_ids, weights)
    forward = emulator.counts()
    emulator.reset_counts()
    out.backward(inputs.dout)
    return forward, emulator.counts()


def test_products_and_loads_are_as_many_as_the_sizes_say(emulated: Emulated) -> None:
    rows, hidden, intermediate = 96, 256, 128
    for counts in emulated(counts_of, ISA, rows, hidden, intermediate, 0):
        tiles = rows // 16 * (hidden // 32) * (intermediate // 16) * 3
        assert counts.tdpbf16ps == tiles
        assert counts.tile_loads == tiles, "one load a product"
        assert counts.tile_zeros == counts.tile_stores, "sums begin without a load"
        assert counts.useful_flop == tiles * PEAK
        assert counts.configurations <= 4, "one for each thread"
    few, _ = emulated(counts_of, ISA, 4, hidden, intermediate, 0)
    assert few.row_use == 4 / 16, "tile rows follow the rows"


@pytest.mark.parametrize("rank", [1, 8, 10, 11, 16, 17, 40])
def test_lora_is_as_many_products_as_the_prediction_says(emulated: Emulated, rank: int) -> None:
    """And nothing else: no product of LoRA is one of vectors, or it would not be among them."""
    sizes = Sizes(80, 96, 64, rank)
    both = emulated(counts_of, ISA, sizes.rows, sizes.hidden, sizes.intermediate, rank)
    assert [counts.tdpbf16ps for counts in both] == [
        base_products(sizes) + lora_products(sizes, backward) for backward in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "rank", "efficiency", "lora"), [(96, 0, 1.0, 0.0), (96, 8, 0.94, 0.06), (96, 32, 0.86, 0.14)]
)
def test_w2_meets_the_targets_in_counts(
    emulated: Emulated, rows: int, rank: int, efficiency: float, lora: float
) -> None:
    """One expert of W2 with its mean of 96 rows. Tiles of LoRA count as work that is not useful."""
    hidden, intermediate = 2048, 1408
    for name, counts in zip(
        ("forward", "backward"), emulated(counts_of, ISA, rows, hidden, intermediate, rank), strict=True
    ):
        useful = 6 * hidden * intermediate * rows
        products, loads = counts.tdpbf16ps, counts.tile_loads
        share = useful / (PEAK * products)
        bound = useful / 1024 / max(16 * products, 8 * loads)
        moves = (counts.tile_stores + counts.configurations) / products
        print(
            f"W2 m={rows} r={rank} {name}: {products} products, efficiency {share:.3f}, LoRA {1 - share:.3f}, "
            f"loads {loads / products:.3f}, stores and configurations {moves:.4f}, bound {bound:.3f}"
        )
        assert share >= efficiency and 1 - share <= lora
        assert bound == share, "loads cost more than products"
        assert loads <= 1.02 * products
        assert moves <= 0.02 or rank > 8


@pytest.mark.slow
def test_few_rows_use_few_rows_of_tiles(emulated: Emulated) -> None:
    forward, _ = emulated(counts_of, ISA, 4, 2048, 1408, 8)
    assert forward.row_use < 0.3
