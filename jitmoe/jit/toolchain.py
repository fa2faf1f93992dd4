"""The C++ compiler: which one, its identity, its flags for each instruction set, and one run of it."""

import contextlib
import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from jitmoe import settings
from jitmoe.errors import BuildError
from jitmoe.isa import ISAS
from jitmoe.jit import cpu

INSTALL_ADVICE = (
    "Install one (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) "
    "or name one in JITMOE_CXX."
)

EXCHANGE_ADVICE = (
    "Or bring kernels from a machine that has one: `jitmoe build` and `jitmoe cache export FILE` there, "
    "`jitmoe cache import FILE` here."
)

OPENMP_ADVICE = (
    "clang needs its OpenMP runtime: install libomp-dev (Debian/Ubuntu) or libomp-devel (Fedora), or use g++."
)

IDENTIFY_TIMEOUT = 30.0
"""Seconds that ``--version`` may take; wrappers and network file systems make it slow."""

OLDEST = {"gcc": ("__GNUC__", 11), "clang": ("__clang_major__", 12)}
"""The macro with the version, and the first version that knows C++20 and the flags of all instruction sets."""

MACRO = re.compile(r"^#define (\w+) (.*)$", re.MULTILINE)

BASELINE = {"64bit", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2", "x87"}
"""Features of every x86-64 CPU."""

COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-exceptions",
    "-fno-rtti",
    # Each multiply-add is written out. A compiler that contracts one form of a kernel and not the other would give a
    # token different bits in different calls.
    "-ffp-contract=off",
    # Values are the same. Without this flag GCC assumes that comparing floats may trap, and leaves the loops over the
    # activation scalar where there are no masks: 13 ns an element instead of 1 on AVX2.
    "-fno-trapping-math",
    # Every instance defines the same inline functions and templates, perhaps from other versions of the headers. None
    # may take a function of another.
    "-fvisibility-inlines-hidden",
    "-fno-semantic-interposition",
    "-Wl,-Bsymbolic",
)

