"""Which format each experts module of a model gets from a checkpoint, known before a tensor is read."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from jitmoe.errors import UnsupportedExpertsError
from jitmoe.formats import SQUARE, Packing
from jitmoe.hf.layout import PARTS, Layout
from jitmoe.hf.packed import packing_words
from jitmoe.hf.shipped.source import Source
from jitmoe.quantization_config import ADVICE


class Targets:
    """Where transformers' loader puts the weights of a checkpoint.

    Args:
        model: that is going to be loaded.
        conversions: of transformers, from names of the checkpoint to those of the model.
    """

    def __init__(self, model: Any, conversions: Sequence[Any]) -> None:
        self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.prefix, self.known = model.base_model_prefix, model.state_dict()

    def find(self, name: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of the conversion that makes the weight, if one does."""
        target, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.known)
        return target, pattern

    def rename(self, name: str) -> str:
        """The name before conversions are looked at."""
        renamed: str = apply_renamings(name, self.renamings)
        return renamed


def packings_of(layouts: Mapping[str, Layout], source: Source, targets: Targets) -> dict[str, Packing]:
    """The packing of each experts module that ``source`` has weights of, by name.

    Args:
        layouts: of the experts modules, by name.
        source: the checkpoint.
        targets: where its weights go.

    Raises:
        UnsupportedExpertsError: weights of one module are in several formats, or in one that it cannot be kept in.
    """
    found: dict[str, dict[Packing, str]] = {}
    for name in source.weights() if source.quantized else ():
        module, _, leaf = targets.find(name)[0].rpartition(".")
        if module not in layouts or leaf not in PARTS:
            continue
        found.setdefault(module, {}).setdefault(source.packing(name), name)
        if name in source.quantized and source.quantized[name].stacked:
            _check_stacked(name, layouts[module], source.packing(name), fused=leaf == "gate_up_proj")
    for module, packings in found.items():
        if len(packings) > 1:
            words = " and ".join(f"{name} in {packing_words(packing)}" for packing, name in packings.items())
            raise UnsupportedExpertsError(
                f"the experts of {module} are in more than one format ({words}), and jitmoe keeps those of a module in "
                f"one. {ADVICE}"
            )
    return {module: next(iter(packings)) for module, packings in found.items()}


def _check_stacked(name: str, layout: Layout, packing: Packing, fused: bool) -> None:
    """Whether the scales of gate and up can be told apart, and which axis is the outputs."""
    reason = ""
    if packing.format.name != "mxfp4" and layout.transposed:
        reason = "its matrices are [in, out]"
    elif packing.format.sharing == "square" and fused and (layout.interleaved or layout.intermediate % SQUARE):
        reason = "squares of one scale lie across gate and up"
    if reason:
        raise UnsupportedExpertsError(f"{name} is stacked in {packing.format.name}, and {reason}. {ADVICE}")
