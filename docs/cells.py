"""A script with prose in its comments as cells, run one after the other in one session, and as a page."""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """Prose, and the code that follows it."""

    prose: str
    code: str


def split(script: str) -> list[Cell]:
    """Cells of ``script``: a block of comment lines at the left edge, ``# ...``, begins each."""
    blocks = re.findall(r"((?:^#(?: .*)?\n)+)((?:^(?!#(?: |\n)).*\n)*)", script, re.MULTILINE)
    return [Cell(re.sub(r"^# ?", "", prose, flags=re.MULTILINE).strip(), code.strip()) for prose, code in blocks]


def run(cells: Sequence[Cell], name: str) -> list[str]:
    """What each cell prints; an error in a cell is raised."""
    session: dict[str, Any] = {"__name__": name}
    printed = []
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(cell.code, name, "exec"), session)
        printed.append(out.getvalue().rstrip())
    return printed


def page(script: str, name: str) -> str:
    """Markdown of the executed ``script``: prose, code, output."""
    cells = split(script)
    parts = []
    for cell, output in zip(cells, run(cells, name), strict=True):
        parts += [cell.prose]
        parts += [f"```python\n{cell.code}\n```"] if cell.code else []
        parts += [f"```{{.text .output}}\n{output}\n```"] if output else []
    return "\n\n".join(parts) + "\n"