KIND_FLAGS = {
    # Otherwise all libraries of the process share the static variables of templates.
    "gcc": ("-fno-gnu-unique",),
    "clang": (),
}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        path: absolute path of the program.
        identity: first line of ``--version``, the target, and CPU features that it uses without being asked. It has no
            path in it and is part of each key.
        kind: "gcc" or "clang".
    """

    path: Path
    identity: str
    kind: str


def find_compiler() -> Compiler:
    """The first of $JITMOE_CXX, $CXX, g++, clang++.

    Raises:
        BuildError: there is none, or a variable names something that is no compiler; another is never taken instead.
    """
    for name in ("cxx", "system_cxx"):
        wanted = settings.get(name)
        if wanted is not None:
            return _named_compiler(settings.SETTINGS[name].variable, wanted)
    for program in ("g++", "clang++"):
        path = _which(program)
        if path is not None:
            return _identify(path)
    raise BuildError(f"no C++ compiler: neither g++ nor clang++ is on PATH. {INSTALL_ADVICE} {EXCHANGE_ADVICE}")


def flags(isa: str, kind: str = "gcc") -> tuple[str, ...]:
    """All flags for a kernel of ``isa``, for a compiler of ``kind``."""
    return (*COMMON_FLAGS, *KIND_FLAGS[kind], *ISAS[isa].flags)


def compile(
    compiler: Compiler,
    source: Path,
    output: Path,
    flags: tuple[str, ...],
    include: Path,
    timeout: float,
    log: Path,
) -> None:
    """Compile ``source`` into the shared library ``output``; everything the compiler says goes to ``log``.

    The compiler runs in the folder of ``source``, with relative paths where possible, so that neither the library nor
    a message depends on the place of that folder.

    Args:
        compiler: the program to run.
        source: C++ file.
        output: library to write.
        flags: as given by :func:`flags`.
        include: folder of the headers.
        timeout: seconds after which the compiler and all its children are killed.
        log: text file, replaced.

    Raises:
        BuildError: the compiler fails; the message has the command, the first error line and the log's path.
    """
    folder = source.parent
    command = [str(compiler.path), *flags, "-I", _seen_from(folder, include)]
    command += ["-o", _seen_from(folder, output), _seen_from(folder, source)]
    with open(os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b") as stream:
        stream.write(os.fsencode(shlex.join(command)) + b"\n")
        stream.flush()
        failure = run(command, timeout, stream, folder)
    if failure is None and not _is_library(output):
        # A wrapper script may lose the exit status of its compiler.
        failure = "reported success and wrote no shared library"
    if failure is not None:
        raise BuildError(_failure_text(compiler, command, failure, log))


def _named_compiler(variable: str, wanted: str) -> Compiler:
    path = _which(wanted)
    if path is None:
        raise BuildError(
            f"{variable}={wanted!r} is not a program that can be run. It must be the name or path of one compiler "
            "without arguments (put arguments or ccache into a wrapper script)."
        )
    return _identify(path)


def _which(program: str) -> Path | None:
    found = shutil.which(program, path=settings.get("search_path"))
    # Links are not resolved: some programs, as ccache, act by the name that they are called by.
    return None if found is None else Path(found).absolute()


def _identify(path: Path) -> Compiler:
    info = path.stat()
    return _identify_version(path, info.st_mtime_ns, info.st_size)


@cache
def _identify_version(path: Path, mtime_ns: int, size: int) -> Compiler:
    """Ask the program for its version, once for each state of its file: an upgrade changes the file."""
    version = _ask(path, "--version")
    if "clang" in version:
        kind = "clang"
    elif "Free Software Foundation" in version:
        kind = "gcc"
    else:
        raise BuildError(f"{path} is neither GCC nor clang; it says: {version[:200]!r}. {INSTALL_ADVICE}")
    macros = dict(MACRO.findall(_ask(path, "-dM", "-E", "-x", "c++", os.devnull)))
    name, least = OLDEST[kind]
    if int(macros.get(name, least)) < least:
        raise BuildError(f"{path} is {version.splitlines()[0]}: jitmoe needs {kind} {least} or newer. {INSTALL_ADVICE}")
    own = _own_features(path, macros)
    identity = f"{version.splitlines()[0]} {_ask(path, '-dumpmachine')}"
    return Compiler(path, f"{identity} with {' '.join(own)}" if own else identity, kind)


def _own_features(path: Path, macros: Mapping[str, str]) -> list[str]:
    """CPU features that the program uses without being asked: a wrapper adds flags, or a distribution has defaults.

    Raises:
        BuildError: this CPU lacks one of them.
    """
    known = {feature: f"__{re.sub('[-.]', '_', feature).upper()}__" for feature in cpu.known_features()}
    own = sorted(feature for feature, macro in known.items() if macro in macros and feature not in BASELINE)
    lacking = [feature for feature in own if feature not in cpu.detect().features]
    if lacking:
        raise BuildError(
            f"{path} compiles for {', '.join(lacking)}, which this CPU lacks, although no flag asks for it: is it a "
            "wrapper that adds flags? Name the compiler itself in JITMOE_CXX"
        )
    return own


def features_in(identity: str) -> frozenset[str]:
    """CPU features that the compiler of this :attr:`Compiler.identity` uses without being asked."""
    return frozenset(identity.rpartition(" with ")[2].split()) & frozenset(cpu.known_features())


def _ask(path: Path, *question: str) -> str:
    with tempfile.TemporaryFile() as stream:
        failure = run([str(path), *question], IDENTIFY_TIMEOUT, stream)
        stream.seek(0)
        answer = stream.read().decode(errors="replace").strip()
    if failure is not None or not answer:
        raise BuildError(f"{path} {' '.join(question)} {failure or 'said nothing'}: {answer[:200]!r}. {INSTALL_ADVICE}")
    return answer


def run(command: list[str], timeout: float, stream: BinaryIO, folder: Path | None = None) -> str | None:
    """Run ``command`` with its output in ``stream``; None if it succeeded, else what happened to it.

    The output is a file, because a background process that the compiler leaves (a compile server) would hold a pipe
    open. The command has a process group of its own, so that a timeout or an interrupt ends its children (cc1plus, as,
    ld) too.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return f"could not be started ({error})"
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        return f"did not finish within {timeout:g} s and was killed (JITMOE_COMPILE_TIMEOUT sets the limit)"
    except BaseException:
        _kill_group(process)
        raise
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return None if status == 0 else f"failed with exit status {status}"


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_library(output: Path) -> bool:
    if not output.is_file():
        return False
    with output.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


def _seen_from(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _failure_text(compiler: Compiler, command: list[str], failure: str, log: Path) -> str:
    output = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    said = [line.strip() for line in output if line.strip()]
    # A linker without room says so without the word.
    errors = [line for line in said if "error" in line.lower() or os.strerror(errno.ENOSPC) in line]
    first = next(iter(errors or said), "(it said nothing)")
    advice = [OPENMP_ADVICE] if compiler.kind == "clang" and ("omp.h" in first or "-lomp" in first) else []
    return "\n  ".join([f"the compiler {failure}: {first}", f"command: {shlex.join(command)}", f"log: {log}", *advice])
