"""Measures what the machine can do at most, in the same run as everything that is compared with it."""

from collections.abc import Callable

from jitmoe.experts import workspace
from jitmoe.jit import capability, cpu, programs
from jitmoe.jit.build import ensure
from jitmoe.jit.render import read_program

READ_BYTES = 5 << 28
"""1.25 GiB: beyond every cache."""

STEPS = 4_000_000
"""Iterations of an arithmetic loop; some 10 ms on a core of 2025."""

Rates = dict[str, float]
"""Operations a second of ``fma`` (float32), ``bf16`` (dot products), ``tmul`` (tile products of bfloat16) and ``vnni``
(int8), and bytes a second of ``read`` (memory). An instruction that the CPU lacks has no rate."""


class Ceilings:
    """The loops of tools/ceilings.cpp, and the memory that they read.

    Args:
        threads: threads to use.
        read_bytes: bytes to read; more than fits in any cache, unless in a test.
        steps: iterations of an arithmetic loop.

    Raises:
        BuildError: the loops cannot be compiled.
    """

    def __init__(self, threads: int, read_bytes: int = READ_BYTES, steps: int = STEPS) -> None:
        isa = capability.resolve_isa("auto")
        self._library = ensure(read_program("ceilings", isa))
        self.threads, self._steps = threads, steps
        self._memory = workspace.allocate(read_bytes)
        self._function("fill", 3)(threads, self._memory.ctypes.data, read_bytes)
        self._read = self._function("peak_read", 3)
        self._loops = {"fma": self._function("peak_fma", 2)}
        if isa in ("amx", "avx512_bf16"):
            self._loops["bf16"] = self._function("peak_bf16", 2)
        if isa == "amx":
            self._loops["tmul"] = self._function("peak_tmul", 2)
        if isa not in ("avx2", "ref") and "avx512vnni" in cpu.detect().features:
            self._loops["vnni"] = self._function("peak_vnni", 2)

    @property
    def read_bytes(self) -> int:
        """Bytes that :meth:`flush` reads."""
        return self._memory.nbytes

    def measure(self) -> Rates:
        """Measure every ceiling once."""
        rates = {name: loop(self.threads, self._steps) for name, loop in self._loops.items()}
        return rates | {"read": self.flush()}

    def flush(self) -> float:
        """Read memory until nothing else is in the caches; bytes a second."""
        return self._read(self.threads, self._memory.ctypes.data, self._memory.nbytes)

    def _function(self, name: str, arguments: int) -> Callable[..., float]:
        return programs.number_function(self._library, f"jitmoe_{name}", arguments)
