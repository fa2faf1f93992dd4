"""Traces calls: runs them on traced kernels, and scans what they read and write."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from jitmoe import settings
from jitmoe.errors import TraceError
from jitmoe.experts.observer import Launch, Observer, observing
from jitmoe.host.scan import Scan, empty_records, observe_address, read_record, scan
from jitmoe.inspect.records import PADDING, PARAMETER, SCRATCH, STEP, Position, Record
from jitmoe.inspect.scales import BadScales, bad_scales, read_scales
from jitmoe.inspect.trace_cause import AGAIN, STEPS, Evidence, find_first
from jitmoe.inspect.trace_report import CallTrace, Report
from jitmoe.jit.abi import TENSORS, view_fields
from jitmoe.jit.kernels import array_at
from jitmoe.plan.placement import ITEM_BYTES
from jitmoe.plan.projections import NAMES, Projection, projections
from jitmoe.plan.shapes import K_STEP, N_STRIP, Watch, round_up

log = logging.getLogger(__name__)

OWN_NAMES = {"gate_u": "gate u", "up_u": "up u", "down_u": "down u"} | {f"{name}_du": f"{name} du" for name in NAMES}
"""Names of steps in reports, where they differ from those in the kernels."""

FORWARD_TENSORS = TENSORS[: TENSORS.index("down") + 1]
"""Tensors of forward. Backward shows them again."""

BITS: dict[int, type[np.generic]] = {2: np.uint16, 4: np.float32}
"""dtypes in which :func:`scan` takes elements of 2 and of 4 bytes."""


@contextmanager
def trace() -> Iterator[Report]:
    """Trace every call of every layer, in all threads of the process, until the block ends.

    ::

        with jitmoe.trace() as report:
            loss(model(batch)).backward()
        print(report.first())

    A traced call gives the same bits as any other. It runs on one thread, on a kernel that is compiled at first use,
    and reads all weights of the active experts once more: use it to find a fault, not to train.

    Yields:
        The report, which grows with each pass.
    """
    report = Report()
    _tracer.reports.append(report)
    try:
        with observing(_tracer):
            yield report
    finally:
        _tracer.reports = [other for other in _tracer.reports if other is not report]


class Tracer(Observer):
    """Runs calls on traced kernels, and adds the records to every open report and to that of JITMOE_TRACE."""

    watch: Watch = "values"
    threads = 1  # records need no locks then

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self._always = Report()
        self._warned = False

    @property
    def wanted(self) -> bool:
        """Whether JITMOE_TRACE=1 asks for traces, which it does until the first finding."""
        return bool(settings.get("trace")) and not self._warned

    def check(self, parts: int) -> None:
        """Refuse several parts: sums of one part are not those of the layer, and its columns have other numbers.

        Raises:
            TraceError: there are several.
        """
        if parts > 1:
            raise TraceError(
                f"a layer with tensor_parallel={parts} cannot be traced: give its state_dict() to one with "
                "tensor_parallel=1, which has the same values within rounding"
            )

    @contextmanager
    def around(self, launch: Launch) -> Iterator[None]:
        """Trace one pass."""
        recorder = Recorder(launch)
        with recorder.recording():
            yield
        found, layer_key = recorder.found(), int(launch.record["gate.weights"])
        for report in list(self.reports):
            report.add(found, layer_key)
        if self.wanted:
            self._add_always(found, layer_key)

    def _add_always(self, found: CallTrace, layer_key: int) -> None:
        """Add a pass to the report of JITMOE_TRACE, and forget it again unless it has a finding."""
        if self._always.add(found, layer_key).first:
            self._warned = True
            # The text is made now: a handler may format it later, when the calls are gone.
            text = self._always.table()
            log.warning("JITMOE_TRACE: the first value that is not finite; later calls are not traced\n%s", text)
        self._always.calls.clear()


_tracer = Tracer()


def tracer_of_environment() -> Tracer | None:
    """The tracer, if JITMOE_TRACE wants it."""
    return _tracer if _tracer.wanted else None


class Recorder:
    """Scans one pass and makes its records."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._record = launch.record
        self._pass_name = launch.pass_name
        self._projections = projections(launch.shape.hidden, launch.shape.intermediate)
        self._parameters: list[Record] = []
        self._bad_weights: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        self._bad_scales: dict[tuple[str, int], BadScales] = {}
        self._scratch: list[Record] = []
        self._steps: list[Record] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Scan parameters and scratch before the kernel runs; afterwards read its census and scan its results."""
        self._scan_parameters()
        self._scan_scratch()
        active = self._launch.route.active
        census = empty_records(int(active[-1]) + 1 if active.size else 1, len(TENSORS))
        self._record["census"], self._record["observe"] = census.ctypes.data, observe_address()
        yield
        steps = [*self._shown(census), *self._routing_weights(), *self._results()]
        order = {step.name: place for place, step in enumerate(STEPS[self._pass_name])}
        self._steps = sorted(steps, key=lambda record: order[record.name])

    def found(self) -> CallTrace:
        """Records of the pass and the finding."""
        shape = self._launch.shape
        records = (*self._parameters, *self._scratch, *self._steps)
        rows = max((record.rows for record in self._steps), default=0)
        terms = max(shape.hidden, shape.intermediate, rows) * max(1.0, abs(float(self._record["scale"])))
        first = find_first(Evidence(self._pass_name, records, self._bad_weights, self._bad_scales, terms))
        return CallTrace(self._pass_name, shape.name, records, first)

    def _experts(self) -> Iterator[tuple[int, int, int]]:
        """Each active expert with its first row and the row behind its last one."""
        route = self._launch.route
        yield from zip(route.active.tolist(), route.offsets[:-1].tolist(), route.offsets[1:].tolist(), strict=True)

    def _scan_parameters(self) -> None:
        for projection in self._projections:
            self._scan_base(projection)
            field = f"{projection.name}.bias"
            for expert, _, _ in self._experts() if self._record[field] else ():
                at = int(self._record[field]) + expert * projection.out * 4
                self._scan_parameter(projection.bias_name, expert, array_at(at, np.float32, (projection.out, 1)))
        dtype = np.uint16 if self._launch.shape.lora_bf16 else np.float32
        for projection in self._projections:
            for parameter, extent in self._lora_extents(projection).items():
                for expert, matrix in self._matrices(_field(parameter), extent, dtype):
                    self._scan_parameter(parameter, expert, matrix)

    def _scan_base(self, projection: Projection) -> None:
        """Scan base weights and their padding."""
        out, in_ = projection.out, projection.in_
        matrix = np.empty((round_up(out, N_STRIP), round_up(in_, K_STEP)), np.uint16)
        padding: list[Record] = []
        kernels, packing = self._launch.kernels, self._launch.shape.packing
        for expert, _, _ in self._experts():
            at = int(self._record[f"{projection.name}.weights"]) + expert * packing.packed_bytes(out, in_)
            kernels.decode(at, matrix.ctypes.data, 1, *matrix.shape, 1)
            self._scan_parameter(projection.base_name, expert, matrix[:out, :in_])
            if packing.quantized:
                scales = read_scales(kernels, packing, at, out, in_)
                self._parameters.append(_record(PARAMETER, projection.scale_name, expert, scales, scan(scales)))
                if bad := bad_scales(packing, scales, in_):
                    self._bad_scales[projection.base_name, expert] = bad
            for row, column, part in ((0, in_, matrix[:, in_:]), (out, 0, matrix[out:, :in_])):
                padding.append(_record(PADDING, projection.base_name, expert, part, scan(part), row, column))
        self._parameters += padding

    def _scan_parameter(self, name: str, expert: int, matrix: npt.NDArray[np.generic]) -> None:
        found = scan(matrix)
        self._parameters.append(_record(PARAMETER, name, expert, matrix, found))
        if found.first:
            self._bad_weights[name, expert] = _not_finite(matrix)

    def _lora_extents(self, projection: Projection) -> dict[str, tuple[int, int]]:
        rank = int(self._record["rank"])
        if not rank:
            return {}
        shapes = projection.lora_shapes(1, rank)
        return {name: (rows, columns) for name, (_, rows, columns) in shapes.items()}

    def _matrices(
        self, field: str, extent: tuple[int, int], dtype: type[np.generic]
    ) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
        """Each active expert and its matrix in the view ``field`` of the record."""
        address, stride, *strides = (int(self._record[name]) for name in view_fields(field))
        item = np.dtype(dtype).itemsize
        for expert, _, _ in self._experts():
            yield expert, array_at(address + expert * stride * item, dtype, extent, (strides[0], strides[1]))

    def _scan_scratch(self) -> None:
        for item in self._launch.plan.placed:
            *lead, columns = item.buffer.shape
            dtype = BITS[ITEM_BYTES[item.buffer.dtype]]
            values = array_at(int(self._record[item.buffer.name]), dtype, (int(np.prod(lead)), columns))
            self._scratch.append(_record(SCRATCH, item.buffer.name, None, values, scan(values)))

    def _shown(self, census: npt.NDArray[np.float64]) -> Iterator[Record]:
        """Records of the tensors that the kernel has shown."""
        for index, tensor in enumerate(TENSORS):
            again = AGAIN if self._pass_name == "backward" and tensor in FORWARD_TENSORS else ""
            for expert, begin, end in self._experts():
                found = read_record(census[expert, index])
                if found.size:
                    name = OWN_NAMES.get(tensor, tensor) + again
                    yield Record.of(STEP, name, expert, end - begin, found, self._position(found))

    def _position(self, found: Scan, begin: int = 0) -> Position | None:
        """Position of the first value that is not finite, in rows sorted by expert from row ``begin`` on."""
        if not found.first:
            return None
        route = self._launch.route
        row = begin + found.first[0]
        slot = int(route.row_slot[row] % self._launch.top_k)
        return Position(int(route.row_token[row]), slot, row, found.first[1])

    def _routing_weights(self) -> Iterator[Record]:
        for expert, begin, end in self._experts():
            found = scan(self._launch.row_weight[begin:end, None])
            position = self._position(found, begin)
            yield Record.of(
                STEP, "weights", expert, end - begin, found, position and replace(position, row=None, column=None)
            )

    def _results(self) -> Iterator[Record]:
        """Records of what the kernel wrote: sums over experts, and gradients of parameters."""
        tokens, hidden = int(self._record["tokens"]), self._launch.shape.hidden
        for field, dtype in (("result", np.uint16), ("result_float", np.float32)):
            if self._record[field]:
                found = scan(array_at(int(self._record[field]), dtype, (tokens, hidden)))
                position = found.first and Position(token=found.first[0], column=found.first[1])
                name = "out" if self._pass_name == "forward" else "x.grad"
                yield Record.of(STEP, name, None, tokens, found, position)
        if self._record["weights_grad"] and tokens:
            found = scan(array_at(int(self._record["weights_grad"]), np.float32, (tokens, self._launch.top_k)))
            position = found.first and Position(token=found.first[0], slot=found.first[1])
            yield Record.of(STEP, "dweights", None, tokens, found, position)
        for projection in self._projections:
            for parameter, extent in self._lora_extents(projection).items():
                field = f"{_field(parameter)}_grad"
                for expert, matrix in self._matrices(field, extent, np.float32) if self._record[field] else ():
                    yield _record(STEP, f"{parameter}.grad", expert, matrix, scan(matrix))


def _field(parameter: str) -> str:
    """``gate.a`` for ``gate_lora_a``."""
    return parameter.replace("_lora_", ".")


def _record(
    kind: str,
    name: str,
    expert: int | None,
    matrix: npt.NDArray[np.generic],
    found: Scan,
    row: int = 0,
    column: int = 0,
) -> Record:
    """The record of a matrix whose rows are no tokens; the matrix begins at (row, column) of a larger one."""
    position = found.first and Position(row=row + found.first[0], column=column + found.first[1])
    return Record.of(kind, name, expert, matrix.shape[0], found, position)


def _not_finite(matrix: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """[rows, columns] bool, True where a value is not finite, of a matrix of bfloat16 bits or float32."""
    if matrix.dtype == np.uint16:
        matrix = (matrix.astype(np.uint32) << 16).view(np.float32)
    bad: npt.NDArray[np.bool_] = ~np.isfinite(matrix)
    return bad
