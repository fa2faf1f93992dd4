"""Sees inside calls: runs them on traced kernels and scans what goes in and what comes out."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from jitmoe import settings
from jitmoe.experts import call as experts
from jitmoe.experts.call import ExpertCall, Run
from jitmoe.host.scan import Scan, empty_records, observe_address, read_record, scan
from jitmoe.inspect.trace_cause import AGAIN, STEPS, Evidence, find_first
from jitmoe.inspect.trace_report import PADDING, PARAMETER, SCRATCH, STEP, CallTrace, Position, Record, Report
from jitmoe.jit.kernels import OBSERVED, Kernels, array_at
from jitmoe.plan.scratch import ITEM_BYTES, ScratchPlan
from jitmoe.plan.shapes import K_STEP, N_STRIP, packed_elements, round_up

log = logging.getLogger(__name__)

PROJECTIONS = ("gate", "up", "down")

OWN_NAMES = {"gate_u": "gate u", "up_u": "up u", "down_u": "down u"} | {
    f"{name}_du": f"{name} du" for name in PROJECTIONS
}
"""What a step is called in reports, where it is not called as in the kernels."""

FORWARD_TENSORS = OBSERVED[: OBSERVED.index("down") + 1]
"""Those of backward's tensors that forward has had before."""

BITS: dict[int, type[np.generic]] = {2: np.uint16, 4: np.float32}
"""How :func:`scan` wants a bfloat16, and a float32."""

_open: list[Report] = []


@contextmanager
def trace() -> Iterator[Report]:
    """Trace every call of every layer, in all threads of the process, until the block ends.

    ::

        with jitmoe.trace() as report:
            loss(model(batch)).backward()
        print(report.first())

    A traced call gives the same bits as any other. It runs on one thread, on a kernel of its own that is compiled at
    first use, and reads all weights of the experts it needs once more: use it to find a fault, not to train.
    """
    report = Report()
    _open.append(report)
    try:
        yield report
    finally:
        _open[:] = [other for other in _open if other is not report]


def forward(call: ExpertCall, addresses: Mapping[str, int]) -> None:
    """:func:`jitmoe.experts.call.forward`, traced where somebody wants it."""
    _carry_out("forward", experts.forward, call, addresses)


def backward(call: ExpertCall, addresses: Mapping[str, int]) -> None:
    """:func:`jitmoe.experts.call.backward`, traced where somebody wants it."""
    _carry_out("backward", experts.backward, call, addresses)


class _Always:
    """What JITMOE_TRACE=1 asks for: a report that keeps no calls, until it has something to say."""

    report = Report()
    done = False

    @classmethod
    def wanted(cls) -> bool:
        return bool(settings.get("trace")) and not cls.done

    @classmethod
    def add(cls, found: CallTrace, layer_key: int) -> None:
        if cls.report.add(found, layer_key).first and not cls.done:
            cls.done = True
            # The text now, not when a handler wants it: the calls are gone then.
            text = cls.report.table()
            log.warning("JITMOE_TRACE: the first value that is not finite; later calls are not traced\n%s", text)
        cls.report.calls.clear()


def _carry_out(
    pass_name: str,
    function: Callable[[ExpertCall, Mapping[str, int], Run | None], None],
    call: ExpertCall,
    addresses: Mapping[str, int],
) -> None:
    reports, always = list(_open), _Always.wanted()
    if not reports and not always:
        function(call, addresses, None)
        return
    # On one thread, so that records need no locks; results do not depend on the number of threads.
    call = replace(call, shape=replace(call.shape, watch="values"), threads=1)
    recorder = Recorder(pass_name, call)
    function(call, addresses, recorder.run)
    layer_key = addresses["gate_weights"]
    found = recorder.found()
    for report in reports:
        report.add(found, layer_key)
    if always:
        _Always.add(found, layer_key)


