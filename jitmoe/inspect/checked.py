"""Checked calls: compares how a kernel used its scratch with the plan. See templates/watch/checked.hpp."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from jitmoe.errors import PlanError
from jitmoe.experts.observer import Launch, Observer
from jitmoe.jit.abi import CHECKS, FIELDS, LIFE
from jitmoe.plan.placement import ALIGNMENT, Placed, ScratchPlan
from jitmoe.plan.scratch import BACKWARD_STEPS, FORWARD_STEPS
from jitmoe.plan.shapes import Watch

FAULTS = {
    "outside_life": "is used outside its life",
    "outside_buffer": "is used at byte {offset}, outside its bytes",
    "foreign_read": "is read at byte {offset}, which {owner} wrote last",
    "foreign_write": "is written at byte {offset}, which {owner} still holds",
    "canary": "has a neighbour that was written over: the canary at byte {offset} is gone",
}
"""Names and sentences of the faults, in the order of ``Fault`` in watch/checked.hpp."""


class Checker(Observer):
    """Runs calls on checked kernels, which are held to the plan of their scratch."""

    watch: Watch = "memory"

    @contextmanager
    def around(self, launch: Launch) -> Iterator[None]:
        """Check one pass.

        Raises:
            PlanError: a step used scratch otherwise than planned; the message names the buffer, the step, the bytes and
                their owner.
        """
        with checking(launch.plan, launch.arena, STEPS[launch.pass_name]) as checks:
            launch.record["checks"] = checks
            yield


STEPS = {"forward": FORWARD_STEPS, "backward": BACKWARD_STEPS}


@contextmanager
def checking(plan: ScratchPlan, arena: int, steps: Sequence[str]) -> Iterator[int]:
    """Address of a ``Checks``, which holds a checked instance to ``plan`` inside the block.

    Args:
        plan: scratch of the pass, placed with room for canaries.
        arena: address of the scratch.
        steps: names of the steps of the pass.

    Raises:
        PlanError: at the end of the block, see :meth:`Checker.around`.
    """
    lives = _lives(plan)
    owners = np.zeros(plan.nbytes // ALIGNMENT, np.uint32)
    checks = np.zeros((), CHECKS)
    checks["arena"], checks["owners"], checks["lives"] = arena, owners.ctypes.data, lives.ctypes.data
    yield checks.ctypes.data
    if checks["fault"]:
        raise PlanError(_describe({name: int(checks[name]) for name in CHECKS.names or ()}, plan, steps))


def _lives(plan: ScratchPlan) -> npt.NDArray[np.void]:
    lives = np.zeros(len(FIELDS), LIFE)
    for item in plan.placed:
        buffer = item.buffer
        lives[FIELDS.index(buffer.name)] = (item.offset, buffer.nbytes, buffer.first, buffer.last, 0)
    return lives


def _describe(checks: dict[str, int], plan: ScratchPlan, steps: Sequence[str]) -> str:
    placed = {item.buffer.name: item for item in plan.placed}
    name = FIELDS[checks["fault_buffer"]]
    fault = list(FAULTS.values())[checks["fault"] - 1].format(
        offset=checks["fault_offset"], owner=_owner(checks["fault_owner"])
    )
    planned = _promise(placed[name], steps) if name in placed else "this call has no such buffer"
    return (
        f"step {steps[checks['fault_step']]} of {steps[0]}-{steps[-1]}: scratch buffer {name} {fault} ({planned}); "
        f"please report this message: the plan or the kernel is wrong"
    )


def _promise(item: Placed, steps: Sequence[str]) -> str:
    life = f"steps {steps[item.buffer.first]}-{steps[item.buffer.last]}"
    return f"planned for {life}, bytes {item.offset}-{item.end} of the arena"


def _owner(owner: int) -> str:
    if not owner:
        return "nobody"
    part, index = divmod(owner - 1, len(FIELDS))
    return f"{FIELDS[index]} of thread {part}" if FIELDS[index].startswith("thread_") else FIELDS[index]
