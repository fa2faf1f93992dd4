"""The rooms of the package: which module may import what. Read from the source, nothing is executed."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jitmoe"

ORDER = [
    "errors",
    "settings",
    "config",
    "plan",
    "render",
    "memory",
    "workspace",
    "files",
    "packed_file",
    "cpu",
    "toolchain",
    "cache",
    "build",
    "budget",
    "kernels",
    "emulator",
    "route",
    "tokens",
    "scan",
    "checked",
    "experts",
    "trace_report",
    "trace_cause",
    "tracing",
    "pack",
    "reference",
    "yardstick",
    "autograd",
    "capture",
    "layer",
    "__init__",
    "estimate",
    "bench.__init__",
    "bench.workloads",
    "bench.data",
    "bench.ceilings",
    "bench.trace",
    "bench.machine",
    "bench.contenders",
    "bench.peers",
    "bench.measure",
    "bench.footprint",
    "bench.startup",
    "bench.phases",
    "bench.predict",
    "bench.sweep",
    "bench.report",
    "bench.targets",
    "bench.plot",
    "bench.command",
    "replay",
    "debug",
    "check",
    "cli",
    "__main__",
]
"""A module imports only modules that stand before it. A new module gets its place here."""

BENCH_WITH_TORCH = {
    f"bench.{name}"
    for name in (
        "data",
        "machine",
        "contenders",
        "peers",
        "measure",
        "footprint",
        "startup",
        "phases",
        "sweep",
        "command",
    )
}

WALLS = {
    "torch": {
        "pack",
        "autograd",
        "layer",
        "reference",
        "yardstick",
        "capture",
        "replay",
        "debug",
        "check",
        *BENCH_WITH_TORCH,
    },
    "numba": {"route", "tokens", "scan"},
    "ctypes": {"kernels"},
    "subprocess": {"toolchain", "build"},
    "llvmlite": {"cpu"},
    "filelock": {"cache"},
    "platformdirs": {"cache"},
    "safetensors": {"pack"},
    "matplotlib": {"bench.plot", "trace_report"},
    "transformers": {"bench.peers"},
    "peft": {"bench.peers"},
}
"""The only modules that may import these."""

ENVIRONMENT = {"settings"}
"""The only modules that may read or write environment variables."""

MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those inside functions included; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "jitmoe" if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parse(module: str) -> ast.AST:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def module_in(dotted: str) -> str:
    """The module of ORDER that ``dotted`` is or lies in: bench.data for bench.data.Base; "" for none."""
    parts = dotted.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in ORDER), "")


def broken_walls(module: str, tree: ast.AST) -> list[str]:
    """What ``tree`` imports or reads that ``module`` may not."""
    broken = []
    for name in imported(tree):
        top, _, rest = name.partition(".")
        if module not in WALLS.get(top, {module}):
            broken.append(f"{module} imports {name}; only {', '.join(sorted(WALLS[top]))} may")
        target = module_in(rest)
        if top == "jitmoe" and target and ORDER.index(target) >= ORDER.index(module):
            broken.append(f"{module} imports {target}, which stands above it")
        if top != "jitmoe" and top not in sys.stdlib_module_names and top not in {*WALLS, "numpy"}:
            broken.append(f"{module} imports {name}, a package without a place in this table")
    if module not in ENVIRONMENT and any(
        isinstance(node, ast.Attribute | ast.alias)
        and (node.attr if isinstance(node, ast.Attribute) else node.name) in {"environ", "environb", "getenv", "putenv"}
        for node in ast.walk(tree)
    ):
        broken.append(f"{module} touches the environment; only {', '.join(ENVIRONMENT)} may")
    return broken


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER), "a module is missing in ORDER of this file"


@pytest.mark.parametrize("module", MODULES)
def test_walls_stand(module):
    assert broken_walls(module, parse(module)) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("route", "import torch"),
        ("plan", "from torch import nn"),
        ("layer", "def f():\n    import numba.core"),
        ("render", "import subprocess as s"),
        ("plan", "from jitmoe import layer"),
        ("plan", "from jitmoe.experts.layer import MoELayer"),
        ("plan", "from . import layer"),
        ("plan", "import jitmoe.experts.layer"),
        ("cache", "import os\nos.environ['HOME']"),
        ("cache", "from os import getenv"),
        ("config", "import pandas"),
        ("bench.workloads", "import torch"),
        ("bench.data", "from jitmoe.bench.measure import compare"),
        ("layer", "from jitmoe.bench import data"),
    ],
)
def test_a_hole_in_a_wall_is_found(module, text):
    assert len(broken_walls(module, ast.parse(text))) == 1
