"""What each mode of ``jitmoe bench`` measures and prints. Each returns its figures for ``--json``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jitmoe.bench import history, loading, machine, plot, report
from jitmoe.bench.busy import busy_json, busy_table, measure_busy
from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.footprint import footprint_json, footprint_table, measure_footprints
from jitmoe.bench.measure import Options, compare
from jitmoe.bench.phases import measure_phases, phases_json, phases_table
from jitmoe.bench.predict import check_table, prediction_table
from jitmoe.bench.revisions import compare_with
from jitmoe.bench.sweep import run_sweep, sweep_json, sweep_table
from jitmoe.bench.targets import judge_targets, measure_workloads, targets_json, targets_table
from jitmoe.jit import cpu
from jitmoe.oracle.workloads import W6, WORKLOADS, Workload


@dataclass(frozen=True)
class Run:
    """What the user asked for: ``axis`` of a sweep, file of a ``plot``, ``gigabytes`` to load, ``against`` what."""

    workloads: list[Workload]
    options: Options
    threads: int
    quick: bool
    axis: str | None
    plot: Path | None
    gigabytes: float
    against: str | None = None

    @property
    def title(self) -> str:
        """Title of a picture."""
        return f"{cpu.detect().model}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def _compare(run: Run) -> dict[str, Any]:
    outcomes = []
    ceilings = Ceilings(run.threads)
    for workload in run.workloads:
        outcomes.append(compare(workload, run.options, ceilings))
        print(f"\n{report.outcome_table(outcomes[-1])}", flush=True)
    if run.plot:
        plot.plot_roofline(outcomes, run.title, run.plot)
    return report.as_json(outcomes, machine.peak_bytes())


def _phases(run: Run) -> dict[str, Any]:
    found = []
    for workload in run.workloads:
        for isa in run.options.isas:
            found.append(measure_phases(workload, isa, run.options.repeat))
            print(f"\n{phases_table(found[-1])}", flush=True)
    return {"phases": [phases_json(phases) for phases in found]}


def _targets(run: Run) -> dict[str, Any]:
    outcomes = []
    for outcome in measure_workloads(run.options, run.threads):
        outcomes.append(outcome)
        print(f"\n{report.outcome_table(outcome)}", flush=True)
    lines = judge_targets(outcomes, run.options, run.threads)
    print(f"\n{targets_table(lines)}")
    if run.plot:
        plot.plot_roofline(outcomes, run.title, run.plot)
    return report.as_json(outcomes, machine.peak_bytes()) | {"targets": targets_json(lines)}


def _memory(run: Run) -> dict[str, Any]:
    options = run.options
    found = list(measure_footprints(run.workloads, options.isas, options.lora_dtype, run.threads))
    print(f"\n{footprint_table(found)}")
    return {"memory": [footprint_json(footprint) for footprint in found]}


def _loading(run: Run) -> dict[str, Any]:
    found = loading.measure_loading(run.gigabytes, run.threads)
    print(f"\n{loading.loading_table(found)}")
    return {"loading": loading.loading_json(found)}


def _busy(run: Run) -> dict[str, Any]:
    found = [measured for isa in run.options.isas for measured in measure_busy(isa)]
    print(f"\n{busy_table(found)}")
    return {"busy": busy_json(found)}


def _sweep(run: Run) -> dict[str, Any]:
    assert run.axis is not None
    sweep = run_sweep(run.axis, run.workloads[0], run.options, run.threads, run.quick)
    print(f"\n{sweep_table(sweep)}")
    if run.plot:
        plot.plot_sweep(sweep, f"{sweep.workload.name}, {run.title}", run.plot)
    return {"sweep": sweep_json(sweep)}


def _against(run: Run) -> dict[str, Any]:
    assert run.against is not None
    if Path(run.against).is_file():
        record = history.read_record(Path(run.against))
        options, ceilings = replace(run.options, peers=()), Ceilings(run.threads)
        outcomes = [compare(workload, options, ceilings) for workload in run.workloads]
        changes, before = history.compare_with_record(record, outcomes), "over the roofline before"
    else:
        changes, before = [], f"{run.against}, s"
        for isa in run.options.isas:
            changes += compare_with(run.against, run.workloads, isa, run.threads, run.options.repeat)
    print(f"\n{history.changes_table(changes, before)}")
    return {"changes": history.changes_json(changes)}


def _predict(run: Run) -> dict[str, Any]:
    ceilings = Ceilings(run.threads)
    outcomes = [compare(workload, replace(run.options, peers=()), ceilings) for workload in run.workloads]
    print(f"\n{check_table(outcomes, run.threads)}\n\n{prediction_table([*WORKLOADS.values(), W6])}")
    return report.as_json(outcomes, machine.peak_bytes())


MODES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "compare": _compare,
    "phases": _phases,
    "targets": _targets,
    "memory": _memory,
    "loading": _loading,
    "busy": _busy,
    "sweep": _sweep,
    "predict": _predict,
    "against": _against,
}
