"""The emulator against an independent model, one real instruction at a time, all registers compared.

AVX512-BF16 is also compared with the CPU's own instructions where it has them.
"""

import ctypes
import errno
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from emulator_model import INDEFINITE, SIGNS, Array, RefusedError, Tiles, convert, fma, is_nan, masked, vdpbf16ps

from jitmoe.errors import IsaError
from jitmoe.jit import emulator, programs, toolchain

DRIVER = Path(__file__).with_name("emulator_driver.cpp")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
CPU_FLAGS = frozenset(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())

needs_avx512 = pytest.mark.skipif(
    not {"avx512f", "avx512bw", "avx512vl"} <= CPU_FLAGS, reason="the instructions' registers need AVX-512"
)

GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
REGISTERS = np.dtype([("zmm", "u1", (32, 64)), ("k", "u8", (8,)), ("general", "u8", (16,)), ("mxcsr", "u8")])
DEFAULT_MXCSR = 0x1F80
TDP = ("tdpbf16ps", *SIGNS)


class Assembly:
    """All instructions of this file, collected while it is imported and assembled once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> str:
        if line not in self.lines:
            self.lines.append(line)
        return line

    def source(self) -> str:
        stubs = (
            f'  ".globl stub_{n}, trapped_{n}\\nstub_{n}: {line}\\nret\\ntrapped_{n}: ud2\\n{line}\\nret\\n"'
            for n, line in enumerate(self.lines)
        )
        return "asm(\n" + "\n".join(stubs) + ");\n"


asm = Assembly()


@dataclass(frozen=True)
class Address:
    """A memory operand; ``point`` sets the registers so that base + displacement is an address."""

    base: str | None = "rax"
    index: str | None = None
    scale: int = 1
    displacement: int = 0

    @property
    def text(self) -> str:
        base = f"%{self.base}" if self.base else ""
        index = f",%{self.index},{self.scale}" if self.index else ""
        return f"{self.displacement or ''}({base}{index})"

    def point(self, registers: Array, address: int, index: int = 0) -> None:
        """Point at ``address``, with ``index`` in the index register."""
        if self.index:
            registers["general"][GENERAL.index(self.index)] = index % 2**64
        if self.base:
            registers["general"][GENERAL.index(self.base)] = address - self.displacement


TILE_ADDRESS = Address("rax", "rbx")
TILE_ADDRESSES = [
    TILE_ADDRESS,
    Address("rbp", "r12", 2, -8),
    Address("r13", "r13", 1),
    Address("r12", "r15", 4, 0x12345),
    Address("rdi", "rsi", 8, -0x4000),
    Address("r13", "rbp", 1, 0x7F),
    Address("rcx", None),
    Address("r12", None, 1, -128),
]
PLAIN_ADDRESSES = [
    Address("rax"),
    Address("rbp"),
    Address("r13", None, 1, 0x80),
    Address("r12", None, 1, -64),
    Address("rbx", "rcx", 2, 16),
    Address("r9", "r12", 8, -0x10000),
]

LDTILECFG, STTILECFG, TILERELEASE = asm("ldtilecfg (%rax)"), asm("sttilecfg (%rax)"), asm("tilerelease")
LDTILECFG_FS, LDTILECFG_RIP = asm("ldtilecfg %fs:(%rax)"), asm("ldtilecfg driver_operand(%rip)")
TILEZERO = [asm(f"tilezero %tmm{tile}") for tile in range(8)]


def tile_load(tile: int, address: Address = TILE_ADDRESS, hint: str = "") -> str:
    return asm(f"tileloadd{hint} {address.text}, %tmm{tile}")


def tile_store(tile: int, address: Address = TILE_ADDRESS) -> str:
    return asm(f"tilestored %tmm{tile}, {address.text}")


def product(name: str, c: int, a: int, b: int) -> str:
    """Text of c += a b; encoded here where the assembler would refuse equal operands."""
    if len({c, a, b}) == 3:
        return asm(f"{name} %tmm{b}, %tmm{a}, %tmm{c}")
    opcode, prefix = {"tdpbf16ps": (0x5C, 2), "tdpbssd": (0x5E, 3), "tdpbsud": (0x5E, 2), "tdpbusd": (0x5E, 1)}.get(
        name, (0x5E, 0)
    )
    return asm(f".byte 0xc4, 0xe2, {(~b & 15) << 3 | prefix:#x}, {opcode:#x}, {0xC0 | c << 3 | a:#x}")


LOADS = [[tile_load(tile, hint=hint) for tile in range(8)] for hint in ("", "t1")]
STORES = [tile_store(tile) for tile in range(8)]
OPERANDS = [(0, 1, 2), (7, 6, 5), (3, 0, 7), (5, 2, 4), (1, 1, 2), (6, 3, 6), (4, 2, 2)]
PRODUCTS = {(name, c, a, b): product(name, c, a, b) for name in TDP for c, a, b in OPERANDS}
ADDRESS_LOADS = [(address, tile_load(3, address)) for address in TILE_ADDRESSES]
ADDRESS_STORES = [(address, tile_store(3, address)) for address in TILE_ADDRESSES]
ADDRESS_CONFIGS = [
    (address, asm(f"ldtilecfg {address.text}"), asm(f"sttilecfg {address.text}")) for address in PLAIN_ADDRESSES
]

# Encodings that hardware refuses, by what the message must say.
REFUSED_ENCODINGS = [
    ("TILELOADD", "SIB", asm(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x08")),
    ("TILELOADD", "tmm8 does not exist", asm(".byte 0xc4, 0x62, 0x7b, 0x4b, 0x04, 0x18")),
    ("TILELOADD", "vvvv", asm(".byte 0xc4, 0xe2, 0x73, 0x4b, 0x04, 0x18")),
    ("TILESTORED", "VEX.L", asm(".byte 0xc4, 0xe2, 0x7e, 0x4b, 0x04, 0x18")),
    ("TDPBF16PS", "reserved", asm(".byte 0xc4, 0xe2, 0xea, 0x5c, 0xc1")),
    ("TDPBF16PS", "tmm10 does not exist", asm(".byte 0xc4, 0xe2, 0x2a, 0x5c, 0xc1")),
    ("TDPBF16PS", "tmm9 does not exist", asm(".byte 0xc4, 0xc2, 0x6a, 0x5c, 0xc1")),
    ("TILEZERO", "vvvv", asm(".byte 0xc4, 0xe2, 0x73, 0x49, 0xc0")),
    ("LDTILECFG", "%gs", asm("ldtilecfg %gs:(%rax)")),
    ("VDPBF16PS", "broadcast from a register", asm(".byte 0x62, 0xf2, 0x6e, 0x58, 0x52, 0xcb")),
    ("VDPBF16PS", "zeroing without a mask", asm(".byte 0x62, 0xf2, 0x6e, 0xc8, 0x52, 0xcb")),
    ("VDPBF16PS", "vector length", asm(".byte 0x62, 0xf2, 0x6e, 0x68, 0x52, 0xcb")),
    ("VDPBF16PS", "reserved", asm(".byte 0x62, 0xf2, 0xee, 0x48, 0x52, 0xcb")),
    ("VCVTNEPS2BF16", "vvvv", asm(".byte 0x62, 0xf2, 0x6e, 0x48, 0x72, 0xcb")),
]

BF16_NAMES = ("vdpbf16ps", "vcvtne2ps2bf16", "vcvtneps2bf16")


@dataclass(frozen=True)
class Form:
    """One form of an AVX512-BF16 instruction: width in bytes, registers, mask, memory."""

    name: str
    width: int = 64
    destination: int = 1
    first: int = 2
    second: int = 3
    mask: int = 0
    zeroing: bool = False
    memory: Address | None = None
    broadcast: bool = False

    @property
    def text(self) -> str:
        vector = {16: "%xmm", 32: "%ymm", 64: "%zmm"}
        short = self.name == "vcvtneps2bf16"
        operand = f"{vector[self.width]}{self.second}"
        name = self.name
        if self.memory:
            operand = self.memory.text + (f"{{1to{self.width // 4}}}" if self.broadcast else "")
            name += {16: "x", 32: "y", 64: ""}[self.width] if short and not self.broadcast else ""
        operands = [operand] if short else [operand, f"{vector[self.width]}{self.first}"]
        destination = f"{vector[max(16, self.width // 2) if short else self.width]}{self.destination}"
        mask = (f"{{%k{self.mask}}}" if self.mask else "") + ("{z}" if self.zeroing else "")
        return f"{name} {', '.join(operands)}, {destination}{mask}"


def forms(name: str) -> Iterator[Form]:
    for width in (16, 32, 64):
        yield Form(name, width)
        yield Form(name, width, destination=31, first=28, second=19)
        yield Form(name, width, destination=12, first=17, second=9, mask=7, zeroing=True)
        yield Form(name, width, destination=20, first=20, second=20, mask=1)
        yield Form(name, width, memory=Address("rax", None, 1, -2 * width))
        yield Form(name, width, memory=Address("rbx", "r14", 4, 3), mask=2)
        yield Form(name, width, memory=Address("r13", None, 1, 4), broadcast=True, destination=30)
        yield Form(name, width, memory=Address("rbp", "r12", 8, 0x1000), broadcast=True, mask=5, zeroing=True)


FORMS = [form for name in BF16_NAMES for form in forms(name)]
for bf16_form in FORMS:
    asm(bf16_form.text)
IMAGE_FORMS = [form for form in FORMS if form.width == 64 and not form.memory]
STACK_FORM = asm("sub $72, %rsp; vmovups %zmm3, 8(%rsp); ud2; vdpbf16ps 8(%rsp), %zmm2, %zmm1; add $72, %rsp")
RIP_FORM = asm("vdpbf16ps driver_operand(%rip), %zmm2, %zmm1")
UNKNOWN = asm("ud2")
SYSCALL_BEFORE_RELEASE = asm("syscall; tilerelease")


class Machine:
    """The emulator and the driver, loaded; runs instructions that were given to ``asm``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.emulator_path = programs.emulator().path
        self.emulator = ctypes.CDLL(str(self.emulator_path))
        self.driver = ctypes.CDLL(str(path))
        for name in ("driver_run", "driver_last_error"):
            getattr(self.driver, name).restype = ctypes.c_char_p
        for name in ("driver_error_hook", "driver_operand_address"):
            getattr(self.driver, name).restype = ctypes.c_void_p
        self.driver.driver_step.restype = ctypes.c_int64
        assert self.driver.driver_install(self.emulator.jitmoe_emulator_step) == 0
        emulator.install()

    def address(self, line: str, trapped: bool = False) -> int:
        """Where the code of ``line`` starts."""
        name = f"{'trapped' if trapped else 'stub'}_{asm.lines.index(line)}"
        return ctypes.cast(getattr(self.driver, name), ctypes.c_void_p).value or 0

    def set_operand(self, value: Array) -> None:
        """Write the 64 bytes that instructions address relative to rip."""
        ctypes.memmove(self.driver.driver_operand_address(), value.ctypes.data, 64)

    def run(self, line: str, registers: Array, vectors: bool = False, native: bool = False) -> str:
        """Emulate (or execute) ``line``; returns the emulator's complaint, empty if there is none."""
        feature = "avx512_bf16" if "bf16" in line and "tdp" not in line else "amx_tile"
        code = self.address(line, trapped=feature in CPU_FLAGS and not native)
        message = self.driver.driver_run(ctypes.c_void_p(code), registers.ctypes.data_as(ctypes.c_void_p), int(vectors))
        return message.decode()

    def tile(self, line: str, memory: Array | None = None, stride: int = 0) -> str:
        """Emulate an AMX instruction whose memory operand, if any, is TILE_ADDRESS or (%rax)."""
        registers = new_registers()
        if memory is not None:
            TILE_ADDRESS.point(registers, memory.ctypes.data, stride)
        before = registers.copy()
        message = self.run(line, registers)
        assert registers == before
        return message


