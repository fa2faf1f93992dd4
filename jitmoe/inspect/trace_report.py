"""Reports traced calls: a record for each step and expert, as text, as a dict and as a picture."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jitmoe.errors import TraceError
from jitmoe.host.scan import Scan
from jitmoe.text import table

STEP, PARAMETER, PADDING, SCRATCH = "step", "parameter", "padding", "scratch"
"""Kinds of records. A step's is of its result or input. The others are of the time before the kernel ran: parameters,
the padding of base weights, and scratch; no step reads the contents of the last two."""


TABLE_HEADER: tuple[str, ...] = (
    *("call", "layer", "pass", "step", "expert", "rows", "NaN", "Inf", "zeros"),
    *("min", "max", "absmean", "first that is not finite"),
)


@dataclass(frozen=True, slots=True)
class Position:
    """Indices of a value; None where a tensor has no such axis.

    Attributes:
        token: index into the T tokens of the call.
        slot: which of the token's K choices.
        row: in the order sorted by expert; in a parameter, a gradient of one, or scratch, the row of the matrix.
        column: of the tensor. Rows and columns of padding follow those of the matrix.
    """

    token: int | None = None
    slot: int | None = None
    row: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items() if value is not None)


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor of one expert in one call.

    Attributes:
        kind: :data:`STEP`, :data:`PARAMETER`, :data:`PADDING` or :data:`SCRATCH`.
        name: of the step, the parameter, the parameter with this padding, or the scratch buffer.
        expert: None for sums over experts and for scratch.
        rows: rows of the tensor.
        size: values seen.
        nan: NaNs among them.
        inf: infinities of either sign.
        zero: zeros of either sign.
        minimum: smallest finite value; NaN if there is none.
        maximum: largest finite value, likewise.
        absmean: mean magnitude of the finite values, likewise.
        first: position of the first value, by row and column, that is not finite; None if all are.
    """

    kind: str
    name: str
    expert: int | None
    rows: int
    size: int
    nan: int
    inf: int
    zero: int
    minimum: float
    maximum: float
    absmean: float
    first: Position | None

    @classmethod
    def of(cls, kind: str, name: str, expert: int | None, rows: int, scan: Scan, first: Position | None) -> "Record":
        """The record of a tensor that was scanned."""
        return cls(
            kind, name, expert, rows, scan.size, scan.nan, scan.inf, scan.zero, scan.minimum, scan.maximum,
            scan.absmean, first,
        )  # fmt: skip

    @property
    def bad(self) -> int:
        """Values that are not finite."""
        return self.nan + self.inf

    @property
    def magnitude(self) -> float:
        """Largest magnitude of the finite values; 0 if there is none."""
        return 0.0 if self.size == self.bad else max(abs(self.minimum), abs(self.maximum))


@dataclass(frozen=True)
class Finding:
    """Where a value that is not finite first appeared, and what brought it.

    Attributes:
        layer: number of the layer, in the order in which the report first saw them.
        call: index into ``report.calls``.
        pass_name: "forward" or "backward".
        step: the first step in the order of the computation whose result is not all finite.
        expert: the first such expert; None for a sum over experts.
        token: of the first such value; None, as below, where the tensor has no such axis.
        slot: which of the token's K choices.
        row: in the order sorted by expert, or in the gradient of a parameter.
        column: of the tensor.
        cause: "input": the value came with the call; "weights": a base weight or LoRA parameter is not finite;
            "overflow": all that the step read is finite, and large enough to overflow; "kernel": none of these.
        sentence: the finding for people, with the name and position of the value at fault.
    """

    layer: int
    call: int
    pass_name: str
    step: str
    expert: int | None
    token: int | None
    slot: int | None
    row: int | None
    column: int | None
    cause: str
    sentence: str

    def __str__(self) -> str:
        return f"layer {self.layer}, call {self.call} ({self.pass_name}): {self.sentence}"


@dataclass(frozen=True)
class CallTrace:
    """One pass of a call of a layer; the report sets ``number`` and ``layer``.

    Attributes:
        pass_name: "forward" or "backward".
        kernel: name of the kernel that ran.
        records: in the order of the computation, parameters and scratch before the steps.
        first: None if every step is finite.
        number: index into ``report.calls``.
        layer: number of the layer, in the order in which the report first saw them.
    """

    pass_name: str
    kernel: str
    records: tuple[Record, ...]
    first: Finding | None
    number: int = 0
    layer: int = 0


