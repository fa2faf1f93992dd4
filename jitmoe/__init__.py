"""jitmoe: a Mixture-of-Experts layer for fine-tuning on CPUs, with kernels compiled for your model's shapes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jitmoe.config import MoEConfig
from jitmoe.errors import (
    AdapterError,
    BenchError,
    BudgetError,
    BuildError,
    CacheSecurityError,
    CaptureError,
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    DataError,
    FrozenWeightsError,
    InputError,
    InputTypeError,
    IsaError,
    JitmoeError,
    KernelError,
    PackedFileError,
    PeerError,
    PlanError,
    ReplicaError,
    SettingError,
    TraceError,
    TrainError,
    TransformError,
    UnsupportedExpertsError,
    WeightsChangedError,
)
from jitmoe.experts import observer
from jitmoe.experts.workspace import release_memory
from jitmoe.jit.warm import build
from jitmoe.memory.plan import MemoryPlan
from jitmoe.version import __version__ as __version__

if TYPE_CHECKING:
    from jitmoe.experts.functional import Adapters, FusedAdapters, moe_experts, pack_base
    from jitmoe.experts.layer import MoELayer
    from jitmoe.experts.lora_state import load_lora_state_dict, lora_disabled, lora_state_dict, train_lora
    from jitmoe.experts.pack import safetensors_source
    from jitmoe.experts.quantize import quantize
    from jitmoe.experts.quantized import Quantized
    from jitmoe.inspect.tracing import trace

__all__ = [
    "AdapterError",
    "Adapters",
    "BenchError",
    "BudgetError",
    "BuildError",
    "CacheSecurityError",
    "CaptureError",
    "CheckpointError",
    "CheckpointWriteError",
    "ConfigError",
    "DataError",
    "FrozenWeightsError",
    "FusedAdapters",
    "InputError",
    "InputTypeError",
    "IsaError",
    "JitmoeError",
    "KernelError",
    "MemoryPlan",
    "MoEConfig",
    "MoELayer",
    "PackedFileError",
    "PeerError",
    "PlanError",
    "Quantized",
    "ReplicaError",
    "SettingError",
    "TraceError",
    "TrainError",
    "TransformError",
    "UnsupportedExpertsError",
    "WeightsChangedError",
    "build",
    "load_lora_state_dict",
    "lora_disabled",
    "lora_state_dict",
    "moe_experts",
    "pack_base",
    "quantize",
    "release_memory",
    "safetensors_source",
    "trace",
    "train_lora",
]

_LAZY = {
    "Adapters": "jitmoe.experts.functional",
    "FusedAdapters": "jitmoe.experts.functional",
    "MoELayer": "jitmoe.experts.layer",
    "load_lora_state_dict": "jitmoe.experts.lora_state",
    "lora_disabled": "jitmoe.experts.lora_state",
    "lora_state_dict": "jitmoe.experts.lora_state",
    "Quantized": "jitmoe.experts.quantized",
    "moe_experts": "jitmoe.experts.functional",
    "pack_base": "jitmoe.experts.functional",
    "quantize": "jitmoe.experts.quantize",
    "safetensors_source": "jitmoe.experts.pack",
    "trace": "jitmoe.inspect.tracing",
    "train_lora": "jitmoe.experts.lora_state",
}
"""Public names and their modules, loaded at first use: the command line works where torch is missing."""


class _Watchers:
    """:mod:`jitmoe.inspect.watchers`, loaded when a call asks: the experts may not import what looks into them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("jitmoe.inspect.watchers"), name)


observer.hand_over(_Watchers())


def __getattr__(name: str) -> Any:
    if name in ("distributed", "hf"):
        return import_module(f"jitmoe.{name}")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jitmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "distributed", "hf"])