def new_registers() -> Array:
    registers = np.zeros((), REGISTERS)
    registers["general"] = 0x1111_2222_3333_0000 + np.arange(16, dtype=np.uint64)
    registers["mxcsr"] = DEFAULT_MXCSR
    return registers


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "emulator_stubs.inc").write_text(asm.source())
    source = folder / DRIVER.name
    source.write_text(DRIVER.read_text())
    library = folder / "driver.so"
    toolchain.compile(toolchain.find_compiler(), source, library, FLAGS, folder, 120.0, folder / "log")
    return Machine(library)


@pytest.fixture
def machine(loaded: Machine) -> Iterator[Machine]:
    """The machine with this thread's tiles released, and complaints kept instead of fatal."""
    hook = loaded.emulator.jitmoe_emulator_on_error
    hook(ctypes.c_void_p(loaded.driver.driver_error_hook()))
    loaded.tile(TILERELEASE)
    emulator.reset_counts()
    yield loaded
    loaded.tile(TILERELEASE)
    hook(None)


def configuration(shapes: dict[int, tuple[int, int]], start_row: int = 0) -> Array:
    """The 64 bytes for tiles of (rows, bytes per row)."""
    config = np.zeros(64, np.uint8)
    config[0], config[1] = 1, start_row
    for tile, (rows, row_bytes) in shapes.items():
        config[48 + tile] = rows
        config[16 + 2 * tile : 18 + 2 * tile] = row_bytes & 255, row_bytes >> 8
    return config


