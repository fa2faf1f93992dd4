"""One record for each tensor of each expert that a traced call looked at."""

from dataclasses import asdict, dataclass

from jitmoe.host.scan import Scan

STEP, PARAMETER, PADDING, SCRATCH = "step", "parameter", "padding", "scratch"
"""Kinds of records. A step's is of its result or input. The others are of the time before the kernel ran: parameters,
the padding of base weights, and scratch; no step reads the contents of the last two."""


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
