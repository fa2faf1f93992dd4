"""Pages made from the tables of the code and of its tests."""

import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import FAMILIES  # noqa: E402
from helpers import EMULATED  # noqa: E402
from quantized import PACKINGS  # noqa: E402

from jitmoe import errors, settings  # noqa: E402
from jitmoe.hf.adapters.formats import FORMATS  # noqa: E402
from jitmoe.isa import ISAS  # noqa: E402


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines).replace("None", "-") + "\n"


def settings_page() -> str:
    """Every environment variable that jitmoe reads."""
    rows = [(f"`{s.variable}`", s.kind.__name__, str(s.default), s.meaning) for s in settings.SETTINGS.values()]
    head = "# Environment variables\n\nFrom `jitmoe/settings.py`, the only module that reads the environment. "
    return f"{head}An empty variable counts as unset.\n\n" + table(("variable", "type", "default", "meaning"), rows)


def error_classes() -> list[type[errors.JitmoeError]]:
    """All errors, in the order of their module."""
    found = vars(errors).values()
    return [
        e for e in found if inspect.isclass(e) and issubclass(e, errors.JitmoeError) and e is not errors.JitmoeError
    ]


def errors_page() -> str:
    """Every error with its cure."""
    parts = [
        "# Errors and their cures\n\nEach is an attribute of `jitmoe`, derives from `jitmoe.JitmoeError` and from the "
        "built-in exception that stands beside it, and says what is wrong, where, and what to do.\n"
    ]
    for error in error_classes():
        meaning = " ".join((error.__doc__ or "").split()).replace(":class:`~jitmoe.config.MoEConfig`", "`MoEConfig`")
        bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__[1:])
        parts.append(f"## {error.__name__}\n\n{meaning.replace('``', '`')} ({bases})\n\n**Cure**: {error.cure}\n")
    return "\n".join(parts)


def support_page() -> str:
    """What the tests run: models, formats, instruction sets, layouts of adapters."""
    how = {
        isa: "emulated: the real machine code" if isa in EMULATED else "natively, where the CPU has it" for isa in ISAS
    }
    sets = [(f"`{isa.name}`", ", ".join(isa.features) or "any CPU", how[isa.name]) for isa in ISAS.values()]
    formats = {"bfloat16": ("-", "-")} | {
        name: (str(group) if form == "int4_group" else "-", scale) for name, (form, group, scale) in PACKINGS.items()
    }
    packings = [(f"`{name}`", *about, *["yes"] * len(ISAS)) for name, about in formats.items()]
    layouts = [f"`{name}`" for name in FORMATS]
    models = [(f"`{name}`", f"`{config}`", "bfloat16") for name, (config, _) in FAMILIES.items()]
    return "\n".join(
        (
            "# Support\n\nMade from the tables that the tests run on (`tests/families.py`, `tests/quantized.py`, "
            "`jitmoe/isa.py`, `jitmoe/hf/adapters/formats.py`): names are theirs. Formats on "
            "each set: `tests/test_formats.py`.\n",
            "## Instruction sets\n",
            table(("set", "CPU features", "tested"), sets),
            "## Weight formats of a layer\n",
            table(("format", "group", "scales", *ISAS), packings),
            "## Models in transformers\n\nWith LoRA on gate, up and down through PEFT. Others on transformers' experts "
            "interface run where their gate is asked and found to be one that jitmoe computes; the rest is an "
            "`UnsupportedExpertsError`.\n",
            table(("model", "config", "experts"), models),
            f"## Layouts of adapters\n\n`jitmoe convert` takes each of {', '.join(layouts)} to each.\n",
            "Which of them have a place for LoRA outside of the experts:\n",
            table(
                ("layout", "LoRA elsewhere"),
                [(f"`{n}`", "yes" if f.holds_others else "no") for n, f in FORMATS.items()],
            ),
        )
    )
