"""What an exchange of rows moved, counted where it moves."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Traffic:
    """What one rank exchanged with others in one call, and in its backward pass so far.

    Attributes:
        rows_out: rows that went to each rank; none to itself.
        rows_in: rows that came from each rank.
        rows_here: rows that stayed.
        bytes_out: bytes that went out, by what they were: counts, tokens, sums; grads, grad_sums.
        bytes_in: bytes that came in, likewise.
    """

    rows_out: list[int]
    rows_in: list[int]
    rows_here: int
    bytes_out: dict[str, int] = field(default_factory=dict)
    bytes_in: dict[str, int] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """Bytes that went out in all."""
        return sum(self.bytes_out.values())

    @property
    def received(self) -> int:
        """Bytes that came in in all."""
        return sum(self.bytes_in.values())

    def count(self, what: str, sent: Tensor | int, received: Tensor | int) -> None:
        """Add a message; tensors are uint8."""
        self.bytes_out[what] = sent if isinstance(sent, int) else sent.numel()
        self.bytes_in[what] = received if isinstance(received, int) else received.numel()
