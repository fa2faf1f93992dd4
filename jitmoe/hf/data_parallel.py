"""Keeps packed weights out of DistributedDataParallel, which broadcasts every parameter when it wraps a model."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from jitmoe.hf.weight import PackedWeight

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a model with the names that DistributedDataParallel leaves alone."""

PEFT_PREFIX = "base_model.model."
"""Before the names of a model inside of a PeftModel, which shows this attribute of the model as its own."""


class PackedNames:
    """Names of the packed weights of a model, as they are when somebody asks, and those that it had ignored before.

    Args:
        model: whose weights are packed.
        others: names that were ignored already.
    """

    def __init__(self, model: nn.Module, others: tuple[str, ...] = ()) -> None:
        self.model, self.others = weakref.ref(model), others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        model = self.model()
        for name, parameter in () if model is None else model.named_parameters():
            if isinstance(parameter, PackedWeight):
                yield name
                yield PEFT_PREFIX + name

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        """A copied model has these names until it packs itself."""
        return tuple(self)

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        """So has one in a file."""
        return tuple, (tuple(self),)


def hide_packed(model: nn.Module) -> None:
    """Let DistributedDataParallel around ``model``, or around a PeftModel of it, ignore its packed weights."""
    present = getattr(model, IGNORED, ())
    if not (isinstance(present, PackedNames) and present.model() is model):
        setattr(model, IGNORED, PackedNames(model, tuple(present)))
