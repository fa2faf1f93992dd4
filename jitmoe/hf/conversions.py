"""What transformers' loader does with weights of a checkpoint on our behalf: conversions that read them as they are."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

from jitmoe.errors import CheckpointError
from jitmoe.hf.shipped.source import Matrix, Source

STACKED = {1: [MergeModulelist], 2: [MergeModulelist, Concatenate]}
"""What transformers does with one and with two tensors of each expert where it stacks them as we understand it."""


class WeightNames(WeightRenaming):  # type: ignore[misc]
    """Gives each tensor of a quantised weight the name of the weight: all that follows sees a bfloat16 checkpoint."""

    __slots__ = ("source",)

    def __init__(self, source: Source) -> None:
        super().__init__("tensors of a quantised weight", "weight")
        self.source = source

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The weight's name."""
        return self.source.weight_of(source_key), None


class Streaming(WeightConverter):  # type: ignore[misc]
    """Packs per-expert matrices of the checkpoint one after the other."""

    __slots__ = ("sources",)

    def __init__(self, source_patterns: Any, target_patterns: Any, operations: Any, force_cpu: bool = False) -> None:
        super().__init__(list(source_patterns), list(target_patterns), operations, force_cpu)
        self.sources: dict[str, list[str]] = {}

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Remember the names, which come in the order of the experts."""
        self.sources.setdefault(source_pattern, []).append(source_key)
        super().add_tensor(target_key, source_key, source_pattern, future)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """The packed parameter; nothing that the loader has opened is read."""
        self.collected_tensors.clear()
        experts, source = model.get_submodule(layer_name.rpartition(".")[0]).num_experts, hf_quantizer.source
        columns = [_weights(source, self.sources.get(pattern, [])) for pattern in self.source_patterns]
        for pattern, names in zip(self.source_patterns, columns, strict=True):
            if len(names) != experts:
                raise CheckpointError(
                    f"{layer_name} is made of {experts} tensors {pattern}, and the checkpoint has {len(names)} of them"
                )
        return {layer_name: hf_quantizer.pack(layer_name, partial(_rows, source, columns))}

    def reverse_transform(self) -> Any:
        """Saving is transformers' own business."""
        plain = WeightConverter(self._original_source_patterns, self._original_target_patterns, self.operations)
        plain.scope_prefix, plain.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return plain.reverse_transform()


def _weights(source: Source, tensors: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(map(source.weight_of, tensors)))


def _rows(source: Source, columns: list[list[str]], expert: int) -> list[Matrix]:
    """Projections of one expert, in the order in which the stacking operations of transformers take them."""
    return [source.read(names[expert]) for names in columns]


class Quantised(WeightConverter):  # type: ignore[misc]
    """Takes quantised weights that no other conversion makes: packs stacked experts, and expands all else."""

    __slots__ = ("names", "targets")

    def __init__(self, targets: set[str]) -> None:
        super().__init__(["a quantised weight"], ["weight"], [MergeModulelist()])  # it must have an operation
        self.targets = targets
        self.names: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Quantised":
        """One for each weight, made again for each of its tensors."""
        return Quantised(self.targets)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The same name, and whether this conversion takes it."""
        return source_key, self.source_patterns[0] if source_key in self.targets else None

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """Remember the names."""
        self.names.append(source_key)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """The packed or expanded parameter; nothing that the loader has opened is read."""
        (name,) = _weights(hf_quantizer.source, self.names)
        if hf_quantizer.param_needs_quantization(model, layer_name):
            return {layer_name: hf_quantizer.pack_stacked(layer_name, hf_quantizer.source.matrices(name))}
        parameter = model.get_parameter_or_buffer(layer_name)
        return {layer_name: hf_quantizer.source.expand(name, parameter.shape).to(parameter.dtype)}


class PackStacked(ConversionOps):  # type: ignore[misc]
    """Packs a stacked weight [E, ...]."""

    def __init__(self, packer: Any) -> None:
        self.packer = packer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """From the files where the checkpoint has the very tensor, else from what transformers made of its tensors."""
        source, packed = self.packer.source, {}
        for name, given in input_dict.items():
            stacked = given[0] if isinstance(given, list) else given
            found = source_patterns[0]
            matrix_of = source.matrices(found) if found in source else partial(_matrix, stacked)
            packed[name] = self.packer.pack_stacked(name, matrix_of)
        return packed


def _matrix(stacked: Tensor, expert: int) -> Tensor:
    return stacked[expert].to(torch.bfloat16)
