"""jitmoe in stock transformers and PEFT: ``jitmoe.hf.register()``, then ``experts_implementation="jitmoe"``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jitmoe.hf.loading import from_pretrained
    from jitmoe.hf.models import pack, unpack
    from jitmoe.hf.quantizing.convert import convert_weights
    from jitmoe.hf.registry import register
    from jitmoe.hf.reporting import report

__all__ = ["convert_weights", "from_pretrained", "pack", "register", "report", "unpack"]

_LAZY = {
    "convert_weights": "jitmoe.hf.quantizing.convert",
    "from_pretrained": "jitmoe.hf.loading",
    "pack": "jitmoe.hf.models",
    "register": "jitmoe.hf.registry",
    "report": "jitmoe.hf.reporting",
    "unpack": "jitmoe.hf.models",
}
"""Public names and their modules, loaded at first use."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jitmoe.hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
