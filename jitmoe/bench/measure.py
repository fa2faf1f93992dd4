"""Measures ceilings and contenders interleaved, A B A B, so that a busy neighbour disturbs all alike."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jitmoe.bench import machine
from jitmoe.bench.ceilings import Ceilings, Rates
from jitmoe.bench.contenders import Contender, check_isa, our_layer
from jitmoe.bench.peers import PEERS, share_memory
from jitmoe.bench.trace import watch
from jitmoe.errors import BenchError
from jitmoe.experts.workspace import arenas
from jitmoe.limits import available_memory
from jitmoe.oracle.data import Base, Batch, batches, make_base, make_lora
from jitmoe.oracle.reference import LoraTensors
from jitmoe.oracle.workloads import FORWARD, TRAINING, Work, Workload, work_of
from jitmoe.plan.shapes import Shape
from jitmoe.progress import track

SEED = 20250

MEMORY_SHARE = 0.6
"""Share of the free memory for the peers' copies of the weights. Their calls allocate the rest."""

DISAGREEMENT = 0.05
"""Largest relative rms difference of two contenders' results; bfloat16 arithmetic stays below 0.01."""


@dataclass
class Measurement:
    """One contender in one pass.

    Attributes:
        contender: that was measured.
        training: forward and backward, else forward alone.
        peak: most bytes that its first call took beyond those before; None where the system does not say.
        scratch: planned bytes of scratch; None for a peer.
        kernels: kernels that really ran; none for a peer.
        seconds: of each round.
        work: least work of the pass; its bytes are those of bfloat16 weights, whatever the contender holds.
        ratios: by instruction set, seconds of this contender over those of our layer in the same rounds.
    """

    contender: Contender
    training: bool
    peak: int | None = None
    scratch: int | None = None
    kernels: tuple[Shape, ...] = ()
    seconds: list[float] = field(default_factory=list)
    work: Work = field(default_factory=lambda: Work(0.0, 0.0))
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def pass_name(self) -> str:
        """Name of the pass."""
        return TRAINING if self.training else FORWARD

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def flops(self) -> float:
        """Useful operations a second."""
        return self.work.flop / self.median

    def roofline_share(self, rates: Rates) -> float:
        """Least possible seconds over the median; 1 is at the roofline."""
        return self.work.roofline_seconds(self.products_ceiling(rates), rates["read"]) / self.median

    def products_ceiling(self, rates: Rates) -> float:
        """Operations a second of the fastest products that the contender can use; a peer's library may use tiles."""
        if not self.contender.bf16_products:
            return rates["fma"]
        vectors = rates.get("bf16", rates["fma"])
        return vectors if self.contender.isa == "avx512_bf16" else rates.get("tmul", vectors)


