"""Finds the cause of a value that is not finite, from the steps of both passes and what each step reads."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jitmoe.inspect.records import PARAMETER, STEP, Record
from jitmoe.inspect.scales import BadScales
from jitmoe.inspect.trace_report import Finding, held_before

LARGEST = 3.3895313892515355e38
"""Largest finite bfloat16. Rounding makes larger values infinite."""


@dataclass(frozen=True)
class Step:
    """One computation of a pass, as records name it; the kernels do several of them in one step.

    Attributes:
        name: of the step and of its result.
        products: the result is a sum of these products of earlier results and parameters; none for an input.
        axis: axis of the parameters [out, in] along which the columns of the result run.
    """

    name: str
    products: tuple[tuple[str, ...], ...] = ()
    axis: int = 0


def _forward_steps(again: str = "") -> list[Step]:
    """Steps of forward that backward has once more, with ``again`` behind their names."""
    x, act = f"x{again}", f"act{again}"
    # A router makes the routing weights from x, so x comes first.
    steps = [Step(x), Step("weights")]
    for name in ("gate", "up"):
        steps += [
            Step(f"{name} u{again}", ((x, f"{name}_lora_a"),)),
            Step(f"{name}{again}", ((x, f"{name}_proj"), (f"{name} u{again}", f"{name}_lora_b"), (f"{name}_bias",))),
        ]
    return [
        *steps,
        Step(act, ((f"gate{again}", f"up{again}"),)),
        Step(f"down u{again}", ((act, "down_lora_a"),)),
    ]


AGAIN = " again"
"""Behind the names of forward's steps where backward has them: computed again, or read from what forward saved."""

FORWARD: tuple[Step, ...] = (
    *_forward_steps(),
    Step("down", (("act", "down_proj"), ("down u", "down_lora_b"), ("down_bias",))),
    Step("out", (("weights", "down"),)),
)

BACKWARD: tuple[Step, ...] = (
    Step("dout"),
    *_forward_steps(AGAIN),
    Step("down du", (("dout", "down_lora_b"),), axis=1),
    Step("dact", (("dout", "down_proj"), ("down du", "down_lora_a")), axis=1),
    Step("dgate", (("weights", "dact", "up again", "gate again"),)),
    Step("dup", (("weights", "dact", "gate again"),)),
    Step("dweights", (("dact", "act again"), ("dout", "down_bias"))),
    Step("gate du", (("dgate", "gate_lora_b"),), axis=1),
    Step("up du", (("dup", "up_lora_b"),), axis=1),
    Step(
        "dx",
        (("dgate", "gate_proj"), ("dup", "up_proj"), ("gate du", "gate_lora_a"), ("up du", "up_lora_a")),
        axis=1,
    ),
    Step("x.grad", (("dx",),)),
    Step("gate_lora_a.grad", (("gate du", "x again"),)),
    Step("gate_lora_b.grad", (("dgate", "gate u again"),)),
    Step("up_lora_a.grad", (("up du", "x again"),)),
    Step("up_lora_b.grad", (("dup", "up u again"),)),
    Step("down_lora_a.grad", (("weights", "down du", "act again"),)),
    Step("down_lora_b.grad", (("weights", "dout", "down u again"),)),
)

STEPS = {"forward": FORWARD, "backward": BACKWARD}
"""Steps of a pass in the order of the computation: each comes after all that it reads."""

AXES = {"proj": ("out", "in"), "bias": ("out", "1"), "lora_a": ("rank", "in"), "lora_b": ("out", "rank")}
"""Axes of a parameter of one expert, by the end of its name."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of one pass.

    Attributes:
        pass_name: "forward" or "backward".
        records: of the pass, those of steps in the order of :data:`STEPS`.
        bad_weights: by parameter and expert, [rows, columns] bool, True where a value is not finite. A parameter that
            is all finite is left out.
        bad_scales: by base weight and expert, where its scales are not all finite.
        terms: most terms of any sum, times the LoRA scale where that exceeds 1.
    """

    pass_name: str
    records: Sequence[Record]
    bad_weights: Mapping[tuple[str, int], npt.NDArray[np.bool_]]
    bad_scales: Mapping[tuple[str, int], BadScales]
    terms: float


