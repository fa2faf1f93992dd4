"""The ``jitmoe`` command: examine the machine, warm the cache, look at what is generated."""

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jitmoe import settings
from jitmoe.config import LORA_DTYPES, MoEConfig, read_fields
from jitmoe.errors import ConfigError, JitmoeError
from jitmoe.isa import ISAS
from jitmoe.jit import cache, cpu, render, toolchain
from jitmoe.jit.build import build, instance_key, template_headers
from jitmoe.plan import shapes
from jitmoe.text import table

OPENMP_PROGRAM = """#include <omp.h>
extern "C" int jitmoe_threads() { return omp_get_max_threads(); }
"""

MISSING = "not installed"

DEFAULT_CHECK = "W1"
"""The workload of ``jitmoe check``: the sizes at which the ancestor's first NaN was logged."""

REQUIRED_FIELDS = ("num_experts", "hidden_size", "intermediate_size", "top_k")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, or 1 after a message on stderr (2: wrong usage)."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except JitmoeError as error:
        print(f"jitmoe: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (head, less) went away. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jitmoe", description="Mixture-of-Experts kernels for CPUs, compiled here.")
    parser.add_argument("--version", action="version", version=f"jitmoe {_version('jitmoe')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    doctor = _command(commands, "doctor", _doctor, "examine CPU, compiler, cache and packages; exit 1 with advice")
    doctor.epilog = "Environment variables: " + "; ".join(
        f"{setting.variable}: {setting.meaning}" for setting in settings.SETTINGS.values()
    )
    _add_config_options(_command(commands, "build", _build, "compile the kernels of a config into the cache"))
    _add_config_options(_command(commands, "show", _show, "print the plan, keys and generated C++ of a config"))

    _add_bench_options(
        _command(commands, "bench", _bench, "measure the layer beside this machine's ceilings and peers")
    )
    _add_estimate_options(
        _command(commands, "estimate", _estimate, "print how much memory a model's experts will take")
    )

    _add_replay_options(
        _command(commands, "replay", _replay, "compute a captured call again, beside float64 and plain torch")
    )
    _add_check_options(_command(commands, "check", _check, "hold the layer to the error rule; exit 1 outside of it"))

    store = _command(commands, "cache", None, "where compiled kernels are kept")
    actions = store.add_subparsers(title="actions", required=True, metavar="ACTION")
    _command(actions, "path", _cache_path, "print the cache directory")
    _command(actions, "list", _cache_list, "list the kernels in it and whether each is intact")
    _command(actions, "clear", _cache_clear, "remove them all; the next use compiles again")
    return parser


def _command(
    parent: Any, name: str, run: Callable[[argparse.Namespace], int] | None, purpose: str
) -> argparse.ArgumentParser:
    """Add a subcommand; ``Any`` because argparse keeps the type of subparsers to itself."""
    parser: argparse.ArgumentParser = parent.add_parser(
        name, help=purpose, description=purpose[0].upper() + purpose[1:] + "."
    )
    if run is not None:
        parser.set_defaults(command=run)
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    # Absent options are left out of the namespace, so that they do not hide what a file says.
    sizes = parser.add_argument_group("config", "sizes of the layer; they override those of --config")
    sizes.add_argument("--config", type=Path, metavar="FILE.json", help="JSON object with fields of MoEConfig")
    helps = {
        "num_experts": "E, experts held by the layer",
        "hidden_size": "H, width of the token rows",
        "intermediate_size": "I, width between up and down projection",
        "top_k": "K, experts per token",
        "lora_rank": "r, rank of the adapters; 0 is without LoRA",
        "m_step": "rows of a register block to force; default: all, and each call picks one",
    }
    for field, text in helps.items():
        option = "--" + field.replace("_", "-")
        sizes.add_argument(option, type=int, metavar="N", default=argparse.SUPPRESS, help=text)
    sizes.add_argument(
        "--lora-dtype", choices=LORA_DTYPES, default=argparse.SUPPRESS, help="dtype of the LoRA parameters"
    )
    sizes.add_argument(
        "--isa", choices=("auto", *ISAS), default=argparse.SUPPRESS, help="instruction set; auto: the best usable one"
    )


def _add_estimate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", metavar="config.json", help="of a transformers model")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="T, tokens of one call; default 4096")
    parser.add_argument("--layers", type=int, metavar="N", help="layers with experts; default: the model's, or 1")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a call; default: all CPUs")
    parser.add_argument("--inference", action="store_true", help="no gradients, optimizer and saved tensors")
    parser.add_argument(
        "--recompute",
        action="store_const",
        const=True,
        default=argparse.SUPPRESS,
        help="save nothing for backward and compute gate and up again there",
    )
    parser.add_argument(
        "--memory-budget",
        type=int,
        metavar="BYTES",
        default=argparse.SUPPRESS,
        help="compare one layer and its call with this memory_budget",
    )
    _add_config_options(parser)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="W1 W2 W2z W3 W4 W5 W6s; default W1 W2 W3")
    sizes = parser.add_argument_group("own sizes", "instead of a named workload")
    for option in ("num-experts", "hidden-size", "intermediate-size", "top-k", "lora-rank", "tokens"):
        sizes.add_argument(f"--{option}", type=int, metavar="N")
    sizes.add_argument("--zipf", action="store_true", help="skewed routing: the n-th most popular expert has odds 1/n")
    parser.add_argument("--lora-dtype", choices=LORA_DTYPES, default="float32", help="of our LoRA parameters")
    parser.add_argument("--isa", default="auto", metavar="NAMES", help="comma-separated instruction sets; default auto")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all CPUs")
    parser.add_argument(
        "--peers",
        default="all",
        metavar="NAMES",
        help="all, none, or some of torch-bf16,torch-f32,grouped-bf16,grouped-f32,transformers,peft; "
        "peft takes minutes and is not in all",
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds; figures are medians of them")
    parser.add_argument("--quick", action="store_true", help="quarter H and I, half the points of a sweep")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--phases", action="store_true", help="show where the time of a call of our layer goes")
    mode.add_argument(
        "--predict", action="store_true", help="what other machines should take, checked against this one"
    )
    mode.add_argument(
        "--memory",
        action="store_true",
        help="memory of our layer beside its plan, in processes of its own; default W1 W2 W4 W6s",
    )
    mode.add_argument(
        "--targets", action="store_true", help="all targets beside what this machine reaches; takes 10 to 30 minutes"
    )
    mode.add_argument("--sweep", choices=("tokens", "experts", "rank", "threads"), help="cost along one axis")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG: the roofline, or the sweep")


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="of layer.capture(), or of the log's format")
    parser.add_argument("--isa", choices=("auto", *ISAS), help="default: that of the file, or the best usable one")
    parser.add_argument(
        "--lora-alpha", type=float, metavar="A", help="for a file of the log's format that does not say"
    )
    parser.add_argument(
        "--trace", action="store_true", help="look into each step of both passes: the first value that is not finite"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="with --trace, draw steps by experts")


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload", nargs="?", metavar="WORKLOAD", help="sizes by name, as in bench; default without sizes: W1"
    )
    parser.add_argument(
        "--mode",
        choices=("accuracy", "perf", "real_data", "debug"),
        default="accuracy",
        help="accuracy: all results beside float64 and plain torch; perf: times beside this machine's ceilings; "
        "real_data: a captured call; debug: expert by expert, to the first step that deviates",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="T, tokens of the call; default: the workload's, or 48")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the call of real_data, as for replay")
    _add_config_options(parser)


