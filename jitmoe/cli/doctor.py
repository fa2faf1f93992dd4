"""``jitmoe doctor``."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jitmoe import numa, settings
from jitmoe.cli import console
from jitmoe.config import MoEConfig
from jitmoe.errors import JitmoeError
from jitmoe.jit import capability, cpu, location, toolchain
from jitmoe.jit.build import build_instances
from jitmoe.jit.location import Place
from jitmoe.jit.render import render
from jitmoe.plan.shapes import plan_kernels
from jitmoe.topology import topology

SIZES = MoEConfig(num_experts=4, hidden_size=64, intermediate_size=96, top_k=2)
"""Of the kernel and the layer that are tried."""

TOKENS = 32

MISSING = "not installed"


Rows = list[tuple[str, str]]


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object, for reports of faults and programs")
    ] = False,
) -> None:
    """Examine CPU, compiler, cache and packages; exit 1 with advice."""
    problems: list[str] = []
    facts: Rows = []
    _examine(problems, facts.extend if as_json else _print_rows)
    if as_json:
        print(json.dumps({"facts": {name.strip(): value for name, value in facts}, "problems": problems}, indent=1))
    else:
        for problem in problems:
            print(f"\nproblem: {problem}", file=sys.stderr)
        print(f"\n{len(problems)} problem(s)" if problems else "\neverything that jitmoe needs is here")
    if problems:
        raise typer.Exit(1)


def _examine(problems: list[str], show: Callable[[Rows], None]) -> None:
    """Give each part to ``show`` when it is known: to try a compiler takes seconds."""
    show([*_describe_python(problems), *_describe_cpu(problems), *_describe_nodes(), *_describe_cache(problems)])
    show(_describe_compiler(problems))
    if not problems:
        show(_describe_layer(problems))


def _print_rows(rows: Rows) -> None:
    console.table(rows, head=False)


def _describe_python(problems: list[str]) -> Rows:
    rows = [("jitmoe", _version("jitmoe")), ("python", platform.python_version())]
    for package in ("torch", "numba", "llvmlite", "numpy"):
        version = _version(package)
        rows.append((package, version))
        if version == MISSING:
            problems.append(f"the package {package} is not installed: pip install {package}")
    return rows


def _describe_cpu(problems: list[str]) -> Rows:
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


def _describe_nodes() -> Rows:
    """The NUMA nodes, what tensor_parallel="auto" is here, and whether packed weights can be put on each node."""
    found = topology()
    count = len(found.nodes)
    rows = [("numa", f"{count} node{'s' if count > 1 else ''} for this process: tensor_parallel='auto' is {count}")]
    for node in found.nodes:
        refused = numa.trial(node.number)
        memory = f"cannot be bound ({refused}): first touch decides where weights lie" if refused else "can be bound"
        rows.append((f"  node {node.number}", f"{len(node.cpus)} usable cores, memory {memory}"))
    binders = [name for name in ("omp_proc_bind", "gomp_affinity") if settings.get(name)]
    rows += [("  threads", f"{settings.SETTINGS[name].variable} binds them, against their nodes") for name in binders]
    return rows + [("  left out", reason) for reason in found.left_out]


def _describe_cache(problems: list[str]) -> Rows:
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


def _describe_compiler(problems: list[str]) -> Rows:
    """The compiler, and whether it makes a kernel of the chosen set that can be loaded and run."""
    folder = Path(tempfile.mkdtemp(prefix="jitmoe-doctor-"))
    try:
        compiler = toolchain.find_compiler()
        shape = plan_kernels(SIZES, capability.resolve_isa(SIZES.requested_isa)).shapes[-1]
        build_instances([render(shape)], store=Place(folder))
    except JitmoeError as error:
        problems.append(str(error))
        return [("compiler", "not usable")]
    shutil.rmtree(folder)  # only after success: the error names the log in it
    tried = f"{shape.name} was compiled, loaded and tried"
    return [("compiler", f"{compiler.path} ({compiler.identity})"), ("kernel", tried)]


def _describe_layer(problems: list[str]) -> Rows:
    """What a layer does, from the cache to the gradients, held to the error rule."""
    from jitmoe.inspect.check import make_call, make_layer
    from jitmoe.inspect.replay import compare

    try:
        config = replace(SIZES, tensor_parallel="auto")
        inputs = make_call(config, TOKENS)
        faults = compare(make_layer(config, inputs), inputs, coarse=True).faults
    except (JitmoeError, OSError, RuntimeError) as error:
        problems.append(f"a layer cannot compute: {error}")
        return [("layer", "not usable")]
    if faults:
        problems.append(f"a layer computes wrongly ({', '.join(faults)}): see `jitmoe check`, and please report this")
    parts = f" in {config.parts} parts" if config.parts > 1 else ""
    return [("layer", "wrong results" if faults else f"computed forward and backward{parts}, within the error rule")]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MISSING
