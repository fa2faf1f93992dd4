"""Reports traced calls: a record for each step and expert, as text, as a dict and as a picture."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from jitmoe.errors import TraceError
from jitmoe.inspect.records import PADDING, PARAMETER, SCRATCH, STEP, Record
from jitmoe.inspect.trace_picture import draw
from jitmoe.text import table

TABLE_HEADER: tuple[str, ...] = (
    *("call", "layer", "pass", "step", "expert", "rows", "NaN", "Inf", "zeros"),
    *("min", "max", "absmean", "first that is not finite"),
)


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
        draw(records, f"layer {layer}: {first.sentence if first and first.layer == layer else 'all finite'}", path)


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
