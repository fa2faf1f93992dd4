"""Tensors of a safetensors checkpoint by name, read one at a time into memory of their own."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from jitmoe.errors import CheckpointError

DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
}
"""torch's names of those of safetensors."""


class Checkpoint:
    """The files of a checkpoint, open for reading.

    They are read and not mapped: pages of a mapped file that were read count as memory of the process.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(map(Path, paths))
        self._files: dict[str, Any] = {}
        for path in self.paths:
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path} is no safetensors file; save the model with save_pretrained() first")
            file = safe_open(str(path), framework="pt", backend="pread")
            self._files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Of all tensors, in the order of the files."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header of its file."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor likewise, by torch's name; by that of safetensors where torch has none."""
        found = str(self._slice(name).get_dtype())
        return DTYPES.get(found, found)

    def raw(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor as it is, or an expert's part of a stacked one [E, ...]."""
        whole = self._slice(name)
        tensor: Tensor = whole[:] if expert is None else whole[expert]
        return tensor

    def read(self, name: str) -> Tensor:
        """A whole tensor, in bfloat16."""
        return self._bfloat16(name, self._slice(name)[:])

    def matrices(self, name: str) -> Callable[[int], Tensor]:
        """A function from an expert's number to its part of a stacked tensor [E, ...], in bfloat16."""
        stacked = self._slice(name)
        return lambda expert: self._bfloat16(name, stacked[expert])

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes, times of change and headers: other contents have another one."""
        digest = hashlib.sha256()
        for path in self.paths:
            info = os.stat(path)
            with path.open("rb") as file:
                header = file.read(8 + min(int.from_bytes(file.read(8), "little"), info.st_size))
            digest.update(f"{path.name} {info.st_size} {info.st_mtime_ns} ".encode())
            digest.update(hashlib.sha256(header).digest())
        return digest.hexdigest()

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise CheckpointError(f"the checkpoint in {self.paths[0].parent} has no tensor {name}")
        return self._files[name].get_slice(name)

    def _bfloat16(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise CheckpointError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; experts are packed from bfloat16, float16 and "
                f"float32, quantised ones need their scales"
            )
        return tensor.to(torch.bfloat16)
