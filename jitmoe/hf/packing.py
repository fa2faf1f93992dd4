"""Experts packed while transformers loads a checkpoint, matrix by matrix, so that no plain copy of them ever exists.

transformers lets a quantizer change each weight while it is loaded. Ours packs those of experts, as they are: from
per-expert tensors it reads and packs one after the other, where the loader would stack them all first. Other weights
that are quantised are expanded to bfloat16.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from jitmoe.errors import CheckpointError, UnsupportedExpertsError
from jitmoe.hf.checkpoint import Checkpoint
from jitmoe.hf.conversions import STACKED, PackStacked, Quantised, Streaming, WeightNames
from jitmoe.hf.data_parallel import hide_packed
from jitmoe.hf.layout import PARTS, WeightName
from jitmoe.hf.packed import Packed
from jitmoe.hf.packed_folder import PackedFolder
from jitmoe.hf.shipped.places import Targets, packings_of
from jitmoe.hf.shipped.source import Matrix, Source
from jitmoe.hf.understand import is_experts, understand
from jitmoe.hf.weight import PackedWeight
from jitmoe.quantization_config import ADVICE, Scheme

METHOD = "jitmoe"
"""Name of our quantizer in transformers."""


class PackingConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells transformers' loader to let us pack the experts; forgotten when the model is loaded.

    Args:
        folder: for the packed experts.
        schemes: how the weights of the checkpoint are quantised.
    """

    def __init__(self, folder: PackedFolder | None, schemes: Sequence[Scheme] = ()) -> None:
        self.quant_method = METHOD
        self.folder = folder
        self.schemes = schemes


class Packer(HfQuantizer):  # type: ignore[misc]
    """Packs the experts of the model that is being loaded."""

    source: Source

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Look at the experts before anything is read: what is not understood is refused here."""
        self.understood = {name: understand(m) for name, m in model.named_modules() if is_experts(m)}
        if not self.understood:
            raise CheckpointError(f"{type(model).__name__} has no experts modules that transformers knows")
        self.source = Source(Checkpoint(kwargs["checkpoint_files"]), self.quantization_config.schemes)
        self.folder: PackedFolder | None = self.quantization_config.folder

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Put ours in the place of conversions that stack one matrix of each expert, and beside the others.

        What a format makes impossible is refused here, before anything is read and before the folder is touched.
        """
        conversions = [self._streaming(conversion) for conversion in weight_conversions]
        if self.source.quantized:
            targets = Targets(model, conversions)
            layouts = {module: understood.layout for module, understood in self.understood.items()}
            for module, packing in packings_of(layouts, self.source, targets).items():
                self.understood[module] = replace(self.understood[module], packing=packing)
            mine = set(filter(None, (_left(targets, name) for name in self.source.quantized)))
            conversions = [WeightNames(self.source), *conversions, Quantised(mine)]
        self._warn_of_plain()
        if self.folder is not None:
            self.folder.open(self.source.checkpoint.fingerprint())
        return conversions

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

    def pack(self, param_name: str, parts_of: Callable[[int], Sequence[Matrix]]) -> nn.Parameter:
        """The parameter, from a file that was packed before or from the projections of each expert."""
        place = self._place(param_name)
        assert place is not None
        module, name = place
        understood = self.understood[module]
        packed = None if self.folder is None else self.folder.find(module, name, understood)
        if packed is None:
            packed = Packed.of(understood.layout, name, parts_of, understood.packing)
            if self.folder is not None:
                packed = self.folder.keep(module, packed, understood)
        return nn.Parameter(PackedWeight(packed))

    def pack_stacked(self, param_name: str, matrix_of: Callable[[int], Matrix]) -> nn.Parameter:
        """The parameter, from each expert's matrix of a stacked weight."""
        place = self._place(param_name)
        assert place is not None
        module, name = place
        split = self.understood[module].layout.split_any
        return self.pack(param_name, lambda expert: split(matrix_of(expert), PARTS[name]))

    def _warn_of_plain(self) -> None:
        plain = [name for name, understood in self.understood.items() if not understood.packing.quantized]
        if plain and self.quantization_config.schemes:
            formats = " and ".join(dict.fromkeys(scheme.weight_format for scheme in self.quantization_config.schemes))
            warnings.warn(
                f"the checkpoint's quantization_config says {formats}, and the experts of {plain[0]}"
                f"{f' and {len(plain) - 1} more modules' if len(plain) > 1 else ''} have plain weights in its files: "
                f"they are packed in bfloat16",
                stacklevel=2,
            )

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


def _left(targets: Targets, name: str) -> str | None:
    """What the renamings make of a quantised weight that no conversion takes; None of one that is streamed.

    Raises:
        UnsupportedExpertsError: another conversion takes it, which would not know what the tensors are.
    """
    _, pattern = targets.find(name)
    if pattern is None:
        return targets.rename(name)
    if any(isinstance(made, Streaming) and pattern in made.source_patterns for made in targets.converters):
        return None
    raise UnsupportedExpertsError(
        f"{name} is quantised, and transformers makes another weight of it in a way that jitmoe does not know. {ADVICE}"
    )


def offer() -> None:
    """Make transformers know our quantizer."""
    AUTO_QUANTIZER_MAPPING[METHOD] = Packer


def _is_packed(model: Any, name: str) -> bool:
    return isinstance(model.get_parameter(name), PackedWeight)