def find_first(evidence: Evidence) -> Finding | None:
    """The first step, in the order of the computation, whose record is not finite, and the cause; None if all are.

    All earlier results that the step reads are finite, so the cause is a parameter, an overflow or the kernel.
    """
    record = next((r for r in evidence.records if r.kind == STEP and r.bad), None)
    if record is None:
        return None
    assert record.first
    step = next(step for step in STEPS[evidence.pass_name] if step.name == record.name)
    cause, reason = _cause(step, record, evidence)
    expert = "" if record.expert is None else f" of expert {record.expert}"
    counts = f"{record.nan} NaN and {record.inf} Inf in {record.size} values"
    return Finding(
        layer=0,
        call=0,
        pass_name=evidence.pass_name,
        step=step.name,
        expert=record.expert,
        token=record.first.token,
        slot=record.first.slot,
        row=record.first.row,
        column=record.first.column,
        cause=cause,
        sentence=f"{step.name}{expert} has {counts}, the first at {record.first}: {reason}",
    )


def _cause(step: Step, record: Record, evidence: Evidence) -> tuple[str, str]:
    """The cause as one word, and as a clause."""
    if not step.products:
        return "input", "it came with the call"
    culprit = _bad_weight(step, record, evidence)
    if culprit:
        return "weights", f"{culprit} is not finite"
    products = _products(step, record, evidence)
    if any(factor is None for product in products for factor in product):
        return "input", "it comes from what forward saved"
    factors = [[factor for factor in product if factor] for product in products]
    if sum(evidence.terms * math.prod(max(1.0, f.magnitude) for f in product) for product in factors) >= LARGEST:
        largest = max((f for product in factors for f in product), key=lambda f: f.magnitude)
        reach = f"{largest.name} reaches {largest.magnitude:.3g}"
        return "overflow", f"all that it is computed from is finite, but so large that it can overflow ({reach})"
    words = "all that it is computed from is finite and too small to overflow: the kernel brought it"
    held = held_before(evidence.records)
    return "kernel", words + (f"; values that are not finite lay before the call in {held}" if held else "")


def _bad_weight(step: Step, record: Record, evidence: Evidence) -> str | None:
    """A parameter's value that reaches the first bad column of ``record`` and is not finite, or None."""
    if record.expert is None:
        return None
    assert record.first and record.first.column is not None
    for name in (factor for product in step.products for factor in product):
        bad = evidence.bad_weights.get((name, record.expert))
        reaching = None if bad is None else np.flatnonzero(np.take(bad, record.first.column, axis=step.axis))
        if reaching is not None and reaching.size:
            place = (record.first.column, int(reaching[0]))
            row, column = place if step.axis == 0 else place[::-1]
            axes = ", ".join(AXES[name.split("_", 1)[1]])
            scales = evidence.bad_scales.get((name, record.expert))
            scale = scales and scales.of(row, column)
            found = f"{name}[{record.expert}, {row}, {column}]"
            if scale:
                return f"{name}_scale[{record.expert}, {scale[0]}, {scale[1]}], the scale of {found} (expert, {axes}),"
            return f"{found} (expert, {axes})"
    return None


def _products(step: Step, record: Record, evidence: Evidence) -> list[list[Record | None]]:
    """Records of the factors of each product, of its expert or of all; None for a step that was not seen.

    Products with parameters that the layer lacks are left out.
    """
    by_name: dict[str, list[Record]] = {}
    for r in evidence.records:
        if r.kind in (STEP, PARAMETER) and (record.expert is None or r.expert in (None, record.expert)):
            by_name.setdefault(r.name, []).append(r)
    parameters = {r.name for r in evidence.records if r.kind == PARAMETER}
    wanted = [p for p in step.products if all(f in parameters for f in p if f.split("_", 1)[-1] in AXES)]
    return [[max(by_name[f], key=lambda r: r.magnitude) if f in by_name else None for f in p] for p in wanted]
