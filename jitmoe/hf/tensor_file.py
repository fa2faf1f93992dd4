"""A safetensors file of which single bytes are read.

safetensors itself reads a whole tensor for each slice of it (0.8, where it does not map the file), and pages of a
mapped file that were read count as memory of the process.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from jitmoe.errors import CheckpointError


class TensorFile:
    """The file, open for reading.

    Attributes:
        outlines: dtype, as safetensors calls it, and shape of each tensor by name, in the order in which they lie.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # The library looks whether the header describes each byte once.
            with safe_open(path, framework="pt"):
                pass
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            header = json.loads(os.pread(self._descriptor, length, 8))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        header.pop("__metadata__", None)
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        ordered = sorted(header, key=places.__getitem__)
        self._starts = {name: 8 + length + places[name][0] for name in ordered}
        self.outlines = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in ordered}

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop`` of a tensor.

        Raises:
            CheckpointError: they cannot be read.
        """
        data = bytearray(stop - start)
        rest, place = memoryview(data), self._starts[name] + start
        try:
            while rest:
                count = os.preadv(self._descriptor, [rest], place)
                if not count:
                    raise CheckpointError(f"{self.path} ends inside {name}: somebody has changed it")
                rest, place = rest[count:], place + count
        except OSError as error:
            raise CheckpointError(f"{name} in {self.path} cannot be read: {error}") from error
        return data
