"""``jitmoe doctor``."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import typer

from jitmoe import settings
from jitmoe.cli import console
from jitmoe.errors import JitmoeError
from jitmoe.jit import capability, cpu, location, toolchain

OPENMP_PROGRAM = """#include <omp.h>
extern "C" int jitmoe_threads() { return omp_get_max_threads(); }
"""

MISSING = "not installed"


def doctor() -> None:
    """Examine CPU, compiler, cache and packages; exit 1 with advice."""
    problems: list[str] = []
    about_machine = [*_describe_python(problems), *_describe_cpu(problems), *_describe_cache(problems)]
    console.table(about_machine, head=False)
    console.table(_describe_compiler(problems), head=False)
    for problem in problems:
        print(f"\nproblem: {problem}", file=sys.stderr)
    print(f"\n{len(problems)} problem(s)" if problems else "\neverything that jitmoe needs is here")
    if problems:
        raise typer.Exit(1)


def _describe_python(problems: list[str]) -> list[tuple[str, str]]:
    rows = [("jitmoe", _version("jitmoe")), ("python", platform.python_version())]
    for package in ("torch", "numba", "llvmlite", "numpy"):
        version = _version(package)
        rows.append((package, version))
        if version == MISSING:
            problems.append(f"the package {package} is not installed: pip install {package}")
    return rows


def _describe_cpu(problems: list[str]) -> list[tuple[str, str]]:
    wanted = settings.get("isa") or "auto"
    try:
        chosen = capability.resolve_isa(wanted)
    except JitmoeError as error:
        problems.append(f"JITMOE_ISA: {error}")
        chosen = "none"
    shown = chosen if chosen == "none" else capability.describe(chosen)
    rows = [("cpu", cpu.detect().model), ("isa", f"{shown} (asked for: {wanted})")]
    for found in capability.capabilities():
        rows.append((f"  {found.isa}", f"{'yes' if found.usable else 'no '}  {found.reason}"))
    threads = settings.get("omp_threads") or "not set"
    return [*rows, ("threads", f"{len(os.sched_getaffinity(0))} usable CPUs, OMP_NUM_THREADS {threads}")]


def _describe_cache(problems: list[str]) -> list[tuple[str, str]]:
    intended = location.location()
    try:
        place = location.open_place()
    except JitmoeError as error:
        problems.append(str(error))
        return [("cache", f"{intended}, refused")]
    entries = place.entries()
    damaged = sum(not entry.intact for entry in entries)
    if place.reason is not None:
        problems.append(
            f"new kernels cannot be kept in {intended} ({place.reason}), each process compiles its own: set "
            "JITMOE_CACHE_DIR to a directory that you can write to and execute from"
        )
    state = "writable" if place.reason is None else "read only" if place.readable else "not usable"
    return [("cache", f"{intended}, {state}, {len(entries)} kernels, {damaged} damaged")]


def _describe_compiler(problems: list[str]) -> list[tuple[str, str]]:
    """The compiler, and whether it compiles OpenMP code with our flags."""
    try:
        compiler = toolchain.find_compiler()
        rows = [("compiler", f"{compiler.path} ({compiler.identity})")]
        _compile_openmp_program(compiler)
    except JitmoeError as error:
        problems.append(str(error))
        return [("compiler", "not usable")]
    return [*rows, ("openmp", "a test program was compiled")]


def _compile_openmp_program(compiler: toolchain.Compiler) -> None:
    folder = Path(tempfile.mkdtemp(prefix="jitmoe-doctor-"))
    source = folder / "openmp.cpp"
    source.write_text(OPENMP_PROGRAM, encoding="utf-8")
    flags = toolchain.flags("ref", compiler.kind)
    limit = settings.get("compile_timeout")
    toolchain.compile(compiler, source, folder / "openmp.so", flags, folder, limit, folder / "build.log")
    shutil.rmtree(folder)  # only after success: the error names the log in it


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