def _config(arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> MoEConfig:
    """The config of ``--config`` and the options, options first, ``defaults`` last."""
    known = {field.name for field in dataclasses.fields(MoEConfig)}
    fields = dict(defaults or {})
    fields |= {} if arguments.config is None else _known_fields(arguments.config, known)
    fields |= {name: value for name, value in vars(arguments).items() if name in known}
    missing = [name for name in REQUIRED_FIELDS if name not in fields]
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"the config lacks {', '.join(missing)}: give {options}, or --config FILE.json")
    return MoEConfig(**fields)


def _known_fields(path: Path, known: set[str]) -> dict[str, Any]:
    fields = read_fields(path, "fields of MoEConfig")
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"{path} has unknown fields {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return fields


def _build(arguments: argparse.Namespace) -> int:
    print(build(_config(arguments)))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    kernel_plan = shapes.plan_kernels(config, cpu.resolve_isa(config.requested_isa))
    compiler, headers = toolchain.find_compiler(), template_headers()
    print(f"config    {config}\nisa       {kernel_plan.isa}\ncompiler  {compiler.identity}")
    for shape in kernel_plan.shapes:
        instance = render.render(shape)
        print(f"\nkernel    {shape.name}\nshape     {shape}\nkey       {instance_key(instance, compiler, headers)}\n")
        print(instance.text)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    # Imported here: the other commands need none of what it imports.
    from jitmoe.bench import command

    return command.run(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from jitmoe.inspect.replay import run

    return run(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from jitmoe.inspect.check import run
    from jitmoe.oracle.workloads import find_workload

    sizes_given = arguments.config is not None or any(name in arguments for name in REQUIRED_FIELDS)
    name = arguments.workload or (None if sizes_given else DEFAULT_CHECK)
    workload = None if name is None else find_workload(name)
    defaults = None if workload is None else dataclasses.asdict(workload.config("auto"))
    usual = workload or find_workload(DEFAULT_CHECK)
    tokens = usual.tokens if arguments.tokens is None else arguments.tokens
    return run(arguments, _config(arguments, defaults), tokens)


def _estimate(arguments: argparse.Namespace) -> int:
    from jitmoe.memory.estimate import Load, estimate, read_model

    model = None if arguments.model is None else read_model(arguments.model)
    config = _config(arguments, model.fields if model else None)
    layers = arguments.layers if arguments.layers is not None else model.layers if model else 1
    threads = arguments.threads if arguments.threads is not None else len(os.sched_getaffinity(0))
    print(estimate(Load(config, arguments.tokens, layers, threads, training=not arguments.inference)))
    for note in model.notes if model else ():
        print(f"Note: {note}.")
    return 0


def _cache_path(_: argparse.Namespace) -> int:
    print(cache.location())
    return 0


def _cache_list(_: argparse.Namespace) -> int:
    entries = cache.open_cache().entries()
    rows = [("kernel", "state", "KiB", "compiler", "directory")]
    for entry in entries:
        size = sum(path.stat().st_size for path in entry.directory.iterdir()) / 1024
        state = "intact" if entry.intact else "damaged"
        origin = (str(entry.meta.get("compiler", "?")), str(entry.directory))
        rows.append((str(entry.meta.get("name", "?")), state, f"{size:.0f}", *origin))
    print(table(rows) if entries else f"no kernels in {cache.location()}")
    return 0


def _cache_clear(_: argparse.Namespace) -> int:
    store = cache.open_cache()
    print(f"removed {store.clear()} kernels from {store.root}")
    return 0


def _doctor(_: argparse.Namespace) -> int:
    problems: list[str] = []
    print(table([*_describe_python(problems), *_describe_cpu(problems), *_describe_cache(problems)]))
    print(table(_describe_compiler(problems)))
    for problem in problems:
        print(f"\nproblem: {problem}", file=sys.stderr)
    print(f"\n{len(problems)} problem(s)" if problems else "\neverything that jitmoe needs is here")
    return 1 if problems else 0


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
        chosen = cpu.resolve_isa(wanted)
    except JitmoeError as error:
        problems.append(f"JITMOE_ISA: {error}")
        chosen = "none"
    shown = chosen if chosen == "none" else cpu.describe(chosen)
    rows = [("cpu", cpu.detect().model), ("isa", f"{shown} (asked for: {wanted})")]
    for capability in cpu.capabilities():
        rows.append((f"  {capability.isa}", f"{'yes' if capability.usable else 'no '}  {capability.reason}"))
    threads = settings.get("omp_threads") or "not set"
    return [*rows, ("threads", f"{len(os.sched_getaffinity(0))} usable CPUs, OMP_NUM_THREADS {threads}")]


def _describe_cache(problems: list[str]) -> list[tuple[str, str]]:
    intended = cache.location()
    try:
        store = cache.open_cache()
    except JitmoeError as error:
        problems.append(str(error))
        return [("cache", f"{intended}, refused")]
    if store.root != intended:
        problems.append(
            f"kernels cannot be kept in {intended}, each process compiles its own: set JITMOE_CACHE_DIR to a "
            "directory that you can write to and execute from"
        )
        return [("cache", f"{intended}, not usable")]
    entries = store.entries()
    damaged = sum(not entry.intact for entry in entries)
    return [("cache", f"{intended}, writable, {len(entries)} kernels, {damaged} damaged")]


def _describe_compiler(problems: list[str]) -> list[tuple[str, str]]:
    """The compiler, and whether it really compiles OpenMP code with our flags."""
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