class Recorder:
    """Runs one planned call on a traced kernel; its records are :class:`Record`."""

    def __init__(self, pass_name: str, call: ExpertCall) -> None:
        self._pass_name = pass_name
        self._call = call
        self._parameters: list[Record] = []
        self._bad_weights: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        self._scratch: list[Record] = []
        self._steps: list[Record] = []

    def run(self, kernels: Kernels, fields: dict[str, int | float], plan: ScratchPlan) -> None:
        """Scan parameters and scratch, run, and read what the kernel showed and what it wrote."""
        self._scan_parameters(kernels, fields)
        self._scan_scratch(fields, plan)
        active = self._call.route.active
        census = empty_records(int(active[-1]) + 1 if active.size else 1, len(OBSERVED))
        shown = {"census": census.ctypes.data, "observe": observe_address()}
        (kernels.forward if self._pass_name == "forward" else kernels.backward)(fields | shown)
        steps = [*self._shown(census), *self._routing_weights(), *self._results(fields)]
        order = {step.name: place for place, step in enumerate(STEPS[self._pass_name])}
        self._steps = sorted(steps, key=lambda record: order[record.name])

    def found(self) -> CallTrace:
        """The records of the call and the finding."""
        shape = self._call.shape
        records = (*self._parameters, *self._scratch, *self._steps)
        rows = max((record.rows for record in self._steps), default=0)
        terms = max(shape.hidden, shape.intermediate, rows) * max(1.0, abs(self._call.scale))
        first = find_first(Evidence(self._pass_name, records, self._bad_weights, terms))
        return CallTrace(self._pass_name, shape.name, records, first)

    def _experts(self) -> Iterator[tuple[int, int, int]]:
        """Each active expert with its first row and the row behind its last one."""
        route = self._call.route
        yield from zip(route.active.tolist(), route.offsets[:-1].tolist(), route.offsets[1:].tolist(), strict=True)

    def _scan_parameters(self, kernels: Kernels, fields: Mapping[str, int | float]) -> None:
        for name in PROJECTIONS:
            self._scan_base(kernels, f"{name}_proj", int(fields[f"{name}_weights"]), *self._extent(name))
        if self._call.rank:
            dtype = np.uint16 if self._call.shape.lora_bf16 else np.float32
            for name in PROJECTIONS:
                for parameter, extent in self._lora_extents(name).items():
                    for expert, matrix in self._matrices(int(fields[parameter]), extent, dtype):
                        self._scan_parameter(parameter, expert, matrix)

    def _scan_base(self, kernels: Kernels, name: str, packed: int, out: int, in_: int) -> None:
        """Base weights at address ``packed``, and what lies there beside them."""
        matrix = np.empty((round_up(out, N_STRIP), round_up(in_, K_STEP)), np.uint16)
        padding: list[Record] = []
        for expert, _, _ in self._experts():
            at = packed + expert * packed_elements(out, in_) * 2
            kernels.unpack(at, matrix.ctypes.data, 1, *matrix.shape, 1)
            self._scan_parameter(name, expert, matrix[:out, :in_])
            for row, column, part in ((0, in_, matrix[:, in_:]), (out, 0, matrix[out:, :in_])):
                padding.append(_record(PADDING, name, expert, part, scan(part), row, column))
        self._parameters += padding

    def _scan_parameter(self, name: str, expert: int, matrix: npt.NDArray[np.generic]) -> None:
        found = scan(matrix)
        self._parameters.append(_record(PARAMETER, name, expert, matrix, found))
        if found.first:
            self._bad_weights[name, expert] = _not_finite(matrix)

    def _extent(self, projection: str) -> tuple[int, int]:
        """(out, in) of a projection."""
        hidden, intermediate = self._call.shape.hidden, self._call.shape.intermediate
        return (hidden, intermediate) if projection == "down" else (intermediate, hidden)

    def _lora_extents(self, projection: str) -> dict[str, tuple[int, int]]:
        out, in_ = self._extent(projection)
        rank = self._call.rank
        return {f"{projection}_lora_a": (rank, in_), f"{projection}_lora_b": (out, rank)}

    def _matrices(
        self, address: int, extent: tuple[int, int], dtype: type[np.generic]
    ) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
        """Each active expert and its matrix in the tensor [E, *extent] at ``address``."""
        nbytes = extent[0] * extent[1] * np.dtype(dtype).itemsize
        for expert, _, _ in self._experts():
            yield expert, array_at(address + expert * nbytes, dtype, extent)

    def _scan_scratch(self, fields: Mapping[str, int | float], plan: ScratchPlan) -> None:
        for item in plan.placed:
            *lead, columns = item.buffer.shape
            dtype = BITS[ITEM_BYTES[item.buffer.dtype]]
            values = array_at(int(fields[item.buffer.name]), dtype, (int(np.prod(lead)), columns))
            self._scratch.append(_record(SCRATCH, item.buffer.name, None, values, scan(values)))

    def _shown(self, census: npt.NDArray[np.float64]) -> Iterator[Record]:
        """What the kernel showed of its steps."""
        for index, tensor in enumerate(OBSERVED):
            again = AGAIN if self._pass_name == "backward" and tensor in FORWARD_TENSORS else ""
            for expert, begin, end in self._experts():
                found = read_record(census[expert, index])
                if found.size:
                    name = OWN_NAMES.get(tensor, tensor) + again
                    yield Record.of(STEP, name, expert, end - begin, found, self._position(found))

    def _position(self, found: Scan, begin: int = 0) -> Position | None:
        """Token and slot of what was found in rows sorted by expert, from row ``begin`` on."""
        if not found.first:
            return None
        route = self._call.route
        row = begin + found.first[0]
        top_k = route.slot_row.size // self._call.tokens
        return Position(int(route.row_token[row]), int(route.row_slot[row] % top_k), row, found.first[1])

    def _routing_weights(self) -> Iterator[Record]:
        for expert, begin, end in self._experts():
            found = scan(self._call.row_weight[begin:end, None])
            position = self._position(found, begin)
            yield Record.of(
                STEP, "weights", expert, end - begin, found, position and replace(position, row=None, column=None)
            )

    def _results(self, fields: Mapping[str, int | float]) -> Iterator[Record]:
        """What the kernel wrote: sums over call, and gradients of the parameters."""
        tokens, hidden = self._call.tokens, self._call.shape.hidden
        for field, dtype in (("result", np.uint16), ("result_float", np.float32)):
            if field in fields:
                found = scan(array_at(int(fields[field]), dtype, (tokens, hidden)))
                position = found.first and Position(token=found.first[0], column=found.first[1])
                yield Record.of(
                    STEP, "out" if self._pass_name == "forward" else "x.grad", None, tokens, found, position
                )
        if "weights_grad" in fields and tokens:
            top_k = self._call.route.slot_row.size // tokens
            found = scan(array_at(int(fields["weights_grad"]), np.float32, (tokens, top_k)))
            position = found.first and Position(token=found.first[0], slot=found.first[1])
            yield Record.of(STEP, "dweights", None, tokens, found, position)
        for projection in PROJECTIONS:
            for parameter, extent in self._lora_extents(projection).items():
                if f"{parameter}_grad" not in fields:
                    continue
                for expert, matrix in self._matrices(int(fields[f"{parameter}_grad"]), extent, np.float32):
                    yield _record(STEP, f"{parameter}.grad", expert, matrix, scan(matrix))


def _record(
    kind: str,
    name: str,
    expert: int | None,
    matrix: npt.NDArray[np.generic],
    found: Scan,
    row: int = 0,
    column: int = 0,
) -> Record:
    """The record of a matrix whose rows are no tokens; it begins at (row, column) of a larger one."""
    position = found.first and Position(row=row + found.first[0], column=column + found.first[1])
    return Record.of(kind, name, expert, matrix.shape[0], found, position)


def _not_finite(matrix: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """[rows, columns] of a matrix of bfloat16 bits, or of float32."""
    if matrix.dtype == np.uint16:
        matrix = (matrix.astype(np.uint32) << 16).view(np.float32)
    bad: npt.NDArray[np.bool_] = ~np.isfinite(matrix)
    return bad
