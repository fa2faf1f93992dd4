"""A transformers checkpoint in a folder: its config, its tensors, and the files beside them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jitmoe.config import read_fields
from jitmoe.errors import CheckpointError, ConfigError
from jitmoe.hf.quantizing.names import QUANTIZED_KEYS, QUANTIZED_SUFFIXES
from jitmoe.hf.tensor_file import TensorFile

CONFIG, SINGLE = "config.json", "model.safetensors"
INDEX = f"{SINGLE}.index.json"

WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz"),
}
"""Files of weights, which are not copied as they are."""


class Source:
    """The checkpoint, open for reading. Links are followed: snapshots of the hub are made of them.

    Attributes:
        config: content of config.json.
        outlines: dtype, as safetensors calls it, and shape of each tensor by name, in the order of the files.
        companions: files to copy as they are, such as those of the tokenizer, by their path in the folder.
        left_out: likewise files of other weights.

    Raises:
        CheckpointError: no such folder, nothing in safetensors files, tensors are missing, or weights are quantised.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is no folder; name one with a checkpoint (huggingface_hub.snapshot_download(name) makes one)"
            )
        self.folder = folder
        self.config = _json(folder / CONFIG)
        text = self.config.get("text_config") or {}
        for key in QUANTIZED_KEYS:
            if key in self.config or key in text:
                raise CheckpointError(f"the weights in {folder} are quantised: {CONFIG} has a {key}. Take the original")
        places = _places(folder)
        files = [TensorFile(folder / name) for name in sorted(set(places.values()))]
        self.outlines: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._files: dict[str, TensorFile] = {}
        for file in files:
            for name in file.outlines.keys() & self.outlines.keys():
                raise CheckpointError(f"{name} is in {self._files[name].path} and in {file.path}: keep one of the two")
            self.outlines |= file.outlines
            self._files |= dict.fromkeys(file.outlines, file)
        self._check(places)
        self.companions, self.left_out = _companions(folder, set(places.values()))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes ``start`` to ``stop`` of a tensor, as uint8.

        Raises:
            CheckpointError: the file cannot be read.
        """
        return torch.frombuffer(self._files[name].read(name, start, stop), dtype=torch.uint8)

    def _check(self, places: dict[str, str]) -> None:
        for name, file in places.items():
            if name and name not in self.outlines:
                raise CheckpointError(f"{self.folder / INDEX} says that {name} is in {file}, and it is not")
        for name in self.outlines:
            if name.endswith(QUANTIZED_SUFFIXES):
                raise CheckpointError(
                    f"the weights in {self.folder} are quantised: there is a {name}. Take the original"
                )


def _places(folder: Path) -> dict[str, str]:
    """The file of each tensor; of the empty name where a single file has all of them."""
    if (folder / SINGLE).exists():
        return {"": SINGLE}
    if not (folder / INDEX).exists():
        others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in WEIGHT_SUFFIXES)
        found = f"; it has {', '.join(others[:3])}" if others else ""
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}{found}. Save the model with save_pretrained() first"
        )
    places = _json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    return places


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_fields(path, "as a checkpoint has it")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _companions(folder: Path, shards: set[str]) -> tuple[list[Path], list[Path]]:
    """Files to copy and files to leave out; those that are read or made anew are neither."""
    companions: list[Path] = []
    left_out: list[Path] = []
    for path in _files(folder):
        inside = path.relative_to(folder)
        if str(inside) in {CONFIG, INDEX, *shards}:
            continue
        foreign = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        (left_out if foreign else companions).append(inside)
    return companions, left_out


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder but hidden ones; a folder that links lead to again is entered once."""
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in entered
        )  # fmt: skip
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(place, name)
                if not path.is_file():
                    raise CheckpointError(f"{path} is no regular file, or a link to nothing: remove it or bring it")
                yield path