SPECIAL_BF16 = (
    *(0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x8080, 0x0081, 0x2000, 0xA001, 0x1F80, 0x7F7F, 0xFF7F, 0x5F80),
    *(0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFC1, 0x3F80, 0xBF80, 0x4B80, 0x0B80),
)


def random_bf16(rng: np.random.Generator, shape: tuple[int, ...], extreme: float) -> Array:
    """Normal numbers, with a share of denormals, NaN, infinities, zeros of both signs, huge and tiny ones."""
    values = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    special = np.array(SPECIAL_BF16, np.uint16)
    return np.where(rng.random(shape) < extreme, rng.choice(special, shape), values).astype(np.uint16)


def random_float32(rng: np.random.Generator, shape: tuple[int, ...], extreme: float) -> Array:
    """As :func:`random_bf16`, with random low halves, among them ties."""
    low = rng.choice(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234], np.uint32), shape)
    return (random_bf16(rng, shape, extreme).astype(np.uint32) << 16 | low).astype(np.uint32)


def random_bytes(rng: np.random.Generator, size: int, extreme: float) -> Array:
    return random_bf16(rng, (size // 2,), extreme).view(np.uint8)


def same_lanes(actual: Array, expected: Array) -> bool:
    """Equal float32 bits, where any quiet NaN equals any other."""
    both_nan = is_nan(actual) & is_nan(expected) & (actual & 0x00400000 != 0)
    return bool(((actual == expected) | both_nan).all())


def exact_fma(a: int, b: int, c: int) -> int:
    """fma of finite float32 bits, by rational numbers."""

    def value(bits: int) -> tuple[int, Fraction]:
        sign, exponent, mantissa = bits >> 31, bits >> 23 & 255, bits & 0x7FFFFF
        magnitude = Fraction(mantissa | 1 << 23) * Fraction(2) ** (exponent - 150) if exponent else Fraction(0)
        return sign, -magnitude if sign else magnitude

    (sign_a, x), (sign_b, y), (sign_c, z) = value(a), value(b), value(c)
    total = x * y + z
    if total == 0:
        exact_cancel = z != 0 or (sign_a ^ sign_b) != sign_c
        return 0 if exact_cancel else sign_c << 31
    sign, magnitude = int(total < 0), abs(total)
    exponent = 0
    while magnitude >= 2**24:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 2**23:
        magnitude, exponent = magnitude * 2, exponent - 1
    mantissa = round(magnitude)  # a Fraction rounds half to even
    if mantissa == 1 << 24:
        mantissa, exponent = 1 << 23, exponent + 1
    biased = exponent + 150
    if biased < 1:
        return sign << 31
    return sign << 31 | (0x7F800000 if biased > 254 else biased << 23 | mantissa & 0x7FFFFF)


def test_model_rounds_once() -> None:
    rng = np.random.default_rng(0)
    for extreme in (0.1, 0.9):
        a, b = (random_bf16(rng, (3000,), extreme).astype(np.uint32) << 16 for _ in range(2))
        c = random_float32(rng, (3000,), extreme)
        # Sums near the limit of float32's denormals, and near half an ulp.
        c[::3] = rng.integers(0x00800000, 0x01800000, 1000)
        a[::3], b[::3] = rng.integers(0x2000, 0x2080, (2, 1000)) << 16
        finite = (np.stack([a, b, c]) & 0x7F800000 != 0x7F800000).all(axis=0)
        actual = fma(a, b, c)
        for i in np.flatnonzero(finite):
            assert actual[i] == exact_fma(int(a[i]), int(b[i]), int(c[i])), hex(a[i]) + hex(b[i]) + hex(c[i])


@pytest.mark.parametrize("name", TDP)
@pytest.mark.parametrize("extreme", [0.0, 0.03, 0.7])
def test_product_of_every_size(machine: Machine, name: str, extreme: float) -> None:
    rng = np.random.default_rng(1)
    for rows in range(1, 17):
        columns, depth = int(rng.integers(1, 17)), int(rng.integers(1, 17))
        if rows in (1, 16):
            columns = depth = 16
        model, (c, a, b) = Tiles(), OPERANDS[rows % 4]
        config = configuration({c: (rows, 4 * columns), a: (rows, 4 * depth), b: (depth, 4 * columns)})
        assert not machine.tile(LDTILECFG, config)
        model.ldtilecfg(config)
        for tile in (c, a, b):
            memory = random_bytes(rng, 1024, extreme)
            model.tileload(tile, memory, 0, 64)
            assert not machine.tile(LOADS[0][tile], memory, 64)
        for _ in range(2):
            model.product(name, c, a, b)
            assert not machine.tile(PRODUCTS[name, c, a, b])
        assert_same_tile(machine, model, c, name == "tdpbf16ps")


def assert_same_tile(machine: Machine, model: Tiles, tile: int, floats: bool = False) -> None:
    """Compare all 1024 bytes around what the tile stores."""
    actual, expected = np.full((2, 1024), 0xEE, np.uint8)
    assert not machine.tile(STORES[tile], actual, 64)
    model.tilestore(tile, expected, 0, 64)
    if floats:
        assert same_lanes(actual.view(np.uint32), expected.view(np.uint32))
    else:
        assert (actual == expected).all()


def test_nan_infinity_and_signed_zero_come_out(machine: Machine) -> None:
    """The extreme operands above must not all end as NaN: each kind of result by itself."""
    one, two_127 = 0x3F80, 0x7F00
    cases = {  # pair of a, pair of b, c -> result
        (0x7F80, 0, one, one, 0xFF800000): INDEFINITE,
        (0x7F80, 0, one, one, 0x3F800000): 0x7F800000,
        (0x7F80, 0, 0, one, 0): INDEFINITE,
        (two_127, two_127, one, one, 0): 0x7F800000,  # each chain is finite, their sum is not
        (two_127, 0xFF00, 0x4000, 0x4000, 0): INDEFINITE,  # +inf and -inf from the two chains
        (0x8000, 0x8000, one, one, 0x80000000): 0,  # chains start at +0
        (1, 0x7F, two_127, two_127, 0x80000001): 0,  # denormals in a and c are zeros
        (0x0080, 0, 0x3F00, 0, 0): 0,  # a result below the normal numbers is zero
        (0x8080, 0, 0x3F00, 0, 0x80000000): 0,
        (0x3F81, 0x3F81, 0x3F81, 0xBF81, 0x3F800000): 0x3F800000,
    }
    machine.tile(LDTILECFG, configuration({0: (1, 4), 1: (1, 4), 2: (1, 4)}))
    for (a_even, a_odd, b_even, b_odd, c), expected in cases.items():
        for tile, bits in enumerate((c, a_even | a_odd << 16, b_even | b_odd << 16)):
            machine.tile(LOADS[0][tile], np.array([bits], np.uint32))
        assert not machine.tile(PRODUCTS["tdpbf16ps", 0, 1, 2])
        result = np.zeros(1, np.uint32)
        machine.tile(STORES[0], result)
        assert same_lanes(result, np.array([expected], np.uint32)), f"{result[0]:#x} is not {expected:#x}"


def test_product_sums_in_the_order_of_the_manual(machine: Machine) -> None:
    """Even and odd chains by themselves, then their sum, then C: any other order gives other bits here."""
    big, small = 0x4B80, 0x3F80  # 2^24 absorbs a 1
    machine.tile(LDTILECFG, configuration({0: (1, 4), 1: (1, 8), 2: (2, 4)}))
    cases = {
        ((big, small), (0xCB80, small), 0): 2.0,  # evens cancel, odds stay: 2
        ((big, 0xCB80), (small, small), 0): 1.0,  # 2^24 + 1 is 2^24 in the even chain, -2^24 + 1 exact in the odd
        ((small, 0), (0, 0), big << 16): 2.0**24,
        ((small, small), (0, 0), big << 16): 2.0**24 + 2,  # 1 + 1 first, then C
    }
    for (first, second, c), expected in cases.items():
        a = np.array([*first, *second], np.uint16)
        b = np.full((2, 2), small, np.uint16)
        machine.tile(LOADS[0][0], np.array([c], np.uint32))
        machine.tile(LOADS[0][1], a)
        machine.tile(LOADS[0][2], b, 4)
        machine.tile(PRODUCTS["tdpbf16ps", 0, 1, 2])
        result = np.zeros(1, np.float32)
        machine.tile(STORES[0], result)
        assert result[0] == expected


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(machine: Machine, seed: int) -> None:
    """Any sequence of AMX instructions, most of them legal, leaves what it leaves in the model."""
    rng, model = np.random.default_rng(seed), Tiles()
    refusals = 0
    for _ in range(150):
        line, apply, memory, stride = random_instruction(rng, model)
        expected_memory = None if memory is None else memory.copy()
        message = machine.tile(line, memory, stride)
        try:
            apply(expected_memory)
            assert not message
        except RefusedError as refused:
            refusals += 1
            assert str(refused) in message
        if memory is not None and expected_memory is not None:
            assert (memory == expected_memory).all()
    if model.config is not None:
        assert_same_configuration(machine, model)
        for tile in range(8):
            rows, row_bytes = model.config[48 + tile], model.config[16 + 2 * tile]
            if rows and row_bytes % 4 == 0:
                assert_same_tile(machine, model, tile, floats=True)
    assert refusals < 100


Step = tuple[str, Callable[[Array | None], object], Array | None, int]


def random_instruction(rng: np.random.Generator, model: Tiles) -> Step:
    kind = rng.choice(
        ["configure", "load", "store", "zero", "product", "release"], p=[0.06, 0.4, 0.1, 0.04, 0.39, 0.01]
    )
    tile, stride = int(rng.integers(8)), int(rng.choice([64, 4, 0, 77]))
    if kind == "configure" or (model.config is None and rng.random() < 0.5):
        return LDTILECFG, lambda memory: model.ldtilecfg(memory), random_configuration(rng), 0
    if kind == "load":
        memory = random_bytes(rng, 16 * 80, 0.02)
        return LOADS[tile % 2][tile], lambda memory: model.tileload(tile, memory, 0, stride), memory, stride
    if kind == "store":
        memory = random_bytes(rng, 16 * 80, 0.0)
        return STORES[tile], lambda memory: model.tilestore(tile, memory, 0, stride), memory, stride
    if kind == "zero":
        return TILEZERO[tile], lambda _: model.tilezero(tile), None, 0
    if kind == "release":
        return TILERELEASE, lambda _: model.tilerelease(), None, 0
    # Integer sums on float tiles and the reverse are as legal as any; NaN of unlike payload would spread.
    name, operands = str(rng.choice(TDP[1:])), OPERANDS[int(rng.integers(len(OPERANDS)))]
    return PRODUCTS[name, *operands], lambda _: model.product(name, *operands), None, 0


def random_configuration(rng: np.random.Generator) -> Array:
    """One in which most products fit: all depths and widths are equal; sometimes one that is refused."""
    rows, quads = int(rng.integers(1, 17)), int(rng.integers(1, 17))
    square = rows if rng.random() < 0.7 else quads
    config = configuration({tile: (rows, 4 * square) for tile in range(8) if rng.random() < 0.95})
    if rng.random() < 0.3:
        config[int(rng.integers(64))] = int(rng.integers(256))
    return config


def assert_same_configuration(machine: Machine, model: Tiles) -> None:
    stored = np.full(64, 0xEE, np.uint8)
    assert not machine.tile(STTILECFG, stored)
    assert (stored == model.sttilecfg()).all()


@pytest.mark.parametrize(("address", "line"), ADDRESS_LOADS, ids=[line for _, line in ADDRESS_LOADS])
def test_tile_load_addresses(machine: Machine, address: Address, line: str) -> None:
    check_tile_address(machine, address, line, store=False)


@pytest.mark.parametrize(("address", "line"), ADDRESS_STORES, ids=[line for _, line in ADDRESS_STORES])
def test_tile_store_addresses(machine: Machine, address: Address, line: str) -> None:
    check_tile_address(machine, address, line, store=True)


def check_tile_address(machine: Machine, address: Address, line: str, store: bool) -> None:
    """Positive and negative strides, through every register that can be base or index."""
    rng, model = np.random.default_rng(3), Tiles()
    config = configuration({3: (7, 36)})
    model.ldtilecfg(config)
    machine.tile(LDTILECFG, config)
    initial = random_bytes(rng, 1024, 0.0)
    machine.tile(LOADS[0][3], initial, 64)
    model.tileload(3, initial, 0, 64)
    for index in (40, -40) if address.base != address.index else (0,):
        memory = random_bytes(rng, 8192, 0.0)
        expected = memory.copy()
        stride = index * address.scale if address.index else 0
        start = 4096
        registers = new_registers()
        address.point(registers, memory.ctypes.data + start, index)
        if address.base == address.index:
            # One register is both: its value is the stride too, so only one row may be configured.
            one_row = configuration({3: (1, 36)})
            model.ldtilecfg(one_row)
            machine.tile(LDTILECFG, one_row)
        before = registers.copy()
        assert not machine.run(line, registers)
        assert registers == before
        move = model.tilestore if store else model.tileload
        move(3, expected, start, stride)
        assert (memory == expected).all()
        assert_same_tile(machine, model, 3)


@pytest.mark.parametrize(("address", "load", "store"), ADDRESS_CONFIGS, ids=[load for _, load, _ in ADDRESS_CONFIGS])
def test_configuration_addresses(machine: Machine, address: Address, load: str, store: str) -> None:
    memory, offset, index = np.zeros(256, np.uint8), 64, 0x7FFF_0000_0007
    config = configuration({0: (3, 12), 7: (16, 64)}, start_row=2)
    memory[offset : offset + 64] = config
    registers = new_registers()
    target = memory.ctypes.data + offset - (index * address.scale if address.index else 0)
    address.point(registers, target % 2**64, index)
    assert not machine.run(load, registers)
    memory[:] = 0xEE
    assert not machine.run(store, registers)
    assert (memory[offset : offset + 64] == config).all()
    assert (np.delete(memory, np.arange(offset, offset + 64)) == 0xEE).all()


def test_configuration_relative_to_rip_and_fs(machine: Machine) -> None:
    config = configuration({5: (9, 24)})
    machine.set_operand(config)
    assert not machine.tile(LDTILECFG_RIP)
    stored = np.zeros(64, np.uint8)
    machine.tile(STTILECFG, stored)
    assert (stored == config).all()

    machine.tile(TILERELEASE)
    registers = new_registers()
    # pthread_self() is what %fs stands for.
    thread = ctypes.CDLL(None).pthread_self
    thread.restype = ctypes.c_uint64
    Address("rax").point(registers, (config.ctypes.data - thread()) % 2**64)
    assert not machine.run(LDTILECFG_FS, registers)
    machine.tile(STTILECFG, stored)
    assert (stored == config).all()


def test_initial_state_stores_zeros(machine: Machine) -> None:
    stored = np.full(64, 0xEE, np.uint8)
    assert not machine.tile(STTILECFG, stored)
    assert not stored.any()
    machine.tile(LDTILECFG, configuration({0: (4, 4)}))
    palette_0 = configuration({0: (99, 999)})
    palette_0[0] = 0
    assert not machine.tile(LDTILECFG, palette_0), "palette 0 is the initial state, whatever follows it"
    assert "no tiles are configured" in machine.tile(TILEZERO[0])


def test_configuring_clears_tiles(machine: Machine) -> None:
    config = configuration({0: (16, 64)})
    machine.tile(LDTILECFG, config)
    machine.tile(LOADS[0][0], np.full(1024, 7, np.uint8), 64)
    machine.tile(LDTILECFG, config)
    stored = np.full(1024, 0xEE, np.uint8)
    machine.tile(STORES[0], stored, 64)
    assert not stored.any()


def bad_configurations() -> Iterator[tuple[str, Array]]:
    for name, offset, value in (
        ("palette 2", 0, 2),
        ("palette 255", 0, 255),
        ("reserved", 2, 1),
        ("reserved", 15, 128),
        ("reserved", 32, 1),
        ("reserved", 47, 1),
        ("reserved", 56, 1),
        ("reserved", 63, 1),
        ("tmm0 cannot have 17 rows", 48, 17),
        ("tmm0 cannot have 4 rows of 65 bytes", 16, 65),
        ("tmm0 cannot have 4 rows of 0 bytes", 16, 0),
        ("tmm0 cannot have 4 rows of 264 bytes", 17, 1),
        ("tmm3 cannot have 1 rows of 0 bytes", 51, 1),
    ):
        config = configuration({0: (4, 8)})
        config[offset] = value
        yield name, config


@pytest.mark.parametrize(("name", "config"), list(bad_configurations()))
def test_bad_configuration_is_refused(machine: Machine, name: str, config: Array) -> None:
    with pytest.raises(RefusedError, match="#GP"):
        Tiles().ldtilecfg(config)
    message = machine.tile(LDTILECFG, config)
    assert name in message
    assert "#GP" in message
    assert "no tiles are configured" in machine.tile(TILEZERO[0]), "a refused configuration is not loaded"


@pytest.mark.parametrize("line", [*LOADS[0][:1], *LOADS[1][:1], STORES[0], TILEZERO[0], PRODUCTS["tdpbssd", 0, 1, 2]])
def test_use_without_configuration_is_refused(machine: Machine, line: str) -> None:
    memory = np.full(1024, 0xEE, np.uint8)
    needs_memory = memory if "tmm0" in line and "(" in line else None
    assert "no tiles are configured on this thread" in machine.tile(line, needs_memory, 64)
    machine.tile(LDTILECFG, configuration({tile: (4, 16) for tile in range(8)}))
    assert not machine.tile(line, needs_memory, 64)
    machine.tile(TILERELEASE)
    message = machine.tile(line, needs_memory, 64)
    name, code = line.split()[0].upper(), machine.address(line)
    assert f"emulator: {name} at {code:#x} ({machine.path}+0x" in message
    assert "#UD, no tiles are configured" in message


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ({0: (4, 16), 1: (5, 16), 2: (4, 16)}, "do not fit: C tmm0 4x16, A tmm1 5x16, B tmm2 4x16"),
        ({0: (4, 16), 1: (4, 16), 2: (5, 16)}, "do not fit"),
        ({0: (4, 16), 1: (4, 16), 2: (4, 20)}, "do not fit"),
        ({0: (4, 16), 1: (4, 18), 2: (4, 16)}, "do not fit"),
        ({0: (4, 18), 1: (4, 16), 2: (4, 18)}, "do not fit"),
        ({0: (4, 16), 1: (4, 16)}, "tmm2 has no rows"),
        ({0: (4, 16), 2: (4, 16)}, "tmm1 has no rows"),
        ({1: (4, 16), 2: (4, 16)}, "tmm0 has no rows"),
    ],
)
@pytest.mark.parametrize("name", TDP)
def test_products_that_do_not_fit_are_refused(
    machine: Machine, name: str, shapes: dict[int, tuple[int, int]], complaint: str
) -> None:
    machine.tile(LDTILECFG, configuration(shapes))
    message = machine.tile(PRODUCTS[name, 0, 1, 2])
    assert f"{name.upper()} at" in message
    assert complaint in message
    assert emulator.counts().products == 0


