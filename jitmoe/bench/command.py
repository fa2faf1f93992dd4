"""What ``jitmoe bench`` does with its arguments."""

import json
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jitmoe.bench import machine, plot, report
from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.contenders import refuse_watching
from jitmoe.bench.footprint import Footprint, footprint_json, footprint_table, measure_footprints
from jitmoe.bench.measure import Options, compare
from jitmoe.bench.peers import choose_peers
from jitmoe.bench.phases import measure_phases, phases_json, phases_table
from jitmoe.bench.predict import check_table, prediction_table
from jitmoe.bench.sweep import SWEPT, run_sweep, sweep_json, sweep_table
from jitmoe.bench.targets import measure_targets, targets_json, targets_table
from jitmoe.errors import BenchError, ConfigError
from jitmoe.jit import cpu
from jitmoe.oracle.workloads import W6, WORKLOADS, Workload, find_workload

DEFAULT = ("W1", "W2", "W3")
DEFAULT_MEMORY = ("W1", "W2", "W4", "W6s")

SIZES = {
    "num_experts": "experts",
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "top_k": "top_k",
    "lora_rank": "rank",
    "tokens": "tokens",
}
"""Option and field of :class:`~jitmoe.oracle.workloads.Workload`."""


def run(arguments: Namespace) -> int:
    """Measure and print; see ``jitmoe bench --help``."""
    refuse_watching()
    threads = len(os.sched_getaffinity(0)) if arguments.threads is None else arguments.threads
    if threads < 1 or arguments.repeat < 1:
        raise BenchError(f"--threads and --repeat must be at least 1, got {threads} and {arguments.repeat}")
    options = Options(
        _isas(arguments.isa), tuple(choose_peers(arguments.peers)), arguments.repeat, arguments.lora_dtype
    )
    workloads = _workloads(arguments)
    _check_files(arguments)
    torch.set_num_threads(threads)
    facts = machine.describe(threads)
    print(report.machine_lines(facts))
    if arguments.phases:
        result = _phases(workloads, options)
    elif arguments.targets:
        result = _targets(arguments, options, threads)
    elif arguments.memory:
        result = _memory(workloads, options, threads)
    elif arguments.sweep:
        result = _sweep(arguments, workloads, options, threads)
    elif arguments.predict:
        result = _predict(workloads, options, threads)
    else:
        result = _compare(arguments, workloads, options, threads)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, **result}, indent=2) + "\n", encoding="utf-8")
    return 0


def _compare(arguments: Namespace, workloads: list[Workload], options: Options, threads: int) -> dict[str, Any]:
    outcomes = []
    ceilings = Ceilings(threads)
    for workload in workloads:
        outcomes.append(compare(workload, options, ceilings))
        print(f"\n{report.outcome_table(outcomes[-1])}", flush=True)
    if arguments.plot:
        plot.plot_roofline(outcomes, _title(threads), arguments.plot)
    return report.as_json(outcomes, machine.peak_bytes())


def _phases(workloads: list[Workload], options: Options) -> dict[str, Any]:
    found = []
    for workload in workloads:
        for isa in options.isas:
            found.append(measure_phases(workload, isa, options.repeat))
            print(f"\n{phases_table(found[-1])}", flush=True)
    return {"phases": [phases_json(phases) for phases in found]}


def _targets(arguments: Namespace, options: Options, threads: int) -> dict[str, Any]:
    if len(options.isas) != 1:
        raise BenchError("--targets takes one instruction set")
    outcomes, lines = measure_targets(options.isas[0], options, threads)
    print(f"\n{targets_table(lines)}")
    if arguments.plot:
        plot.plot_roofline(outcomes, _title(threads), arguments.plot)
    return report.as_json(outcomes, machine.peak_bytes()) | {"targets": targets_json(lines)}


def _memory(workloads: list[Workload], options: Options, threads: int) -> dict[str, Any]:
    found: list[Footprint] = []
    for workload in workloads:
        for isa in options.isas:
            for footprint in measure_footprints(workload, isa, options.lora_dtype, threads):
                print(f"jitmoe: {workload.name} {footprint.case.mode.name}", file=sys.stderr)
                found.append(footprint)
    print(f"\n{footprint_table(found)}")
    return {"memory": [footprint_json(footprint) for footprint in found]}


def _sweep(arguments: Namespace, workloads: list[Workload], options: Options, threads: int) -> dict[str, Any]:
    if len(workloads) != 1 or len(options.isas) != 1:
        raise BenchError("--sweep takes one workload and one instruction set")
    sweep = run_sweep(arguments.sweep, workloads[0], options, threads, arguments.quick)
    print(f"\n{sweep_table(sweep)}")
    if arguments.plot:
        plot.plot_sweep(sweep, f"{sweep.workload.name}, {_title(threads)}", arguments.plot)
    return {"sweep": sweep_json(sweep)}


def _predict(workloads: list[Workload], options: Options, threads: int) -> dict[str, Any]:
    ceilings = Ceilings(threads)
    outcomes = [compare(workload, replace(options, peers=()), ceilings) for workload in workloads]
    print(f"\n{check_table(outcomes, threads)}\n\n{prediction_table([*WORKLOADS.values(), W6])}")
    return report.as_json(outcomes, machine.peak_bytes())


def _workloads(arguments: Namespace) -> list[Workload]:
    """The named ones, or one of the sizes given, or the default of the mode."""
    if arguments.targets and arguments.workloads:
        raise ConfigError("--targets has workloads of its own: give no names")
    given = {field: value for option, field in SIZES.items() if (value := getattr(arguments, option)) is not None}
    if given and arguments.workloads:
        raise ConfigError("give names of workloads or sizes of your own, not both")
    if given:
        missing = [option for option, field in SIZES.items() if field not in given and option != "lora_rank"]
        if missing:
            raise ConfigError(f"own sizes lack {', '.join('--' + name.replace('_', '-') for name in missing)}")
        workloads = [Workload("own", **({"rank": 8} | given), zipf=arguments.zipf)]
    elif arguments.workloads:
        workloads = [find_workload(name) for name in arguments.workloads]
    else:
        names = DEFAULT_MEMORY if arguments.memory else DEFAULT
        workloads = [SWEPT] if arguments.sweep else [find_workload(name) for name in names]
    return [workload.quick() for workload in workloads] if arguments.quick else workloads


def _isas(text: str) -> tuple[str, ...]:
    """Concrete instruction sets, each usable here."""
    return tuple(dict.fromkeys(cpu.resolve_isa(name) for name in text.split(",")))


def _check_files(arguments: Namespace) -> None:
    """Notice before the measurement what would fail after it."""
    paths: list[Path] = [path for path in (arguments.json, arguments.plot) if path]
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise BenchError(f"{path} cannot be written: {path.absolute().parent} is not a directory")
    if arguments.plot:
        if arguments.phases or arguments.predict or arguments.memory:
            raise BenchError("--plot draws a roofline or a sweep; --phases, --predict and --memory have no picture")
        plot.require_matplotlib()


def _title(threads: int) -> str:
    return f"{cpu.detect().model}, {threads} thread{'s' if threads > 1 else ''}"
