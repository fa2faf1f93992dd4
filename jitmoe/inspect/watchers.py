"""What the package hands to the experts so that calls can be looked into; see :mod:`jitmoe.experts.observer`."""

from pathlib import Path

from torch import nn

from jitmoe import settings
from jitmoe.experts.observer import Observer
from jitmoe.inspect import tracing
from jitmoe.inspect.capture import Capture
from jitmoe.inspect.checked import Checker

_checker = Checker()


def observer() -> Observer | None:
    """The tracer for JITMOE_TRACE, the checker for JITMOE_CHECKED, or None."""
    return tracing.tracer_of_environment() or (_checker if settings.get("checked") else None)


def capture(layer: nn.Module, path: Path, when: str) -> None:
    """Capture calls of ``layer``; arguments and errors are those of :class:`~jitmoe.inspect.capture.Capture`."""
    Capture(path, when).attach(layer)