def test_loads_and_stores_check_their_tile(machine: Machine) -> None:
    memory = np.full(1024, 0xEE, np.uint8)
    machine.tile(LDTILECFG, configuration({0: (4, 18), 1: (4, 16)}, start_row=4))
    for tile, complaint in ((0, "rows of 18 bytes"), (1, "start_row is 4"), (2, "tmm2 has no rows")):
        assert complaint in machine.tile(LOADS[0][tile], memory, 64)
        assert complaint in machine.tile(STORES[tile], memory, 64)
    assert (memory == 0xEE).all()


def test_start_row_resumes_loads_and_stores(machine: Machine) -> None:
    config, model = configuration({2: (6, 20)}, start_row=3), Tiles()
    machine.tile(LDTILECFG, config)
    model.ldtilecfg(config)
    memory = random_bytes(np.random.default_rng(5), 1024, 0.0)
    machine.tile(LOADS[0][2], memory, 64)
    model.tileload(2, memory, 0, 64)
    assert_same_tile(machine, model, 2)
    assert_same_configuration(machine, model)


@pytest.mark.parametrize("line", [TILEZERO[0], STORES[0], *(PRODUCTS[name, 0, 1, 2] for name in TDP)])
def test_start_row_ends_with_the_instruction(machine: Machine, line: str) -> None:
    machine.tile(LDTILECFG, configuration({tile: (16, 64) for tile in range(3)}, start_row=3))
    assert not machine.tile(line, np.zeros(1024, np.uint8), 64)
    stored = np.zeros(64, np.uint8)
    machine.tile(STTILECFG, stored)
    assert stored[1] == 0


