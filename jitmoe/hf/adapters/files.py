"""Adapters on the disk: folders and files as they are, without a view on their layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jitmoe.config import read_fields
from jitmoe.errors import AdapterError, ConfigError
from jitmoe.files import replacing, replacing_folder

CONFIG, MODEL, FUSED = "adapter_config.json", "adapter_model.safetensors", "fused_expert_lora.safetensors"

REPLACEABLE = {CONFIG, MODEL, FUSED, "README.md"}
"""What a folder of an adapter holds. A folder with anything else is never replaced."""


@dataclass(frozen=True)
class Tensors:
    """The content of a safetensors file: tensors and its metadata."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


Content = Tensors | Mapping[str, Any]
"""What a file holds: tensors, or a JSON object."""


def read_tensors(path: Path) -> Tensors:
    """A safetensors file.

    Raises:
        AdapterError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # ``safe_open`` is no mapping: keys() is all that it offers.
            return Tensors({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error


def read_metadata(path: Path) -> tuple[set[str], Mapping[str, str]]:
    """Names of the tensors in a safetensors file, and its metadata.

    Raises:
        AdapterError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error


def object_in(path: Path, metadata: Mapping[str, str], field: str) -> dict[str, Any]:
    """The JSON object in a field of a file's metadata; empty where the file has none.

    Raises:
        AdapterError: it is no object.
    """
    text = metadata.get(field, "{}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: {field} in its metadata is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: {field} in its metadata is no object, but {text[:100]!r}")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterError: there is none.
    """
    try:
        return read_fields(path, "as an adapter has it")
    except ConfigError as error:
        raise AdapterError(str(error)) from error


def write(destination: Path, contents: Mapping[str, Content], force: bool) -> None:
    """Write a folder with ``contents``, or, if their only name is empty, a file; whole or not at all.

    Raises:
        AdapterError: ``destination`` exists and ``force`` does not say to replace it, holds what belongs to no
            adapter, or cannot be written.
    """
    _check_destination(destination, "" in contents, force)
    try:
        if "" in contents:
            with replacing(destination) as stream:
                stream.write(_encoded(contents[""]))
            return
        with replacing_folder(destination) as folder:
            for name, content in contents.items():
                with replacing(folder / name) as stream:
                    stream.write(_encoded(content))
    except OSError as error:
        raise AdapterError(f"the adapter cannot be written to {destination}: {error}") from error


def _check_destination(destination: Path, is_file: bool, force: bool) -> None:
    if not destination.exists() and not destination.is_symlink():
        return
    if not force:
        raise AdapterError(f"{destination} exists: choose another name, or replace it with --force")
    if destination.is_dir() == is_file or destination.is_symlink():
        raise AdapterError(f"{destination} is no {'file' if is_file else 'folder'}: it is not replaced, move it away")
    if not is_file:
        foreign = sorted(entry.name for entry in destination.iterdir() if entry.name not in REPLACEABLE)
        if foreign:
            raise AdapterError(f"{destination} holds {', '.join(foreign[:3])}: no folder of an adapter is replaced")


def _encoded(content: Content) -> bytes:
    from safetensors.torch import save

    if isinstance(content, Tensors):
        # Views of one tensor, as gate and up on one A, must be tensors of their own.
        whole = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in content.tensors.items()
        }
        return bytes(save(whole, {"format": "pt", **content.metadata}))
    return f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode()
