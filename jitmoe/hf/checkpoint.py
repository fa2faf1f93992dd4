"""Tensors of a safetensors checkpoint by name, read one at a time into memory of their own."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from jitmoe.errors import CheckpointError
from jitmoe.hf.tensor_file import TensorFile

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

    They are read and not mapped: pages of a mapped file that were read count as memory of the process. Of a stacked
    tensor those bytes alone are read that are asked for.

    Raises:
        CheckpointError: a file cannot be read, or is no safetensors file.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(map(Path, paths))
        self._files: dict[str, TensorFile] = {}
        for path in self.paths:
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path} is no safetensors file; save the model with save_pretrained() first")
            file = TensorFile(path)
            self._files |= dict.fromkeys(file.outlines, file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Of all tensors, in the order of the files."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header of its file."""
        return self._file(name).outlines[name][1]

    def dtype(self, name: str) -> str:
        """Of a tensor likewise, by torch's name; by that of safetensors where torch has none."""
        found = self._file(name).outlines[name][0]
        return DTYPES.get(found) or found

    def raw(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor as it is, or an expert's part of a stacked one [E, ...].

        Raises:
            CheckpointError: there is no such tensor or expert, it cannot be read, or torch has no such dtype.
        """
        shape, dtype = self.shape(name), getattr(torch, self.dtype(name), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{name} is {self.dtype(name)}, which torch does not know")
        if expert is not None:
            if not shape or not 0 <= expert < shape[0]:
                raise CheckpointError(f"{name} has shape {list(shape)} and no part {expert}")
            shape = shape[1:]
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype, device="cpu")
        start = (expert or 0) * nbytes
        data = self._file(name).read(name, start, start + nbytes)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)

    def read(self, name: str) -> Tensor:
        """A whole tensor, in bfloat16."""
        return self._bfloat16(name, self.raw(name))

    def matrices(self, name: str) -> Callable[[int], Tensor]:
        """A function from an expert's number to its part of a stacked tensor [E, ...], in bfloat16."""
        self._file(name)
        return lambda expert: self._bfloat16(name, self.raw(name, expert))

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

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            raise CheckpointError(f"the checkpoint in {self.paths[0].parent} has no tensor {name}")
        return self._files[name]

    def _bfloat16(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise CheckpointError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}; experts are packed from bfloat16, float16 and "
                f"float32, quantised ones need their scales"
            )
        return tensor.to(torch.bfloat16)