@pytest.mark.parametrize(("name", "complaint", "line"), REFUSED_ENCODINGS)
def test_reserved_encodings_are_refused(machine: Machine, name: str, complaint: str, line: str) -> None:
    """Run as bytes with the emulator alone: hardware would give SIGILL for most of them."""
    machine.tile(LDTILECFG, configuration({tile: (4, 16) for tile in range(8)}))
    image = np.zeros(4096, np.uint8)
    registers = new_registers()
    step(machine, image, line, registers)
    message = machine.driver.driver_last_error().decode()
    assert f"{name} at {machine.address(line):#x}" in message
    assert complaint in message


def step(machine: Machine, image: Array, line: str, registers: Array) -> int:
    """Emulate ``line`` on an XSAVE image; returns how far RIP moved."""
    pointers = (image.ctypes.data, machine.address(line), registers.ctypes.data)
    return int(machine.driver.driver_step(*map(ctypes.c_void_p, pointers)))


def test_each_thread_has_its_own_tiles(machine: Machine) -> None:
    """Different configurations at once, every instruction of all threads interleaved."""
    threads, barrier = 4, threading.Barrier(4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            rng, model = np.random.default_rng(number), Tiles()
            rows, columns, depth = 3 + number, 16 - 3 * number, 5 + 2 * number
            shapes = {0: (rows, 4 * columns), 1: (rows, 4 * depth), 2: (depth, 4 * columns)}
            config = configuration(shapes)
            barrier.wait(30)
            assert "no tiles are configured" in machine.tile(TILEZERO[0])
            machine.tile(LDTILECFG, config)
            model.ldtilecfg(config)
            for _ in range(5):
                for tile in range(3):
                    memory = random_bytes(rng, 1024, 0.0)
                    barrier.wait(30)
                    machine.tile(LOADS[0][tile], memory, 64)
                    model.tileload(tile, memory, 0, 64)
                barrier.wait(30)
                machine.tile(PRODUCTS["tdpbf16ps", 0, 1, 2])
                model.product("tdpbf16ps", 0, 1, 2)
                barrier.wait(30)
                assert_same_tile(machine, model, 0, floats=True)
            machine.tile(TILERELEASE)
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


def test_threads_come_and_go(machine: Machine) -> None:
    """More threads in a row than there are states: release gives the state back."""
    config = configuration({0: (16, 64)})

    def work() -> None:
        assert not machine.tile(LDTILECFG, config)
        assert not machine.tile(TILERELEASE)

    machine.tile(LDTILECFG, config)
    for _ in range(1100):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not machine.tile(TILEZERO[0]), "the state of this thread was not given to another"


class StackT(ctypes.Structure):
    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


def test_thread_with_a_small_alternate_stack(machine: Machine) -> None:
    """2 KB, the old MINSIGSTKSZ: too small for a signal frame with AVX-512 registers."""
    done = []

    def work() -> None:
        memory = ctypes.create_string_buffer(2048)
        stack = StackT(ctypes.cast(memory, ctypes.c_void_p), 0, 2048)
        if ctypes.CDLL(None, use_errno=True).sigaltstack(ctypes.byref(stack), None):
            done.append(ctypes.get_errno())
            return
        assert not machine.tile(LDTILECFG, configuration({0: (16, 64)}))
        assert not machine.tile(TILERELEASE)
        disable = StackT(None, 2, 0)
        ctypes.CDLL(None).sigaltstack(ctypes.byref(disable), None)
        done.append(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    # A kernel that refuses such a stack keeps the fault from happening at all.
    assert done in ([0], [errno.ENOMEM])


def test_counts(machine: Machine) -> None:
    rows, columns, depth = 5, 7, 3
    config = configuration({0: (rows, 4 * columns), 1: (rows, 4 * depth), 2: (depth, 4 * columns), 3: (4, 4)})
    memory = np.zeros(1024, np.uint8)
    for line in (LDTILECFG, LDTILECFG, STTILECFG):
        machine.tile(line, config)
    for repeat, name in enumerate(TDP, 1):
        for _ in range(repeat):
            machine.tile(PRODUCTS[name, 0, 1, 2])
    machine.tile(PRODUCTS["tdpbf16ps", 3, 0, 7])  # refused: counts nothing
    for line in (*LOADS[0][:3], LOADS[1][3], STORES[0], STORES[1]):
        machine.tile(line, memory, 64)
    machine.tile(TILEZERO[3])
    machine.tile(TILERELEASE)
    assert emulator.counts() == emulator.Counts(
        tdpbf16ps=1,
        tdpbssd=2,
        tdpbsud=3,
        tdpbusd=4,
        tdpbuud=5,
        tile_loads=4,
        tile_stores=2,
        tile_zeros=1,
        configurations=2,
        configuration_stores=1,
        releases=1,
        avx512_bf16=0,
        useful_rows=15 * rows,
        useful_flop=2 * rows * columns * depth * (2 * 1 + 4 * 14),
    )
    assert emulator.counts().products == 15
    assert emulator.counts().row_use == rows / 16
    emulator.reset_counts()
    assert emulator.counts() == emulator.Counts(*[0] * 14)
    assert emulator.counts().row_use == 0.0


@needs_avx512
@pytest.mark.parametrize("form", FORMS, ids=[form.text for form in FORMS])
def test_avx512_bf16(machine: Machine, form: Form) -> None:
    """All vector, mask and general registers and MXCSR afterwards, for the model, the emulator, the CPU."""
    rng = np.random.default_rng(7)
    for trial, extreme in enumerate((0.0, 0.1, 0.9)):
        registers = random_registers(rng, extreme)
        memory = random_float32(rng, (16,), extreme).view(np.uint8)[: 4 if form.broadcast else form.width].copy()
        if form.memory:
            index = 3 * trial
            target = memory.ctypes.data - (index * form.memory.scale if form.memory.index else 0)
            # The assembler's displacement counts bytes, compressed or not.
            form.memory.point(registers, target, index)
        # Round down, no flushing, every exception unmasked: none of it may matter.
        registers["mxcsr"] = (DEFAULT_MXCSR, 0x7F80, 0x2000)[trial]
        expected = registers.copy()
        expected["zmm"][form.destination] = model_result(form, registers, memory)
        emulated = registers.copy()
        assert not machine.run(form.text, emulated, vectors=True)
        assert_same_registers(emulated, expected)
        if "avx512_bf16" in CPU_FLAGS:
            native = registers.copy()
            machine.run(form.text, native, vectors=True, native=True)
            assert_same_registers(native, expected)
    assert emulator.counts().avx512_bf16 == 3


def random_registers(rng: np.random.Generator, extreme: float) -> Array:
    registers = new_registers()
    registers["zmm"] = random_float32(rng, (32, 16), extreme).view(np.uint8)
    registers["k"] = rng.integers(0, 2**63, 8, dtype=np.uint64)
    return registers


def model_result(form: Form, registers: Array, memory: Array) -> Array:
    def lanes(number: int) -> Array:
        return registers["zmm"][number, : form.width].copy().view(np.uint32)

    source = lanes(form.second)
    if form.memory:
        source = np.resize(memory, form.width).view(np.uint32)
    if form.name == "vdpbf16ps":
        result = vdpbf16ps(lanes(form.destination), lanes(form.first), source)
    elif form.name == "vcvtneps2bf16":
        result = convert(source)
    else:
        result = convert(np.concatenate([source, lanes(form.first)]))
    mask = int(registers["k"][form.mask]) if form.mask else None
    return masked(registers["zmm"][form.destination].copy(), result, mask, form.zeroing)


def assert_same_registers(actual: Array, expected: Array) -> None:
    for number in range(32):
        assert (actual["zmm"][number] == expected["zmm"][number]).all(), (
            f"zmm{number}: {actual['zmm'][number].view(np.uint32)} {expected['zmm'][number].view(np.uint32)}"
        )
    assert actual == expected


@needs_avx512
def test_avx512_bf16_on_the_stack_and_relative_to_rip(machine: Machine) -> None:
    registers = random_registers(np.random.default_rng(8), 0.1)
    expected = registers.copy()
    form = Form("vdpbf16ps")
    expected["zmm"][1] = model_result(form, registers, np.zeros(0, np.uint8))
    machine.set_operand(registers["zmm"][3])
    for line in (STACK_FORM, RIP_FORM):
        actual = registers.copy()
        code = machine.address(line, trapped=line == RIP_FORM)
        machine.driver.driver_run(ctypes.c_void_p(code), actual.ctypes.data_as(ctypes.c_void_p), 1)
        assert_same_registers(actual, expected)


@needs_avx512
def test_masked_off_memory_is_not_touched(machine: Machine) -> None:
    """The last lanes lie on a page that cannot be read."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    page = libc.mmap(None, 8192, 3, 0x22, -1, 0)
    assert libc.mprotect(ctypes.c_void_p(page + 4096), 4096, 0) == 0
    for form in FORMS:
        if form.width == 64 and form.memory and form.mask and not form.broadcast and form.name != "vcvtne2ps2bf16":
            registers = random_registers(np.random.default_rng(9), 0.0)
            registers["k"][form.mask] = 0b111
            form.memory.point(registers, page + 4096 - 12, 0)
            assert not machine.run(form.text, registers, vectors=True)
    libc.munmap(ctypes.c_void_p(page), 8192)


@needs_avx512
@pytest.mark.parametrize("save", ["driver_xsave", "driver_xsavec"])
@pytest.mark.parametrize("form", IMAGE_FORMS, ids=[form.text for form in IMAGE_FORMS])
@pytest.mark.parametrize("initial", [(), (2,), (6,), (7,), (5,), (2, 5, 6, 7)])
def test_both_formats_of_the_xsave_image(machine: Machine, save: str, form: Form, initial: tuple[int, ...]) -> None:
    """An image that the CPU wrote and reads again; components in their initial state hold junk."""
    registers = random_registers(np.random.default_rng(10), 0.0)
    space = np.full(8192 + 64, 0xEE, np.uint8)
    space[-space.ctypes.data % 64 :][512:576] = 0
    image = space[-space.ctypes.data % 64 :][:8192]
    arguments = [ctypes.c_void_p(array.ctypes.data) for array in (image, registers)]
    getattr(machine.driver, save)(*arguments)
    header = image[512:520].view(np.uint64)
    for component in initial:
        header[0] &= ~np.uint64(1 << component)
    assert (image[520:528].view(np.uint64)[0] >> 63 == 1) == (save == "driver_xsavec")

    machine.driver.driver_xrstor(*arguments)
    expected = registers.copy()
    expected["zmm"][form.destination] = model_result(form, registers, np.zeros(0, np.uint8))
    assert step(machine, image, form.text, registers) > 0
    assert not machine.driver.driver_last_error()
    assert np.float32(1e-40) * np.float32(0.5) > 0, "the emulator's own flushing must not outlive the instruction"
    machine.driver.driver_xrstor(*arguments)
    assert_same_registers(registers, expected)


@needs_avx512
def test_frame_without_avx512_registers_is_refused(machine: Machine) -> None:
    image = np.zeros(4096, np.uint8)
    image[520:528].view(np.uint64)[0] = 1 << 63 | 0x7
    step(machine, image, FORMS[0].text, new_registers())
    assert b"VDPBF16PS" in machine.driver.driver_last_error()
    assert b"no AVX-512 registers" in machine.driver.driver_last_error()


def test_other_instructions_are_not_decoded(machine: Machine) -> None:
    assert step(machine, np.zeros(4096, np.uint8), UNKNOWN, new_registers()) == 0
    assert not machine.driver.driver_last_error()


def test_install_again_is_the_same(machine: Machine) -> None:
    emulator.install()
    assert not machine.tile(LDTILECFG, configuration({0: (16, 64)}))


def test_library_without_an_emulator_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(IsaError, match="does not export jitmoe_emulator_install"):
        programs.EmulatorLibrary(machine.path)
    with pytest.raises(IsaError, match="cannot be loaded"):
        programs.EmulatorLibrary(tmp_path / "missing.so")


PROLOGUE = """
import ctypes, errno, os, signal, sys
emulator, driver = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(sys.argv[2])
registers = (ctypes.c_uint64 * 281)()
registers[280] = 0x1F80
"""
INSTALL = "assert emulator.jitmoe_emulator_install() == 0\n"
DRIVER_FIRST = "assert driver.driver_install(emulator.jitmoe_emulator_step) == 0\n"


def run_script(machine: Machine, body: str) -> "subprocess.CompletedProcess[str]":
    """Run ``body`` in a process of its own; ``run(...)`` in it executes the instruction given by its text."""
    for line in asm.lines:
        body = body.replace(f"run({line!r})", f"driver.driver_run(driver.stub_{asm.lines.index(line)}, registers, 0)")
    command = [sys.executable, "-c", PROLOGUE + body, str(machine.emulator_path), str(machine.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_refusal_ends_the_process(machine: Machine) -> None:
    result = run_script(machine, INSTALL + "run('tilezero %tmm0')\nprint('survived')")
    assert result.returncode == -signal.SIGABRT
    assert "survived" not in result.stdout
    assert "jitmoe emulator: TILEZERO at 0x" in result.stderr
    assert f"({machine.path}+0x" in result.stderr
    assert "LDTILECFG missing, or use after TILERELEASE" in result.stderr


def test_other_illegal_instruction_meets_the_default_action(machine: Machine) -> None:
    result = run_script(machine, INSTALL + f"run({UNKNOWN!r})\nprint('survived')")
    assert result.returncode == -signal.SIGILL
    assert not result.stdout
    ignored = "signal.signal(signal.SIGILL, signal.SIG_IGN)\n" + INSTALL + f"run({UNKNOWN!r})"
    assert run_script(machine, ignored).returncode == -signal.SIGILL


def test_other_illegal_instruction_goes_to_the_previous_handler(machine: Machine) -> None:
    """The driver's handler knows ud2; the emulator, in front of it, knows tilerelease."""
    trapped = f"driver.driver_run(driver.trapped_{asm.lines.index(TILERELEASE)}, registers, 0)\n"
    counts = "values = (ctypes.c_uint64 * 14)()\nemulator.jitmoe_emulator_counts(values, 14)\nprint(values[10])\n"
    result = run_script(machine, DRIVER_FIRST + INSTALL + trapped + "run('tilerelease')\n" + counts)
    assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr


def test_previous_handler_without_siginfo(machine: Machine) -> None:
    body = "signal.signal(signal.SIGILL, lambda *_: print('seen'))\n" + INSTALL
    body += "run('tilerelease')\nos.kill(os.getpid(), signal.SIGILL)\nprint('end')"
    result = run_script(machine, body)
    assert (result.returncode, result.stdout) == (0, "seen\nend\n"), result.stderr


@pytest.mark.parametrize(
    ("before", "status"),
    [("", -signal.SIGILL), ("signal.signal(signal.SIGILL, signal.SIG_IGN)\n", 0), (DRIVER_FIRST, 1)],
    ids=["default", "ignored", "handled"],
)
def test_sent_signal_goes_on(machine: Machine, before: str, status: int) -> None:
    body = before + INSTALL + "os.kill(os.getpid(), signal.SIGILL)\nsys.exit(driver.driver_sent_signals())"
    assert run_script(machine, body).returncode == status


def test_signal_sent_in_front_of_an_emulated_instruction(machine: Machine) -> None:
    """The signal arrives with RIP at tilerelease, which is not why it came."""
    kill = "registers[264], registers[270], registers[271] = 62, signal.SIGILL, os.getpid()\n"
    result = run_script(
        machine,
        DRIVER_FIRST + INSTALL + kill + f"run({SYSCALL_BEFORE_RELEASE!r})\n" + "print(driver.driver_sent_signals())",
    )
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr


def test_install_under_another_handler_is_refused(machine: Machine) -> None:
    body = INSTALL + DRIVER_FIRST + "assert emulator.jitmoe_emulator_install() == errno.EBUSY\nrun('tilerelease')"
    result = run_script(machine, body)
    assert result.returncode == 0, result.stderr


def test_forked_child_keeps_the_emulator(machine: Machine) -> None:
    body = INSTALL + "run('tilerelease')\nchild = os.fork()\nrun('tilerelease')\n"
    body += "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    result = run_script(machine, body)
    assert result.returncode == 0, result.stderr