class Report:
    """The traced passes in their order: :attr:`calls`, a list of :class:`CallTrace`."""

    def __init__(self) -> None:
        self.calls: list[CallTrace] = []
        self._layers: dict[int, int] = {}

    def add(self, call: CallTrace, layer_key: int) -> CallTrace:
        """Append ``call`` and number it; calls with the same ``layer_key`` are of the same layer."""
        number, layer = len(self.calls), self._layers.setdefault(layer_key, len(self._layers))
        first = call.first and replace(call.first, call=number, layer=layer)
        self.calls.append(replace(call, number=number, layer=layer, first=first))
        return self.calls[-1]

    def first(self) -> Finding | None:
        """The first step whose result is not finite; None if there is none.

        Values in scratch before a call, and in the padding of weights, are in the table only, as no step reads them.
        """
        return next((call.first for call in self.calls if call.first), None)

    def table(self, full: bool = False) -> str:
        """The finding, and a table with a line for each step, and for each expert that is not finite.

        Args:
            full: give every step and expert a line instead.
        """
        rows = [TABLE_HEADER]
        for call in self.calls:
            where = (str(call.number), str(call.layer), call.pass_name)
            rows += [(*where, *cells) for cells in _lines(call.records, full)]
        return f"{self.first() or self._all_finite()}\n{table(rows)}"

    def _all_finite(self) -> str:
        if not self.calls:
            return "No call was traced."
        before = held_before(record for call in self.calls for record in call.records)
        return "Every step is finite." + (
            f"\nNot finite before a call, and read by no step: {before}." if before else ""
        )

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """``first`` and ``calls`` as numbers, text and None, which JSON can hold."""
        first = self.first()
        return {"first": asdict(first) if first else None, "calls": [_plain(asdict(call)) for call in self.calls]}

    def save_png(self, path: str | Path, layer: int | None = None) -> None:
        """Draw a heat map of mean magnitudes, steps by experts; red is not finite, grey is all zero.

        Args:
            path: of the PNG.
            layer: number of the layer in the report; by default that of :meth:`first`, or 0.

        Raises:
            TraceError: matplotlib is not installed, or no call of that layer was traced.
            OSError: the file cannot be written.
        """
        first = self.first()
        layer = layer if layer is not None else first.layer if first else 0
        records = [r for call in self.calls if call.layer == layer for r in call.records if r.kind == STEP]
        if not records:
            raise TraceError(f"no call of layer {layer} was traced: call the layer inside `with jitmoe.trace()`")
        _draw(records, f"layer {layer}: {first.sentence if first and first.layer == layer else 'all finite'}", path)


def held_before(records: Iterable[Record]) -> str:
    """Names of scratch and padding with values that are not finite before a call; earlier calls may have left them."""
    return ", ".join(dict.fromkeys(f"{r.kind} {r.name}" for r in records if r.kind in (SCRATCH, PADDING) and r.bad))


def _lines(records: Sequence[Record], full: bool) -> list[tuple[str, ...]]:
    """Rows of the table: one for each record, or one for all experts of a name and one for each bad expert."""
    lines = []
    for _, group in groupby(records, key=lambda r: (r.kind, r.name)):
        members = list(group)
        if full:
            lines += [_cells(record) for record in members]
            continue
        merged = _merge(members)
        if merged.bad or merged.kind in (STEP, PARAMETER):
            lines.append(_cells(merged))
        lines += [_cells(record) for record in members if record.bad and record.expert is not None]
    return lines


def _cells(record: Record) -> tuple[str, ...]:
    name = record.name + {STEP: "", PARAMETER: " before"}.get(record.kind, f" {record.kind} before")
    expert = "all" if record.expert is None else str(record.expert)
    counts = [str(value) for value in (record.rows, record.nan, record.inf, record.zero)]
    values = [f"{value:.4g}" for value in (record.minimum, record.maximum, record.absmean)]
    return (name, expert, *counts, *values, str(record.first or ""))


def _merge(records: Sequence[Record]) -> Record:
    """One record for several experts; the position is that of the first expert that has one."""
    finite = [r for r in records if r.size > r.bad]
    count = sum(r.size - r.bad for r in finite)
    return Record(
        kind=records[0].kind,
        name=records[0].name,
        expert=None,
        rows=sum(r.rows for r in records),
        size=sum(r.size for r in records),
        nan=sum(r.nan for r in records),
        inf=sum(r.inf for r in records),
        zero=sum(r.zero for r in records),
        minimum=min((r.minimum for r in finite), default=math.nan),
        maximum=max((r.maximum for r in finite), default=math.nan),
        absmean=sum(r.absmean * (r.size - r.bad) for r in finite) / count if count else math.nan,
        first=next((r.first for r in records if r.first), None),
    )


def _plain(value: Any) -> Any:
    """``value`` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def heat_map(records: Iterable[Record]) -> tuple[list[str], list[str], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Names of steps and experts, [steps, experts] float64 log10 of the largest mean magnitude, and bool not finite.

    Sums over experts have the column "all". A cell without records, or with zeros only, is NaN.
    """
    members = list(records)
    steps = list(dict.fromkeys(record.name for record in members))
    experts = sorted({record.expert for record in members if record.expert is not None})
    columns: list[int | None] = [*experts, *([None] if any(r.expert is None for r in members) else [])]
    means = np.zeros((len(steps), len(columns)))
    bad = np.zeros(means.shape, bool)
    for record in members:
        cell = steps.index(record.name), columns.index(record.expert)
        means[cell] = np.fmax(means[cell], record.absmean)
        bad[cell] |= record.bad > 0
    logarithms = np.full(means.shape, math.nan)
    np.log10(means, where=means > 0, out=logarithms)
    return steps, ["all" if c is None else str(c) for c in columns], logarithms, bad


def _draw(records: Sequence[Record], title: str, path: str | Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TraceError("save_png needs matplotlib: pip install 'jitmoe[bench]'") from error

    steps, experts, means, bad = heat_map(records)
    # Not pyplot: no window, and nothing left behind in a user's session.
    figure = Figure(figsize=(min(4 + 0.25 * len(experts), 24), 2 + 0.22 * len(steps)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.92")
    image = axes.imshow(means, aspect="auto", interpolation="nearest", cmap="viridis")
    marks = np.where(bad, 1.0, math.nan)
    axes.imshow(marks, aspect="auto", interpolation="nearest", cmap="Reds", vmin=0.0, vmax=1.2)
    shown = range(0, len(experts), math.ceil(len(experts) / 64))
    axes.set_xticks(list(shown), [experts[i] for i in shown], fontsize=7)
    axes.set_yticks(range(len(steps)), steps, fontsize=7)
    axes.set_xlabel("expert")
    axes.set_title(title, fontsize=8, wrap=True)
    figure.colorbar(image, label="log10 of the mean magnitude; red: not finite; grey: all zero, or no such cell")
    figure.savefig(path, dpi=120, format="png")
