"""Computes a recorded call again: float64 oracle, plain bfloat16 torch and our layer side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from jitmoe.experts.layer import MoELayer
from jitmoe.inspect.recording import Recording
from jitmoe.inspect.trace_report import Report
from jitmoe.inspect.tracing import trace
from jitmoe.isa import IsaChoice
from jitmoe.jit import capability
from jitmoe.oracle.yardstick import (
    Inputs,
    Results,
    Verdict,
    as_operands,
    errors_of_redraws,
    judge,
    results_of_layer,
    results_of_reference,
    title,
)
from jitmoe.text import table


@dataclass(frozen=True)
class Figures:
    """Difference of one result from the oracle, where both are finite.

    Attributes:
        nonfinite: values of the result that are NaN or infinite.
        largest: largest difference.
        mean: mean magnitude of the difference.
        relative: ``mean`` over the mean magnitude of the oracle; 0 where that is 0.
    """

    nonfinite: int
    largest: float
    mean: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """Three computations of one call: figures of each by result, and verdicts on ours."""

    oracle: Mapping[str, Figures]
    plain: Mapping[str, Figures]
    ours: Mapping[str, Figures]
    verdicts: list[Verdict]

    @property
    def faults(self) -> list[str]:
        """Titles of the results outside the error rule."""
        return [title(verdict.name) for verdict in self.verdicts if verdict.fault]

    @property
    def oracle_is_finite(self) -> bool:
        """Whether float64 gives only finite values; if not, the call itself has values that are not finite."""
        return not any(figures.nonfinite for figures in self.oracle.values())

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of the table; the first is its head."""
        head = ("result", *(f"NaN/Inf {who}" for who in ("oracle", "torch", "jitmoe")))
        figures_of = ("max|d|", "mean|d|", "mean|d|/mean|ref|", "torch's")
        rows: list[tuple[str, ...]] = [(*head, *figures_of, "rms / torch's", "max / torch's", "verdict")]
        for verdict in self.verdicts:
            oracle, plain, ours = (figures[verdict.name] for figures in (self.oracle, self.plain, self.ours))
            rows.append(
                (
                    title(verdict.name),
                    *(str(figures.nonfinite) for figures in (oracle, plain, ours)),
                    *(f"{value:.3g}" for value in (ours.largest, ours.mean, ours.relative, plain.relative)),
                    f"{verdict.rms:.3f} <= {verdict.rms_limit}",
                    f"{verdict.largest:.3f} <= {verdict.max_limit}",
                    verdict.fault or "ok" + (f" ({verdict.doubt})" if verdict.doubt else ""),
                )
            )
        return rows

    def __str__(self) -> str:
        return table(self.rows())


def conclusion(faults: Sequence[str]) -> str:
    """Text under the last comparison: how to read it, and whether a result is outside the error rule."""
    verdict = f"outside the error rule: {', '.join(faults)}" if faults else "within the error rule"
    return (
        "d: result - ref, where ref is computed in float64 and torch's result in plain bfloat16. rms and max: errors\n"
        f"of jitmoe over those of torch, and what the error rule allows.\n{verdict}"
    )


def compare(layer: MoELayer, inputs: Inputs, coarse: bool = False) -> Comparison:
    """Hold ``layer`` to the error rule, with the LoRA values of ``inputs``, which it keeps.

    ``coarse`` takes the SMALL limits for every result, and compares with plain torch on this call alone.
    """
    inputs = as_operands(inputs)
    oracle = results_of_reference(inputs, torch.float64)
    plain = results_of_reference(inputs, torch.bfloat16)
    ours = results_of_layer(layer, inputs)

    def figures(found: Results) -> dict[str, Figures]:
        return {name: _figures(found[name], oracle[name]) for name in oracle}

    others = {} if coarse else errors_of_redraws(inputs)
    verdicts = judge(ours, inputs, oracle, plain, others, coarse)
    return Comparison(figures(oracle), figures(plain), figures(ours), verdicts)


class Replay:
    """A recording and the layer that computes it again.

    Args:
        recording: the call.
        isa: instruction set; by default that of the recording if it is usable, else the best one.

    Raises:
        IsaError: ``isa`` cannot run here.
        JitmoeError: the layer refuses the recorded weights.
    """

    def __init__(self, recording: Recording, isa: str | None = None) -> None:
        isa = isa or _isa_of(recording)
        # A forced register block fits only the instruction set that it was forced for.
        m_step = recording.config.m_step if isa == recording.isa else None
        config = replace(recording.config, isa=cast(IsaChoice, isa), m_step=m_step)
        self.recording = recording
        self.layer = MoELayer(config, **recording.base)

    def summary(self) -> str:
        """Sizes and layer, the notes of the recording, and whether the same bits come out again."""
        inputs = self.recording.inputs
        sizes = f"{inputs.topk_ids.shape[0]} tokens, {int(inputs.kept().sum())} slots, {self.layer}"
        reproduction = [self._reproduction()] if self.recording.results else []
        return "\n".join([sizes, *self.recording.notes, *reproduction])

    def trace(self) -> Report:
        """Trace both passes on the recorded values, which :meth:`compare` would round to bfloat16."""
        with trace() as report:
            results_of_layer(self.layer, self.recording.inputs)
        return report

    def expert_numbers(self, report: Report) -> str:
        """Which experts of the recorded layer the numbers in ``report`` stand for; "" where they are the same."""
        experts = self.recording.experts
        if experts == tuple(range(len(experts))):
            return ""
        first = report.first()
        found = ""
        if first and first.expert is not None:
            found = f"Expert {first.expert} of the file is expert {experts[first.expert]} of the recorded layer. "
        return f"{found}The file numbers its experts from 0 on; in the layer they are {', '.join(map(str, experts))}.\n"

    def compare(self) -> Comparison:
        """Ours beside the oracle and plain torch; this takes much longer than a call."""
        return compare(self.layer, self.recording.inputs)

    def _reproduction(self) -> str:
        again, recorded = results_of_layer(self.layer, self.recording.inputs), self.recording.results
        other = [title(name) for name, result in recorded.items() if not _same_bits(result, again[name])]
        where = f"recorded on {self.recording.isa}, computed again on {self.layer.isa}"
        return f"{where}: {'other bits in ' + ', '.join(other) if other else 'the same bits'}"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_type = one.dtype == other.dtype and one.shape == other.shape
    return same_type and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _isa_of(recording: Recording) -> str:
    usable = {found.isa for found in capability.capabilities() if found.usable}
    return recording.isa if recording.isa in usable else "auto"


def _figures(result: Tensor, oracle: Tensor) -> Figures:
    difference = (result.double() - oracle).abs()
    finite = difference.isfinite()
    if not finite.any():
        return Figures(int((~result.isfinite()).sum()), 0.0, 0.0, 0.0)
    mean, magnitude = difference[finite].mean().item(), oracle[finite].abs().mean().item()
    return Figures(
        nonfinite=int((~result.isfinite()).sum()),
        largest=difference[finite].max().item(),
        mean=mean,
        relative=mean / magnitude if magnitude else 0.0,
    )
