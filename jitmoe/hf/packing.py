"""Experts packed while transformers loads a checkpoint, matrix by matrix, so that no plain copy of them ever exists.

transformers lets a quantizer change each weight while it is loaded. Ours packs those of experts: from per-expert
tensors it reads and packs one after the other, where the loader would stack them all first.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from jitmoe.errors import CheckpointError
from jitmoe.hf.checkpoint import Checkpoint
from jitmoe.hf.data_parallel import hide_packed
from jitmoe.hf.layout import PARTS, WeightName
from jitmoe.hf.packed import Packed
from jitmoe.hf.packed_folder import PackedFolder
from jitmoe.hf.understand import is_experts, understand
from jitmoe.hf.weight import PackedWeight

METHOD = "jitmoe"
"""Name of our quantizer in transformers."""

STACKED = {1: [MergeModulelist], 2: [MergeModulelist, Concatenate]}
"""What transformers does with one and with two tensors of each expert where it stacks them as we understand it."""


class PackingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells transformers' loader to let us pack the experts; forgotten when the model is loaded."""

    def __init__(self, folder: PackedFolder | None) -> None:
        self.quant_method = METHOD
        self.folder = folder


class Packer(HfQuantizer):  # type: ignore[misc]
    """Packs the experts of the model that is being loaded."""

    checkpoint: Checkpoint

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Look at the experts before anything is read: what is not understood is refused here."""
        self.understood = {name: understand(m) for name, m in model.named_modules() if is_experts(m)}
        if not self.understood:
            raise CheckpointError(f"{type(model).__name__} has no experts modules that transformers knows")
        self.checkpoint = Checkpoint(kwargs["checkpoint_files"])
        self.folder: PackedFolder | None = self.quantization_config.folder
        if self.folder is not None:
            self.folder.open(self.checkpoint.fingerprint())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Put ours in the place of conversions that stack one matrix of each expert."""
        return [self._streaming(conversion) for conversion in weight_conversions]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is a weight of experts."""
        return self._place(param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        """Packs what the checkpoint has stacked already, or another conversion made."""
        return PackStacked(self)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Forget the quantizer: the model is a bfloat16 model, and is saved and trained as one."""
        self.remove_quantization_config(model)
        if self.folder is not None:
            self.folder.close()
        plain = [f"{name}.{w}" for name in self.understood for w in PARTS if not _is_packed(model, f"{name}.{w}")]
        hide_packed(model)
        if plain:
            raise CheckpointError(f"{', '.join(plain)} were not in the checkpoint, or not under names that are known")

    def is_serializable(self) -> bool:
        """As a plain model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """As a plain model."""
        return True

    def pack(self, param_name: str, parts_of: Callable[[int], Sequence[Tensor]]) -> nn.Parameter:
        """The parameter, from a file that was packed before or from the projections of each expert."""
        place = self._place(param_name)
        assert place is not None
        module, name = place
        understood = self.understood[module]
        packed = None if self.folder is None else self.folder.find(module, name, understood)
        if packed is None:
            packed = Packed.of(understood.layout, name, parts_of)
            if self.folder is not None:
                packed = self.folder.keep(module, packed, understood)
        return nn.Parameter(PackedWeight(packed))

    def split(self, param_name: str, matrix_of: Callable[[int], Tensor], expert: int) -> list[Tensor]:
        """The projections in an expert's matrix of a stacked weight."""
        place = self._place(param_name)
        assert place is not None
        module, name = place
        return self.understood[module].layout.split(matrix_of(expert), PARTS[name])

    def _place(self, param_name: str) -> tuple[str, WeightName] | None:
        """The experts module and the weight of this name."""
        module, _, name = param_name.rpartition(".")
        found = next((weight for weight in PARTS if weight == name and module in self.understood), None)
        return None if found is None else (module, found)

    def _streaming(self, conversion: Any) -> Any:
        targets = getattr(conversion, "_original_target_patterns", [])
        operations = [type(operation) for operation in getattr(conversion, "operations", [])]
        names = [f"{module}.{weight}" for module in self.understood for weight in PARTS]
        ours = len(targets) == 1 and any(re.search(f"{targets[0]}$", name) for name in names)
        if not ours or operations != STACKED.get(len(conversion._original_source_patterns)):
            return conversion
        made = Streaming(conversion._original_source_patterns, targets, conversion.operations)
        made.scope_prefix, made.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        return made


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
        experts = model.get_submodule(layer_name.rpartition(".")[0]).num_experts
        columns = [self.sources.get(pattern, []) for pattern in self.source_patterns]
        for pattern, names in zip(self.source_patterns, columns, strict=True):
            if len(names) != experts:
                raise CheckpointError(
                    f"{layer_name} is made of {experts} tensors {pattern}, and the checkpoint has {len(names)} of them"
                )
        return {layer_name: hf_quantizer.pack(layer_name, partial(_rows, hf_quantizer.checkpoint, columns))}

    def reverse_transform(self) -> Any:
        """Saving is transformers' own business."""
        plain = WeightConverter(self._original_source_patterns, self._original_target_patterns, self.operations)
        plain.scope_prefix, plain.base_model_prefix = self.scope_prefix, self.base_model_prefix
        return plain.reverse_transform()


def _rows(checkpoint: Checkpoint, columns: list[list[str]], expert: int) -> list[Tensor]:
    """Projections of one expert, in the order in which the stacking operations of transformers take them."""
    return [checkpoint.read(names[expert]) for names in columns]


class PackStacked(ConversionOps):  # type: ignore[misc]
    """Packs a stacked weight [E, ...]."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """From the files where the checkpoint has the very tensor, else from what transformers made of its tensors."""
        checkpoint = self.packer.checkpoint
        packed = {}
        for name, given in input_dict.items():
            stacked = given[0] if isinstance(given, list) else given
            source = source_patterns[0]
            matrix_of = checkpoint.matrices(source) if source in checkpoint else partial(_matrix, stacked)
            packed[name] = self.packer.pack(name, partial(self.packer.split, name, matrix_of))
        return packed


def _matrix(stacked: Tensor, expert: int) -> Tensor:
    return stacked[expert].to(torch.bfloat16)


def offer() -> None:
    """Make transformers know our quantizer."""
    AUTO_QUANTIZER_MAPPING[METHOD] = Packer


def _is_packed(model: Any, name: str) -> bool:
    return isinstance(model.get_parameter(name), PackedWeight)
