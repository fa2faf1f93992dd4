"""The wings of the package: which may import which, and who may use what. Read from the source; nothing is executed."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jitmoe"

GROUND, ROOT = "ground", "root"
"""Modules that lie in no folder, and ``jitmoe/__init__`` above everything."""

WINGS = (
    *(GROUND, "plan", "host", "jit", "memory", "oracle", "experts", "distributed", "hf", "bench", "inspect", "cli"),
    ROOT,
)
"""A wing imports from itself and from those before it."""

ABOVE = {"__init__": ROOT, "__main__": "cli"}
"""Modules without a folder that are not of the ground."""

MAY_USE = {
    "torch": {"oracle", "experts", "distributed", "hf", "bench", "inspect"},
    "numba": {"host"},
    "ctypes": {"numa", "jit.kernels", "jit.library", "jit.programs"},
    "subprocess": {"jit.toolchain", "bench.revisions"},
    "llvmlite": {"jit.cpu"},
    "filelock": {"files", "jit.cache"},
    "platformdirs": {"jit.location"},
    "safetensors": {"experts.pack", "hf"},
    "matplotlib": {"bench.plot", "hf.train.picture", "inspect.trace_picture"},
    "transformers": {"bench.loading", "bench.peers", "hf", "memory.model"},
    "peft": {"bench.peers", "hf"},
    "typer": {"cli"},
    "rich": {"cli", "progress"},
    "psutil": {"limits", "bench"},
    "numpy": {"plan", "host", "jit", "oracle", "experts", "distributed", "hf", "bench", "inspect"},
}
"""Wings, and single modules, that may import these. Nobody may import another package than these."""

ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}
"""Names that touch the environment: for ``settings`` alone."""

MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def parse(module: str) -> ast.AST:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def wing_of(module: str) -> str:
    wing, _, inside = module.partition(".")
    return wing if inside else ABOVE.get(module, GROUND)


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those in functions and for type checkers too; ``from a import b`` gives a.b."""
    package = ["jitmoe", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str:
    """The module of ours that ``jitmoe.<name>`` is or lies in; a name of the root's own is the root's."""
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((found for name in names for found in (name, f"{name}.__init__") if found in MODULES), "__init__")


def ours(module: str, tree: ast.AST) -> set[str]:
    """Modules of the package that ``module`` imports."""
    names = (name.partition(".") for name in imported(module, tree))
    return {module_of(rest) for top, _, rest in names if top == "jitmoe"}


def looks_up(module: str, tree: ast.AST) -> set[tuple[str, str]]:
    """The module, and the wings above its own that it imports from."""
    height = WINGS.index(wing_of(module))
    above = {wing_of(other) for other in ours(module, tree)}
    return {(module, wing) for wing in above if WINGS.index(wing) > height}


def forbidden(module: str, tree: ast.AST) -> list[str]:
    """What ``module`` uses and may not."""
    found = []
    for name in imported(module, tree):
        top = name.partition(".")[0]
        if top in MAY_USE:
            if not {module, wing_of(module)} & MAY_USE[top]:
                found.append(f"{module} imports {name}; only {', '.join(sorted(MAY_USE[top]))} may")
        elif top != "jitmoe" and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {name}, a package without a place in this table")
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    touched |= {node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
    if module != "settings" and touched & ENVIRONMENT:
        found.append(f"{module} touches the environment; only settings may")
    return found


def test_every_module_has_its_wing() -> None:
    assert {wing_of(module) for module in MODULES} <= set(WINGS)


def test_no_wing_looks_up() -> None:
    found = set().union(*(looks_up(module, parse(module)) for module in MODULES))
    assert found == set()


@pytest.mark.parametrize("module", MODULES)
def test_walls_stand(module: str) -> None:
    assert forbidden(module, parse(module)) == []


@pytest.mark.parametrize("wing", WINGS)
def test_no_cycle_in_a_wing(wing: str) -> None:
    mine = {module for module in MODULES if wing_of(module) == wing}
    assert find_cycle({module: ours(module, parse(module)) & mine - {module} for module in mine}) == []


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("module", "text", "wing"),
    [
        ("plan.groups", "from jitmoe import MoELayer", ROOT),
        ("plan.groups", "import jitmoe", ROOT),
        ("jit.render", "def f():\n    from jitmoe.experts.layer import MoELayer", "experts"),
        ("experts.call", "if TYPE_CHECKING:\n    from jitmoe.inspect import checked", "inspect"),
        ("experts.call", "from ..bench import trace", "bench"),
        ("jit.build", "import jitmoe.memory.budget as b", "memory"),
        ("config", "from jitmoe.plan.shapes import Shape", "plan"),
        ("bench.trace", "from jitmoe.inspect.tracing import trace", "inspect"),
        ("inspect.check", "from jitmoe.cli.app import main", "cli"),
    ],
)
def test_a_look_up_is_found(module: str, text: str, wing: str) -> None:
    assert looks_up(module, ast.parse(text)) == {(module, wing)}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("experts.call", "from jitmoe import settings"),
        ("experts.call", "from jitmoe.jit import abi\nfrom . import ops"),
        ("cli.app", "from jitmoe.bench.command import run"),
        ("__init__", "from jitmoe.inspect import tracing"),
    ],
)
def test_a_look_down_is_none(module: str, text: str) -> None:
    assert looks_up(module, ast.parse(text)) == set()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("host.route", "import torch"),
        ("plan.shapes", "from torch import nn"),
        ("experts.layer", "def f():\n    import numba.core"),
        ("jit.render", "import subprocess as s"),
        ("jit.cache", "import os\nos.environ['HOME']"),
        ("jit.cache", "from os import getenv"),
        ("config", "import pandas"),
        ("memory.budget", "import torch"),
        ("memory.budget", "import ctypes"),
    ],
)
def test_a_hole_in_a_wall_is_found(module: str, text: str) -> None:
    assert len(forbidden(module, ast.parse(text))) == 1
