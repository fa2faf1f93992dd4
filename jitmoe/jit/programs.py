"""Programs beside the kernels, compiled and cached like them: the emulator, the probe of AMX, loops for ceilings."""

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jitmoe.errors import BuildError, CacheSecurityError, IsaError, KernelError
from jitmoe.jit import library
from jitmoe.jit.build import ensure
from jitmoe.jit.render import read_program


class EmulatorLibrary:
    """A shared library with ``int jitmoe_emulator_install(void)``; ours also counts instructions.

    Raises:
        IsaError: the library cannot be loaded, or exports no such function.
    """

    def __init__(self, path: Path, load: Callable[[Path], ctypes.CDLL] | None = None) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path)) if load is None else load(path)
        except OSError as error:
            raise IsaError(f"the emulator {path} cannot be loaded: {error}") from error
        self._install = self._find("jitmoe_emulator_install", ctypes.c_int)

    def install(self) -> None:
        """Take SIGILL for the whole process; a second call does nothing.

        Raises:
            IsaError: the CPU lacks AVX2 or FMA, or another handler was put over the emulator's.
        """
        status = self._install()
        if status:
            raise IsaError(f"the emulator {self.path} could not be installed: {os.strerror(status)}")

    def read_counts(self) -> list[int]:
        """The counters in the order of :class:`jitmoe.jit.emulator.Counts`.

        Raises:
            IsaError: this emulator does not count.
        """
        counts = self._find("jitmoe_emulator_counts", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        values = (ctypes.c_uint64 * counts(None, 0))()
        counts(values, len(values))
        return list(values)

    def reset_counts(self) -> None:
        """Set all counters to zero; errors as of :meth:`read_counts`."""
        self._find("jitmoe_emulator_reset", None)()

    def _find(self, name: str, result: Any, *arguments: Any) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise IsaError(f"the emulator {self.path} does not export {name}") from None
        function.restype, function.argtypes = result, list(arguments)
        return function


@cache
def emulator() -> EmulatorLibrary:
    """Our emulator, compiled at first use and loaded, but not installed.

    Raises:
        BuildError: it cannot be compiled.
        CacheSecurityError: somebody else could write into the cache.
    """
    return EmulatorLibrary(ensure(read_program("emulator", "ref")), library.load)


def install_emulator(wanted: str) -> str | None:
    """Install the emulator that ``JITMOE_EMULATE`` asks for: ours for "1", else the one at that path.

    Returns:
        What failed, or None.
    """
    try:
        (emulator() if wanted == "1" else EmulatorLibrary(Path(wanted))).install()
    except (IsaError, BuildError, CacheSecurityError, KernelError) as error:
        return str(error)
    return None


@cache
def check_tiles(isa: str) -> str | None:
    """Check that ``isa`` can use tiles: palettes, Linux's permission for this process, a product in a child process.

    Returns:
        What failed, or None.
    """
    try:
        probe = library.load(ensure(read_program("probe", isa)))
    except (BuildError, CacheSecurityError, KernelError) as error:
        return f"the test of its tiles cannot be compiled: {error}"
    if probe.jitmoe_tile_palettes() < 1:
        return "CPUID reports no palette of tiles"
    return tile_permission_fault(probe.jitmoe_request_tiles()) or tile_test_fault(probe.jitmoe_test_tiles())


def tile_permission_fault(status: int) -> str | None:
    """What the errno of arch_prctl(ARCH_REQ_XCOMP_PERM) means; None for 0."""
    if status == errno.ENOSPC:
        return (
            "the kernel refuses tile registers (arch_prctl: ENOSPC): a thread of this process has an alternate signal "
            "stack (sigaltstack) too small for them; make it at least getauxval(AT_MINSIGSTKSZ) bytes, or import "
            "jitmoe and build a layer before that thread starts"
        )
    return f"the kernel refuses tile registers (arch_prctl: {os.strerror(status)})" if status else None


def tile_test_fault(verdict: int) -> str | None:
    """What the result of ``jitmoe_test_tiles`` means; None for 0."""
    if verdict > 0:
        return f"the self-test of its tiles was killed by {signal.Signals(verdict).name}"
    return {0: None, -1: "the self-test of its tiles gave a wrong product"}.get(
        verdict, "no process could be started for the self-test of its tiles"
    )


def number_function(path: Path, name: str, arguments: int) -> Callable[..., float]:
    """``double name(int64_t, ...)`` with ``arguments`` arguments, from the library ``path``; runs without the GIL."""
    function: Callable[..., float] = getattr(library.load(path), name)
    function.argtypes = [ctypes.c_int64] * arguments  # type: ignore[attr-defined]
    function.restype = ctypes.c_double  # type: ignore[attr-defined]
    return function
