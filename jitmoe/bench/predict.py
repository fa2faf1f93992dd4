"""Predicts what a call should take on a machine that is not here, from a dozen named assumptions.

A pass is the sum of its parts, each the slower of its arithmetic and its memory traffic:

    base products   FLOP / (peak x share(rows of an expert))    or   weights of the active experts / bandwidth
    activation      elements of gate and up, in vectors of float32
    movement        rows gathered, packed, saved and added to the tokens' sums
    LoRA            low-rank products and gradients: float32 vectors at a share of their peak, or tiles
    operands        on tiles: vectors that pack LoRA, pair weights in backward and rows of gradients
    fixed           barriers of the steps of each group, Python and autograd

Every number that is on no data sheet is in :class:`Assumptions`, from one thread's loops and the phases of W2 on Zen 3
and Zen 5, or in bench/tile_work.py: tile products are counted, and the vector work beside them is measured.
``jitmoe bench --predict`` prints them, says which is which, and compares the prediction with a measurement of this
machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from jitmoe.bench import tile_work
from jitmoe.bench.measure import Outcome
from jitmoe.bench.tile_work import TILE, Sizes
from jitmoe.isa import ISAS
from jitmoe.oracle.workloads import Workload
from jitmoe.plan.groups import GROUP_BYTES
from jitmoe.plan.scratch import row_bytes
from jitmoe.plan.shapes import ceil_div, plan_kernels
from jitmoe.text import table

PRODUCT_FLOP = 2 * TILE * TILE * 32
"""FLOP of one tile product."""

VECTOR_FLOP = 64
"""FLOP of one cycle of a core in float32 vectors, on CPUs with AMX: what turns their peak into cycles."""


@dataclass(frozen=True)
class Machine:
    """What a machine offers to one call.

    Attributes:
        name: in tables.
        isa: instruction set of the kernels.
        threads: cores used.
        products: FLOP/s of the base products' instruction, all threads.
        vectors: FLOP/s of float32 FMA, all threads.
        bandwidth: bytes/s read from memory.
        source: where the figures come from.
    """

    name: str
    isa: str
    threads: int
    products: float
    vectors: float
    bandwidth: float
    source: str


def _xeon(name: str, sockets: int) -> Machine:
    cores, clock = 56 * sockets, 2.6e9
    return Machine(
        name,
        "amx",
        cores,
        products=cores * clock * 1024,
        vectors=cores * clock * 64,
        bandwidth=sockets * 0.8 * 8 * 4800e6 * 8,
        source="56 cores a socket at 2.6 GHz under AMX load, 1024 and 64 FLOP a cycle, 80 % of 8 channels DDR5-4800",
    )


ABSENT = (
    _xeon("Xeon AMX, 1 socket", 1),
    _xeon("Xeon AMX, 2 sockets", 2),
    Machine(
        "EPYC Zen 5, 64 cores",
        "avx512_bf16",
        64,
        products=64 * 3.6e9 * 128,
        vectors=64 * 3.6e9 * 64,
        bandwidth=0.8 * 12 * 6000e6 * 8,
        source="3.6 GHz, 128 and 64 FLOP a cycle, 80 % of 12 channels DDR5-6000",
    ),
)
"""Machines to predict for. The figures of two sockets assume that each socket reads its own pages of weights, as with
one process a socket; this version does not see to that."""


@dataclass(frozen=True)
class Assumptions:
    """Every number that is on no data sheet.

    Attributes:
        forward_share: share of the products' peak in forward with many rows, by instruction set.
        backward_share: the same in backward, which transposes or pairs weights on the way.
        fill_rows: rows of an expert that reach half of that share, because to expand the weights takes as long for few
            rows; 0 on AMX, whose tiles are counted one by one, as are those of LoRA and the vectors beside them.
        tile_share: share of the TMUL peak on full tiles, as loads, stores and vector code use the same ports.
        activation_slots: FMA issue slots of one vector of gate and up through silu, rounding and packing.
        backward_activation: factor of these slots in backward, which packs three results.
        cache_bandwidth: bytes/s a thread for what moves within caches: gather, pack, saved tensors, sums.
        lora_share: share of the FMA peak that low-rank products reach in forward, whose sides are ranks.
        lora_backward_share: the same of low-rank products and gradients in backward.
        barrier: seconds at 2 threads of one barrier, or of starting a parallel region; they grow with log2(threads).
        python: seconds of one pass outside the kernels.
        read_share: share of the measured read bandwidth that a pass over the weights reaches.
    """

    forward_share: Mapping[str, float] = field(
        default_factory=lambda: {"amx": 1.0, "avx512_bf16": 0.97, "avx512": 0.95, "avx2": 0.89}
    )
    backward_share: Mapping[str, float] = field(
        default_factory=lambda: {"amx": 1.0, "avx512_bf16": 0.91, "avx512": 0.92, "avx2": 0.86}
    )
    fill_rows: Mapping[str, float] = field(
        default_factory=lambda: {"amx": 0.0, "avx512_bf16": 2.0, "avx512": 7.0, "avx2": 9.0}
    )
    tile_share: float = 0.6
    activation_slots: float = 120.0
    backward_activation: float = 3.0
    cache_bandwidth: float = 8e9
    lora_share: float = 0.3
    lora_backward_share: float = 0.17
    barrier: float = 10e-6
    python: float = 0.5e-3
    read_share: float = 0.85


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Prediction:
    """Seconds of one pass, by part; ``bound`` says whether arithmetic or memory limits the base products."""

    parts: Mapping[str, float]
    bound: str

    @property
    def seconds(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts.values())


def predict(
    workload: Workload, machine: Machine, backward: bool, assumed: Assumptions = ASSUMED, weight_bytes: float = 2.0
) -> Prediction:
    """Predict forward, or ``backward`` alone, with base weights of so many bytes an element."""
    active = workload.expected_active()
    rows = workload.slots / active
    flop = 6.0 * workload.slots * workload.hidden * workload.intermediate
    arithmetic = flop / (machine.products * product_share(machine.isa, rows, backward, assumed))
    traffic = (
        3.0 * weight_bytes * active * workload.hidden * workload.intermediate / (machine.bandwidth * assumed.read_share)
    )
    parts = {
        "base products": max(arithmetic, traffic),
        "activation": _activation(workload, machine, backward, assumed),
        "movement": _movement(workload, machine, backward, assumed),
        "LoRA": _lora(workload, machine, backward, assumed),
        "fixed": _fixed(workload, machine, backward, assumed),
    }
    if ISAS[machine.isa].tiles:
        cycles = active * tile_work.vector_cycles(expert_of(workload), backward)
        parts["operands"] = cycles * VECTOR_FLOP / machine.vectors
    return Prediction(parts, "arithmetic" if arithmetic > traffic else "memory")


def product_share(isa: str, rows: float, backward: bool, assumed: Assumptions = ASSUMED) -> float:
    """Share of the products' peak at ``rows`` rows of an expert.

    On AMX tiles are counted, as by the emulator: a product of tiles takes as long with one row as with sixteen.
    """
    shares = assumed.backward_share if backward else assumed.forward_share
    if ISAS[isa].tiles:
        whole = math.ceil(rows)
        return shares[isa] * assumed.tile_share * whole / (TILE * ceil_div(whole, TILE))
    return shares[isa] * rows / (rows + assumed.fill_rows[isa])


def _activation(workload: Workload, machine: Machine, backward: bool, assumed: Assumptions) -> float:
    flop = 2.0 * assumed.activation_slots * workload.slots * workload.intermediate
    return flop * (assumed.backward_activation if backward else 1.0) / machine.vectors


def _movement(workload: Workload, machine: Machine, backward: bool, assumed: Assumptions) -> float:
    """Bytes written and read between the products: rows of x or of both gradients, a or three gradients, sums."""
    hidden, intermediate = workload.hidden, workload.intermediate
    operand = 2 if ISAS[machine.isa].operand == "bfloat16" else 4
    rows = hidden * ((4 if backward else 2) + (2 if backward else 1) * operand + 12)
    between = intermediate * ((3 if backward else 1) * operand + 4)
    return workload.slots * (rows + between) / (machine.threads * assumed.cache_bandwidth)


def expert_of(workload: Workload) -> Sizes:
    """An active expert with the mean number of rows."""
    rows = math.ceil(workload.slots / workload.expected_active())
    return Sizes(rows, workload.hidden, workload.intermediate, workload.rank)


def _lora(workload: Workload, machine: Machine, backward: bool, assumed: Assumptions) -> float:
    if ISAS[machine.isa].tiles:
        products = workload.expected_active() * tile_work.lora_products(expert_of(workload), backward)
        return products * PRODUCT_FLOP / (machine.products * assumed.tile_share)
    flop = (12.0 if backward else 6.0) * workload.rank * (workload.hidden + workload.intermediate) * workload.slots
    return flop / (machine.vectors * (assumed.lora_backward_share if backward else assumed.lora_share))


def _fixed(workload: Workload, machine: Machine, backward: bool, assumed: Assumptions) -> float:
    shape = plan_kernels(workload.config(machine.isa), machine.isa).shapes[-1]
    groups = ceil_div(workload.slots * row_bytes(shape, backward), GROUP_BYTES)
    barriers = 4 * groups + 3
    return assumed.python + barriers * assumed.barrier * math.log2(max(machine.threads, 2))


def check_table(outcomes: Sequence[Outcome], threads: int) -> str:
    """The prediction beside what was measured here, from the ceilings of the same rounds."""
    rows = [("workload", "isa", "pass", "measured ms", "predicted ms", "predicted / measured")]
    for outcome in outcomes:
        rates = outcome.rates()
        for measured in outcome.measurements:
            isa = measured.contender.isa
            assert isa is not None, "peers are not predicted"
            machine = Machine(
                "here", isa, threads, measured.products_ceiling(rates), rates["fma"], rates["read"], "measured"
            )
            passes = (False, True) if measured.training else (False,)
            seconds = sum(predict(outcome.workload, machine, backward).seconds for backward in passes)
            times = f"{1e3 * measured.median:.4g}", f"{1e3 * seconds:.4g}", f"{seconds / measured.median:.2f}"
            rows.append((outcome.workload.name, isa, measured.pass_name, *times))
    return table(rows)


def prediction_table(workloads: list[Workload], machines: tuple[Machine, ...] = ABSENT) -> str:
    """Milliseconds of both passes on every machine, what bounds them, and the assumptions."""
    rows = [
        ("workload", "machine", "forward ms", "backward ms", "bound", "TFLOP/s forward", "largest parts of forward")
    ]
    for workload in workloads:
        for machine in machines:
            forward, backward = (predict(workload, machine, direction) for direction in (False, True))
            flop = 6.0 * workload.slots * workload.hidden * workload.intermediate
            largest = sorted(forward.parts.items(), key=lambda part: -part[1])[:3]
            rows.append(
                (
                    workload.name,
                    machine.name,
                    f"{1e3 * forward.seconds:.4g}",
                    f"{1e3 * backward.seconds:.4g}",
                    forward.bound,
                    f"{flop / forward.seconds / 1e12:.3g}",
                    ", ".join(f"{name} {seconds / forward.seconds:.0%}" for name, seconds in largest),
                )
            )
    sources = [f"{machine.name}: {machine.source}" for machine in machines]
    assumed = [f"{item.name} = {_plain(getattr(ASSUMED, item.name))}" for item in fields(ASSUMED)]
    return "\n".join([table(rows), "", *sources, "", "assumed:", *assumed, "", *_tile_lines(workloads)])


def _tile_lines(workloads: list[Workload]) -> list[str]:
    """What of the figures of AMX is counted, and what is measured."""
    lines = ["counted on AMX, an expert with the mean of rows: share of LoRA in the tile products, forward; backward"]
    for workload in workloads:
        sizes = expert_of(workload)
        shares = []
        for backward in (False, True):
            lora = tile_work.lora_products(sizes, backward)
            shares.append(f"{lora / (lora + tile_work.base_products(sizes)):.1%}")
        lines.append(f"{workload.name}, {sizes.rows} rows, r = {sizes.rank}: {'; '.join(shares)}")
    lines.append("measured, cycles of vectors beside the tiles on one thread of Zen 4:")
    return [*lines, *(f"{name} = {cycles:g}" for name, cycles in tile_work.CYCLES.items())]


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {share:g}" for name, share in value.items())
    return f"{value:g}"
