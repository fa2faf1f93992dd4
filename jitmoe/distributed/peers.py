"""The other processes of a group, and rows to and from them: every failure is an error that says which rank failed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jitmoe.errors import PeerError


@contextmanager
def peer_errors(rank: int, what: str) -> Iterator[None]:
    """What torch.distributed raises inside, as :class:`PeerError`."""
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:
        raise PeerError(
            f"rank {rank}: {what} failed: another process ended, or did not answer within the timeout that "
            f"init_process_group() was given ({str(error).strip().splitlines()[0]}). Look for the first error of the "
            "other ranks; then start all of them again"
        ) from error


@dataclass(frozen=True, eq=False)
class Peers:
    """The processes of ``group`` (None: all), and this one's place among them."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any = None) -> "Peers":
        """Those of a process group.

        Raises:
            PeerError: torch.distributed is not initialised, or this process is not in the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise PeerError("torch.distributed is not initialised: call torch.distributed.init_process_group('gloo')")
        rank = dist.get_rank(group)
        if rank < 0:
            raise PeerError(f"process {dist.get_rank()} is not in the group that it was given")
        return cls(group, rank, dist.get_world_size(group))

    def send(self, rows: Tensor, to: Sequence[int], come: Sequence[int], what: str) -> "Pending":
        """Begin to exchange ``rows`` [sum(to), bytes] uint8 for [sum(come), bytes], cut by rank; none goes to oneself.

        Every rank of the group has to call it, with numbers that agree.
        """
        assert rows.dtype == torch.uint8 and to[self.rank] == come[self.rank] == 0
        received = torch.empty(sum(come), rows.shape[1], dtype=torch.uint8)
        if self.size == 1:
            return Pending(self.rank, what, received, rows, None)
        with peer_errors(self.rank, what):
            rows = rows.contiguous()
            work = dist.all_to_all_single(received, rows, list(come), list(to), group=self.group, async_op=True)
        return Pending(self.rank, what, received, rows, work)

    def tell(self, numbers: Tensor, what: str) -> Tensor:
        """Tell rank r ``numbers[r]`` (int64 [size, n]), and hear from each; waits."""
        heard = torch.empty_like(numbers)
        if self.size == 1:
            return heard.copy_(numbers)
        with peer_errors(self.rank, what):
            dist.all_to_all_single(heard, numbers.contiguous(), group=self.group)
        return heard

    def gather(self, numbers: Tensor, what: str) -> Tensor:
        """``numbers`` (int64) of all ranks, in the order of the ranks."""
        found = [torch.empty_like(numbers) for _ in range(self.size)]
        with peer_errors(self.rank, what):
            dist.all_gather(found, numbers.contiguous(), group=self.group)
        return torch.stack(found)


@dataclass(eq=False)
class Pending:
    """Rows on their way. Their memory may be read once :meth:`wait` has returned, and not before."""

    rank: int
    what: str
    received: Tensor = field(repr=False)
    sent: Tensor = field(repr=False)
    work: Any

    def wait(self) -> Tensor:
        """The rows that came.

        Raises:
            PeerError: a process ended, or took longer than the group's timeout.
        """
        if self.work is not None:
            with peer_errors(self.rank, self.what):
                self.work.wait()
            self.work = None
        return self.received
