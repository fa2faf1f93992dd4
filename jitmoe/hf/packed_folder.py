"""Packed experts of a whole model in a folder: written while a checkpoint is loaded first, mapped from then on."""

import json
from pathlib import Path

import torch

from jitmoe.errors import PackedFileError
from jitmoe.experts.pack import open_packed
from jitmoe.experts.packed_file import write_packed
from jitmoe.files import replacing
from jitmoe.hf.layout import PARTS, WeightName
from jitmoe.hf.packed import Packed
from jitmoe.hf.understand import Understood

INDEX = "jitmoe.json"
"""File that says which checkpoint the folder was made from; written last, so a folder without it is begun anew."""


class PackedFolder:
    """The folder, used for one load of a model.

    Args:
        path: of the folder; made where it does not exist.
        verify: read every mapped file once and compare digests.
    """

    def __init__(self, path: Path, verify: bool) -> None:
        self.path, self.verify = path, verify
        self._complete = False
        self._fingerprint = ""
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._packed: dict[str, list[Packed]] = {}
        self._mapped: dict[str, dict[str, torch.Tensor]] = {}

    def open(self, fingerprint: str) -> None:
        """Begin, for the checkpoint with this fingerprint.

        Raises:
            PackedFileError: the folder cannot be made, or was made from another checkpoint; it is unchanged.
        """
        self._fingerprint = fingerprint
        index = self.path / INDEX
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = json.loads(index.read_text(encoding="utf-8")) if index.exists() else None
        except (OSError, ValueError, RecursionError) as error:
            raise PackedFileError(f"packed experts cannot be kept in {self.path}: {error}") from error
        if content is None:
            return
        if not isinstance(content, dict) or content.get("checkpoint") != fingerprint:
            raise PackedFileError(
                f"{self.path} holds the packed experts of another checkpoint, or of this one before it was changed: "
                f"delete the folder or name another one"
            )
        self._complete = True

    def find(self, module: str, name: WeightName, understood: Understood) -> Packed | None:
        """The weight from its file, mapped; None where the folder is still to be written."""
        if not self._complete:
            return None
        if module not in self._mapped:
            experts = open_packed(self._file(module), understood.config(), self.verify)
            self._mapped[module] = {part: packed.tensor for part, packed in experts.items()}
        tensors = {part: self._mapped[module][part] for part in PARTS[name]}
        return Packed(understood.layout, name, tensors, understood.packing)

    def keep(self, module: str, packed: Packed, understood: Understood) -> Packed:
        """Write a module's file as soon as all its weights are there, and let them lie in it from then on."""
        tensors = self._waiting.setdefault(module, {})
        tensors |= packed.tensors
        self._packed.setdefault(module, []).append(packed)
        if len(tensors) == sum(map(len, PARTS.values())):
            path, config = self._file(module), understood.config()
            write_packed(path, config, {part: tensor.numpy() for part, tensor in tensors.items()})
            mapped = open_packed(path, config, verify=False)
            for weight in self._packed.pop(module):
                weight.tensors = {part: mapped[part].tensor for part in weight.parts}
            del self._waiting[module]
        return packed

    def close(self) -> None:
        """Say that the folder is whole."""
        if self._complete or self._waiting:
            return
        with replacing(self.path / INDEX) as stream:
            stream.write(json.dumps({"checkpoint": self._fingerprint}).encode())

    def _file(self, module: str) -> Path:
        return self.path / f"{module}.packed"
