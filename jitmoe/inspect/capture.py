"""One call of a layer in one file: everything that it takes to compute it again elsewhere."""

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jitmoe.config import MoEConfig
from jitmoe.errors import CaptureError, ConfigError
from jitmoe.files import replacing
from jitmoe.jit import cpu
from jitmoe.oracle.reference import LoraTensors

log = logging.getLogger(__name__)

FORMAT = "jitmoe capture 1"
"""Value of ``format`` in every file; another one is another version of the fields."""

NEXT_CALL, ON_NONFINITE = "next_call", "on_nonfinite"

MOST_FILES = 8
"""Files that :data:`ON_NONFINITE` writes: after a parameter has become NaN so does every call, and a file is large."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call under way.

    Attributes:
        config: of the layer.
        isa: that the layer runs on.
        unpack: from experts to their canonical base weights, under the names of the constructor.
        x: [T, H].
        topk_ids: [T, K].
        weights: [T, K].
        lora: the six tensors, or none.
        out: [T, H].
    """

    config: MoEConfig
    isa: str
    unpack: Callable[[Sequence[int]], dict[str, Tensor]]
    x: Tensor
    topk_ids: Tensor
    weights: Tensor
    lora: Sequence[Tensor]
    out: Tensor

    def content(self, backward: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the file holds: plain values and tensors. Experts that no token chose are left out."""
        kept = self.topk_ids[(self.topk_ids >= 0) & (self.topk_ids < self.config.num_experts)]
        active: Tensor = torch.unique(kept)
        lora = dict(zip(LoraTensors._fields, self.lora, strict=False))
        return {
            "format": FORMAT,
            "config": asdict(self.config),
            "isa": self.isa,
            "versions": _versions(),
            "experts": active,
            **self.unpack(active.tolist()),
            **{name: tensor.detach()[active] for name, tensor in lora.items()},
            "x": self.x.detach().clone(),
            "topk_ids": self.topk_ids,
            "weights": self.weights.detach().clone(),
            "out": self.out,
            **{name: t[active] if name.removesuffix("_grad") in lora else t for name, t in backward.items()},
        }


@dataclass
class Capture:
    """What a layer was asked to capture.

    Attributes:
        path: of the file; from the second one on a number is added to its name.
        when: :data:`NEXT_CALL` or :data:`ON_NONFINITE`.
        files: written so far.
    """

    path: Path
    when: str
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.when not in (NEXT_CALL, ON_NONFINITE):
            raise ConfigError(f'capture must be "{NEXT_CALL}" or "{ON_NONFINITE}", got {self.when!r}')
        folder = self.path.absolute().parent
        if self.path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise CaptureError(f"{self.path} cannot be written: name a file in a folder that exists and is writable")

    @property
    def finished(self) -> bool:
        """Whether no further call is wanted."""
        return len(self.files) >= (1 if self.when == NEXT_CALL else MOST_FILES)

    def watch(self, call: Call) -> None:
        """Write ``call`` if it is asked for: now and, with what backward adds, after it."""
        node = call.out.grad_fn
        # Copies, because users may change both in place; autograd itself sees to the other tensors.
        call = replace(call, topk_ids=call.topk_ids.long().clone(), out=call.out.detach().clone())
        written = [self._write(call, {})] if self._wants({"out": call.out}) else []

        def after_backward(results: tuple[Tensor | None, ...], given: tuple[Tensor, ...]) -> None:
            names = ("x_grad", "weights_grad", *(f"{name}_grad" for name in LoraTensors._fields))
            grads = {name: grad.detach() for name, grad in zip(names, results, strict=False) if grad is not None}
            backward = {"grad": given[0].detach(), **grads}
            if written or self._wants(backward):
                written[:] = [self._write(call, backward, *written)]

        if node is not None and (written or self.when == ON_NONFINITE):
            node.register_hook(after_backward)

    def _wants(self, tensors: Mapping[str, Tensor]) -> bool:
        if self.finished:
            return False
        return self.when == NEXT_CALL or not all(tensor.isfinite().all() for tensor in tensors.values())

    def _write(self, call: Call, backward: Mapping[str, Tensor], path: Path | None = None) -> Path:
        """Write ``call`` to ``path``, or to the next file."""
        if path is None:
            number = len(self.files) + 1
            path = self.path if number == 1 else self.path.with_stem(f"{self.path.stem}-{number}")
        try:
            with replacing(path) as stream:
                torch.save(call.content(backward), stream)
        except OSError as error:
            raise CaptureError(f"a call cannot be captured in {path}: {error}") from error
        if path not in self.files:
            self.files.append(path)
        log.log(logging.INFO if self.when == NEXT_CALL else logging.WARNING, "captured a call in %s", path)
        return path


def _versions() -> dict[str, str | int]:
    import jitmoe

    return {
        "jitmoe": jitmoe.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": cpu.detect().model,
        "threads": torch.get_num_threads(),
    }
