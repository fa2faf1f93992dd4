"""Text of one kernel instance: one include, one ``constexpr Shape``, the exported C functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from jitmoe.errors import BuildError
from jitmoe.plan.shapes import Shape

READ_ADVICE = "Close files of this process or raise its limit (ulimit -n), or install jitmoe again."

INSTANCE_TEMPLATE = "instance.cpp.in"


@dataclass(frozen=True)
class Program:
    """A program beside the kernels, compiled with the flags of ``isa``. An instance has it in place of a shape."""

    name: str
    isa: str
    m_step: int = 0


@dataclass(frozen=True)
class Instance:
    """A rendered kernel, or a program: what it is, and the C++ text to compile."""

    shape: Shape | Program
    text: str


class _Present:
    """The folder that :func:`templates_from` has put in place of the shipped one."""

    folder: Path | None = None


def template_dir() -> Traversable:
    """Folder of the templates."""
    return _Present.folder or _shipped()


@contextmanager
def templates_from(folder: Path) -> Iterator[None]:
    """Render and compile from ``folder`` in this process until the block ends; what is loaded stays loaded."""
    before, _Present.folder = _Present.folder, folder
    try:
        yield
    finally:
        _Present.folder = before


@cache
def _shipped() -> Traversable:
    """Inside the package when installed, beside it in a checkout."""
    checkout = Path(__file__).resolve().parents[2] / "templates"
    if (checkout / INSTANCE_TEMPLATE).is_file():
        return checkout
    return resources.files("jitmoe") / "templates"


def render(shape: Shape) -> Instance:
    """Render the instance of ``shape``."""
    template = Template(_read(INSTANCE_TEMPLATE))
    members = (f"    .{field.name} = {_literal(field.name, getattr(shape, field.name))}," for field in fields(shape))
    text = template.substitute(name=shape.name, members="\n".join(members))
    return Instance(shape, text)


def _literal(name: str, value: str | int | bool) -> str:
    """A member of ``Shape`` in C++; text names an enumerator of the enum that is called like the member."""
    return f"jitmoe::{name.capitalize()}::{value}" if isinstance(value, str) else str(value).lower()


def read_program(name: str, isa: str) -> Instance:
    """The program ``name``.cpp of the templates, to be compiled with the flags of ``isa``."""
    return Instance(Program(name, isa), _read(f"tools/{name}.cpp"))


def _read(name: str) -> str:
    try:
        return template_dir().joinpath(name).read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"the template {name} cannot be read: {error}. {READ_ADVICE}") from error
