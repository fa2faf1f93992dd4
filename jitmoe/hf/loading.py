"""Models from checkpoints, with experts that are packed as they are read."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jitmoe.errors import CheckpointError, UnsupportedExpertsError
from jitmoe.hf.packed_folder import PackedFolder
from jitmoe.hf.peft_lora import IMPLEMENTATION
from jitmoe.hf.registry import register
from jitmoe.quantization_config import Scheme, read_schemes


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    packed: str | os.PathLike[str] | None = None,
    verify: bool = True,
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """Load a model as ``AutoModelForCausalLM.from_pretrained`` does, with experts packed straight from the files.

    Experts are read and packed one matrix at a time: what is held at once is the model and one expert. Where they are
    quantised (fp8 in 128 x 128 blocks, compressed-tensors, symmetric GPTQ, mxfp4) they stay so, and compute what
    bfloat16(code * scale) would; all other weights are expanded to that.

    Args:
        folder: a checkpoint in safetensors files.
        packed: folder for packed experts. The first load writes them there; later ones map these files, which all
            processes share, and read no experts from the checkpoint.
        verify: read each file in ``packed`` once and compare digests, or a damaged weight would be a wrong result.
        model_class: a class with ``from_pretrained``, by default ``AutoModelForCausalLM``.
        **kwargs: for its ``from_pretrained``. ``dtype`` is bfloat16 unless given.

    Returns:
        The model, as transformers makes it, in evaluation mode and with ``experts_implementation="jitmoe"``.

    Raises:
        UnsupportedExpertsError: experts that jitmoe has no kernel for, or weights quantised in a way that it does not
            read; nothing was read yet.
        CheckpointError: no such folder, or the checkpoint lacks tensors, or holds ones that cannot be packed.
        PackedFileError: ``packed`` cannot be written or read, or holds the experts of another checkpoint.
    """
    register()
    from transformers import AutoConfig, AutoModelForCausalLM

    from jitmoe.hf import packing

    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{folder} is no folder; name one with a checkpoint (huggingface_hub.snapshot_download(name) makes one)"
        )
    config = copy.deepcopy(kwargs.pop("config", None) or AutoConfig.from_pretrained(folder))
    schemes = _take_schemes(config, folder)
    packing.offer()
    kept = None if packed is None else PackedFolder(Path(packed), verify)
    return (model_class or AutoModelForCausalLM).from_pretrained(
        folder,
        config=config,
        experts_implementation=IMPLEMENTATION,
        quantization_config=packing.PackingConfig(kept, schemes),
        **{"dtype": torch.bfloat16, **kwargs},
    )


def _take_schemes(config: Any, folder: str | os.PathLike[str]) -> tuple[Scheme, ...]:
    """How the weights are quantised, off the config: transformers would choose its own loader by it."""
    for holder in (config, config.get_text_config()):
        found = getattr(holder, "quantization_config", None)
        if found:
            del holder.quantization_config
            try:
                return read_schemes(found if isinstance(found, Mapping) else found.to_dict())
            except UnsupportedExpertsError as error:
                raise UnsupportedExpertsError(f"{folder}: {error}") from error
    return ()
