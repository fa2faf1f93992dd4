"""The checkpoint to train: a local folder of transformers, looked at before anything of it is loaded."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.config import read_fields
from jitmoe.errors import ConfigError, TrainError, UnsupportedExpertsError
from jitmoe.quantization_config import Scheme, find_config, read_schemes

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
"""Files of which a folder with a tokenizer has one at least."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that has all that training needs.

    Attributes:
        path: of the folder.
        shards: files of weights.
        dtypes: of the weights, as safetensors names them: "BF16", "F32".
        digest: of the config and of the names, shapes and dtypes of the weights.
        schemes: how weights are quantised; none where they are not.
    """

    path: Path
    shards: tuple[Path, ...]
    dtypes: tuple[str, ...]
    digest: str
    schemes: tuple[Scheme, ...]


def open_folder(path: Path) -> ModelFolder:
    """Look at ``path``.

    Raises:
        TrainError: it is no folder, lacks config, weights or tokenizer, or its weights are damaged, or
            quantised in a way that jitmoe does not read.
    """
    if not path.is_dir():
        raise TrainError(f"{path} is not a folder: give a local checkpoint with config.json, weights and tokenizer")
    if not (path / "config.json").is_file():
        raise TrainError(f"{path} has no config.json: it is not a transformers checkpoint")
    try:
        config = read_fields(path / "config.json", "the config of a transformers model")
        shards = [path / name for name in _shards(path)]
    except ConfigError as error:
        raise TrainError(str(error)) from error
    found = find_config(config)
    try:
        schemes = () if found is None else read_schemes(found)
    except UnsupportedExpertsError as error:
        raise TrainError(f"{path}: {error}") from error
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise TrainError(f"{path} has no tokenizer ({', '.join(TOKENIZERS)}): copy that of the model into the folder")
    headers = [header for shard in shards for header in _headers(shard)]
    digest = hashlib.sha256((path / "config.json").read_bytes() + repr(sorted(headers)).encode()).hexdigest()
    return ModelFolder(path, tuple(shards), tuple(sorted({dtype for _, _, dtype in headers})), digest, schemes)


def _shards(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        names = read_fields(path / INDEX, "the index of the weights").get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise TrainError(f"{path / INDEX} has no weight_map")
        shards = sorted(set(names.values()))
    else:
        shards = [WEIGHTS]
    missing = [name for name in shards if not (path / name).is_file()]
    if missing:
        raise TrainError(f"{path} lacks {len(missing)} of {len(shards)} files of weights: {missing[0]} ...")
    return shards


def _headers(shard: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                found: Any = tensors.get_slice(name)
                yield name, tuple(found.get_shape()), found.get_dtype()
    except (SafetensorError, OSError) as error:
        raise TrainError(f"{shard} is damaged: {error}") from error