@dataclass
class Outcome:
    """Measurements of one workload, ceilings of the same rounds, and the peers left out, each with the reason."""

    workload: Workload
    measurements: list[Measurement] = field(default_factory=list)
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def rates(self) -> Rates:
        """Median ceilings."""
        return {name: statistics.median(values) for name, values in self.ceilings.items()}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        isas: instruction sets of our layer.
        peers: names in :data:`~jitmoe.bench.peers.PEERS`.
        repeat: number of rounds.
        lora_dtype: of our adapters.
    """

    isas: tuple[str, ...]
    peers: tuple[str, ...] = ()
    repeat: int = 5
    lora_dtype: str = "float32"


def compare(workload: Workload, options: Options, ceilings: Ceilings) -> Outcome:
    """Measure our layer, the peers and the ceilings on ``workload``.

    Where the peers' copies of the weights do not fit into memory together, the peers run in several batches, each
    beside our layer.

    Raises:
        IsaError: an instruction set cannot run here.
        BenchError: another instruction set ran than was asked for, or two contenders disagree.
    """
    generator = torch.Generator().manual_seed(SEED)
    base, lora = make_base(workload, generator), make_lora(workload, generator)
    ours = [our_layer(workload, isa, base, lora, options.lora_dtype) for isa in options.isas]
    outcome = Outcome(workload)
    outcome.skipped = {name: reason for name in options.peers if (reason := PEERS[name].missing())}
    present = [name for name in options.peers if name not in outcome.skipped]
    rounds = Rounds(workload, batches(workload, generator), ceilings, options.repeat, base.nbytes)
    for names in share_memory(present, base.nbytes, MEMORY_SHARE * available_memory()) or [[]]:
        found = rounds.prepare([*ours, *_build_peers(names, workload, base, lora)], outcome.skipped)
        rounds.run(found)
        # Our layer runs with every batch of peers; its own figures are those of the first.
        outcome.measurements += [m for m in found if m.contender.isa is None or not outcome.ceilings]
        for name, values in rounds.take_ceilings().items():
            outcome.ceilings.setdefault(name, []).extend(values)
        for measurement in found:
            if measurement.contender.isa is None:
                measurement.contender = measurement.contender.without_weights()
    for measurement in outcome.measurements:
        measurement.contender = measurement.contender.without_weights()
    return outcome


class Rounds:
    """Rounds in which all contenders get the same fresh batch, one after the other.

    Args:
        workload: sizes.
        inputs: batches, one a round.
        ceilings: measured at the start of each round.
        repeat: number of rounds.
        base_bytes: bytes of the weights that each contender reads. Where they could stay in the caches, these are
            flushed before each call.
    """

    def __init__(
        self, workload: Workload, inputs: Iterator[Batch], ceilings: Ceilings, repeat: int, base_bytes: int
    ) -> None:
        self._workload, self._inputs, self._ceilings, self._repeat = workload, inputs, ceilings, repeat
        self._flushes = base_bytes < ceilings.read_bytes
        self._rates: list[Rates] = []

    def prepare(self, contenders: Iterable[Contender], skipped: dict[str, str]) -> list[Measurement]:
        """Make the first calls, which compile, are compared, and show how much memory they take.

        A peer that fails goes into ``skipped``.

        Raises:
            BenchError: two contenders disagree, or a result is not finite.
        """
        gc.collect()  # else garbage of the workload before is freed in the middle of a measurement
        batch = next(self._inputs)
        results: dict[str, Tensor] = {}
        measurements = []
        for contender in contenders:
            try:
                first = [_first_call(contender, batch, training) for training in (False, True)]
            except (RuntimeError, ValueError, TypeError) as error:
                if contender.isa is not None:
                    raise
                skipped[contender.name] = str(error).splitlines()[0]
                continue
            for measurement, out in first:
                _check_agreement(contender, out, results)
                measurements.append(measurement)
        return measurements

    def run(self, measurements: Sequence[Measurement]) -> None:
        """Time each contender ``repeat`` times, and fill in what follows from the times."""
        active = []
        for _ in track(range(self._repeat), self._repeat, f"{self._workload.name} round"):
            self._rates.append(self._ceilings.measure())
            batch = next(self._inputs)
            active.append(batch.active)
            for measurement in measurements:
                if self._flushes:
                    self._ceilings.flush()
                measurement.seconds.append(call_once(measurement.contender, batch, measurement.training)[0])
        for measurement in measurements:
            contender, training = measurement.contender, measurement.training
            measurement.work = work_of(self._workload, training, statistics.mean(active), contender.rank)
            measurement.ratios = {
                other.contender.isa: measurement.median / other.median
                for other in measurements
                if other.contender.isa is not None and other.training == training
            }

    def take_ceilings(self) -> dict[str, list[float]]:
        """Ceilings of the rounds since the call before."""
        rates, self._rates = self._rates, []
        return {name: [rate[name] for rate in rates] for name in rates[0]}


def call_once(contender: Contender, batch: Batch, training: bool) -> tuple[float, Tensor]:
    """Seconds of one call and its result; gradients of former calls are dropped first."""
    batch = batch.to(contender.dtype)
    for parameter in contender.parameters:
        parameter.grad = None
    x, weights = (tensor.detach().requires_grad_(training) for tensor in (batch.x, batch.weights))
    with torch.set_grad_enabled(training):
        start = time.perf_counter()
        out = contender.call(x, batch.topk_ids, weights)
        if training:
            torch.autograd.backward(out, batch.out_grad)
        return time.perf_counter() - start, out.detach()


def _first_call(contender: Contender, batch: Batch, training: bool) -> tuple[Measurement, Tensor]:
    if contender.isa is not None:
        call_once(contender, batch, training)  # compiles; that must not count as memory of the call
    arenas.release()
    start = machine.start_peak()
    with watch() as trace:
        _, out = call_once(contender, batch, training)
    measurement = Measurement(contender, training, peak=machine.peak_since(start))
    if contender.isa is not None:
        check_isa(contender.isa, trace.kernel_isa())
        measurement.scratch = trace.scratch
        measurement.kernels = tuple(dict.fromkeys(trace.shapes))
    return measurement, out


def _check_agreement(contender: Contender, out: Tensor, results: dict[str, Tensor]) -> None:
    """Compare ``out`` with the first result of the same function, which ``results`` keeps."""
    if not out.isfinite().all():
        raise BenchError(f"{contender.name} gave a result that is not finite")
    out = out.float()
    first = results.setdefault(contender.comparable, out)
    difference = ((out - first).square().mean() / first.square().mean()).sqrt().item()
    if not difference <= DISAGREEMENT:
        raise BenchError(
            f"{contender.name} differs by {difference:.1%} from another contender's result: not the same layer"
        )


def _build_peers(names: Sequence[str], workload: Workload, base: Base, lora: LoraTensors | None) -> list[Contender]:
    """The peers of these names; those of one dtype share one copy of the weights."""
    contenders = []
    for dtype in dict.fromkeys(PEERS[name].dtype for name in names):
        cast_base = base.to(dtype)
        cast_lora = lora and LoraTensors(*(tensor.to(dtype) for tensor in lora))
        scale = workload.config("ref").lora_scale
        for name in names:
            if PEERS[name].dtype == dtype:
                built = PEERS[name].build(workload, cast_base, cast_lora, scale)
                contenders.append(dataclasses.replace(built, name=name))
    return contenders
