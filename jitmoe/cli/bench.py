"""``jitmoe bench``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jitmoe.config import LoraDtype
from jitmoe.errors import BenchError, ConfigError
from jitmoe.jit import capability
from jitmoe.oracle.workloads import Workload, find_workload

DEFAULT = ("W1", "W2", "W3")
DEFAULT_MEMORY = ("W1", "W2", "W4", "W6s")

Axis = Literal["tokens", "experts", "rank", "threads"]

SIZES = {
    "experts": "num-experts",
    "hidden": "hidden-size",
    "intermediate": "intermediate-size",
    "top_k": "top-k",
    "rank": "lora-rank",
    "tokens": "tokens",
}
"""Field of :class:`~jitmoe.oracle.workloads.Workload`, and its option."""

Size = Annotated[int | None, typer.Option(metavar="N", rich_help_panel="own sizes, instead of a named workload")]


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORKLOAD...", help="W1 W2 W2z W3 W4 W5 W6s; default W1 W2 W3"),
    ] = None,
    num_experts: Size = None,
    hidden_size: Size = None,
    intermediate_size: Size = None,
    top_k: Size = None,
    lora_rank: Size = None,
    tokens: Size = None,
    zipf: Annotated[
        bool,
        typer.Option(
            "--zipf",
            help="skewed routing: the n-th most popular expert has odds 1/n",
            rich_help_panel="own sizes, instead of a named workload",
        ),
    ] = False,
    lora_dtype: Annotated[LoraDtype, typer.Option(help="of our LoRA parameters")] = "float32",
    isa: Annotated[str, typer.Option(metavar="NAMES", help="comma-separated instruction sets")] = "auto",
    tensor_parallel: Annotated[int, typer.Option(metavar="N", help="parts of I in our layer, on the NUMA nodes")] = 1,
    threads: Annotated[int | None, typer.Option(metavar="N", help="default: all CPUs")] = None,
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="all, none, or some, comma-separated, of torch-bf16, torch-f32, grouped-bf16, grouped-f32, "
            "transformers, peft, peft-jitmoe; peft takes minutes, and the last two are not in all",
        ),
    ] = "all",
    repeat: Annotated[int, typer.Option(metavar="N", help="rounds; figures are medians of them")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="quarter H and I, half the points of a sweep")] = False,
    phases: Annotated[bool, typer.Option("--phases", help="show where the time of a call of our layer goes")] = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="what other machines should take, checked against this one")
    ] = False,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="memory of our layer beside its plan, in processes of its own; default W1 W2 W4 W6s",
        ),
    ] = False,
    loading: Annotated[
        bool,
        typer.Option("--loading", help="memory and time to load a checkpoint of 2 GB that it makes, or of --gigabytes"),
    ] = False,
    gigabytes: Annotated[float, typer.Option(metavar="N", help="size of the checkpoint of --loading")] = 2.0,
    busy: Annotated[
        bool, typer.Option("--busy", help="small calls while another process computes on every CPU; sizes of its own")
    ] = False,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="all targets beside what this machine reaches; takes 10 to 30 minutes"),
    ] = False,
    sweep: Annotated[Axis | None, typer.Option(help="cost along one axis")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--record", "--json", metavar="FILE", help="write all figures there, with the commit")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="what is slower than before: a file of --record, judged by the ceilings of each run; or a revision of "
            "git, whose tree is measured in turn with this one",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="write a PNG: the roofline, or the sweep")] = None,
) -> None:
    """Measure the layer beside this machine's ceilings and peers."""
    modes = {"phases": phases, "predict": predict, "memory": memory, "loading": loading, "busy": busy}
    mode = _mode({**modes, "targets": targets, "sweep": bool(sweep), "against": bool(against)})
    from jitmoe.bench import machine, report, revisions
    from jitmoe.bench.contenders import refuse_watching
    from jitmoe.bench.measure import Options
    from jitmoe.bench.peers import choose_peers
    from jitmoe.cli.bench_modes import MODES, Run

    refuse_watching()
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    if threads < 1 or repeat < 1:
        raise BenchError(f"--threads and --repeat must be at least 1, got {threads} and {repeat}")
    options = Options(_isas(isa), tuple(choose_peers(peers)), repeat, lora_dtype)
    sizes = (num_experts, hidden_size, intermediate_size, top_k, lora_rank, tokens)
    own = {field: size for field, size in zip(SIZES, sizes, strict=True) if size is not None}
    chosen = _workloads(workloads or [], own, zipf, mode)
    chosen = [w.in_parts(tensor_parallel) for w in ([w.quick() for w in chosen] if quick else chosen)]
    run = Run(chosen, options, threads, quick, sweep, plot, gigabytes, against)
    _check_one_isa(mode, run.workloads, options.isas)
    _check_files(mode, json_file, plot)
    machine.use_threads(threads)
    facts = machine.describe()
    print(report.machine_lines(facts))
    result = MODES[mode](run)
    if json_file:
        facts["commit"] = revisions.commit()
        json_file.write_text(json.dumps({"machine": facts, **result}, indent=2) + "\n", encoding="utf-8")


def _mode(given: Mapping[str, bool]) -> str:
    chosen = [mode for mode, wanted in given.items() if wanted]
    if len(chosen) > 1:
        raise typer.BadParameter(f"--{chosen[1]} is not allowed with --{chosen[0]}")
    return chosen[0] if chosen else "compare"


def _isas(text: str) -> tuple[str, ...]:
    """Concrete instruction sets, each usable here."""
    return tuple(dict.fromkeys(capability.resolve_isa(name) for name in text.split(",")))


def _workloads(names: list[str], own: dict[str, Any], zipf: bool, mode: str) -> list[Workload]:
    """The workloads named, or one of the sizes given, or those that the mode takes by default."""
    if mode == "targets" and names:
        raise ConfigError("--targets has workloads of its own: give no names")
    if own and names:
        raise ConfigError("give names of workloads or sizes of your own, not both")
    if own:
        missing = [f"--{option}" for field, option in SIZES.items() if field not in own and field != "rank"]
        if missing:
            raise ConfigError(f"own sizes lack {', '.join(missing)}")
        return [Workload("own", **({"rank": 8} | own), zipf=zipf)]
    default = {"memory": DEFAULT_MEMORY, "sweep": ("W2",)}.get(mode, DEFAULT)
    return [find_workload(name) for name in names or default]


def _check_one_isa(mode: str, workloads: list[Workload], isas: tuple[str, ...]) -> None:
    if mode == "targets" and len(isas) != 1:
        raise BenchError("--targets takes one instruction set")
    if mode == "sweep" and (len(workloads) != 1 or len(isas) != 1):
        raise BenchError("--sweep takes one workload and one instruction set")


def _check_files(mode: str, json_file: Path | None, plot: Path | None) -> None:
    """Refuse before the measurement what would fail after it."""
    for path in filter(None, (json_file, plot)):
        if not path.absolute().parent.is_dir():
            raise BenchError(f"{path} cannot be written: {path.absolute().parent} is not a directory")
    if plot:
        if mode in ("phases", "predict", "memory", "loading", "busy", "against"):
            raise BenchError(f"--plot draws a roofline or a sweep; --{mode} has no picture")
        from jitmoe.bench.plot import require_matplotlib

        require_matplotlib()
