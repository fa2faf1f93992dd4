"""Captures a call of a layer in a file, with everything that it takes to compute the call again elsewhere."""

import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jitmoe.errors import CaptureError, ConfigError
from jitmoe.experts.layer import NEXT_CALL, ON_NONFINITE, MoELayer
from jitmoe.experts.quantized import flat
from jitmoe.files import replacing
from jitmoe.jit import cpu
from jitmoe.plan.projections import LORA_NAMES
from jitmoe.version import __version__

log = logging.getLogger(__name__)

FORMAT = "jitmoe capture 1"
"""Value of ``format`` in every file. Raise the number when the fields change."""

MOST_FILES = 8
"""Most files that :data:`ON_NONFINITE` writes. A file is large, and a NaN in a parameter spoils every call."""


@dataclass(frozen=True, eq=False)
class Captured:
    """One call: the layer, x [T, H], topk_ids and weights [T, K], the LoRA tensors by name, and out [T, H]."""

    layer: MoELayer
    x: Tensor
    topk_ids: Tensor
    weights: Tensor
    lora: Mapping[str, Tensor]
    out: Tensor

    def content(self, backward: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the file holds: plain values and tensors, without the experts that no token chose."""
        config, lora = self.layer.config, self.lora
        kept = self.topk_ids[(self.topk_ids >= 0) & (self.topk_ids < config.num_experts)]
        active: Tensor = torch.unique(kept)
        return {
            "format": FORMAT,
            "config": asdict(config),
            "isa": self.layer.isa,
            "versions": _versions(),
            "experts": active,
            **flat(self.layer.unpack(active.tolist())),
            **{name: bias[active] for name, bias in self.layer.biases().items()},
            **{name: tensor.detach()[active] for name, tensor in lora.items()},
            "x": self.x.detach().clone(),
            "topk_ids": self.topk_ids,
            "weights": self.weights.detach().clone(),
            "out": self.out,
            **{name: t[active] if name.removesuffix("_grad") in lora else t for name, t in backward.items()},
        }


@dataclass
class Capture:
    """A request to capture calls of a layer.

    Attributes:
        path: of the first file; the names of later files end in a number.
        when: :data:`NEXT_CALL` or :data:`ON_NONFINITE`.
        files: files written so far.

    Raises:
        ConfigError: ``when`` is neither.
        CaptureError: ``path`` cannot be written.
    """

    path: Path
    when: str
    files: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.when not in (NEXT_CALL, ON_NONFINITE):
            raise ConfigError(f'when must be "{NEXT_CALL}" or "{ON_NONFINITE}", got {self.when!r}')
        folder = self.path.absolute().parent
        if self.path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise CaptureError(f"{self.path} cannot be written: name a file in a folder that exists and is writable")

    @property
    def finished(self) -> bool:
        """Whether no further call is wanted."""
        return len(self.files) >= (1 if self.when == NEXT_CALL else MOST_FILES)

    def attach(self, layer: nn.Module) -> None:
        """Capture calls of ``layer`` from now on, in place of a capture that was attached before."""
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, Capture):
                del layer._forward_hooks[key]
                layer._forward_hooks_with_kwargs.pop(key, None)
        layer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, layer: MoELayer, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the call if it is wanted: now and, with the gradients, once more after backward.

        Raises:
            CaptureError: the file cannot be written.
        """
        if self.finished:
            return
        given = dict(zip(("x", "topk_ids", "weights"), args, strict=False)) | dict(kwargs)
        x, topk_ids, weights = (given[name].reshape(-1, given[name].shape[-1]) for name in ("x", "topk_ids", "weights"))
        lora = {name: layer.get_parameter(name) for name in LORA_NAMES if layer.config.lora_rank}
        # Users may change these two in place. Of the other tensors autograd notices that.
        ids, result = topk_ids.long().clone(), out.detach().reshape(-1, out.shape[-1]).clone()
        call = Captured(layer, x, ids, weights, lora, result)
        written = [self._write(call, {})] if self._wants({"out": result}) else []

        def after_backward(results: tuple[Tensor | None, ...], given: tuple[Tensor, ...]) -> None:
            x_grad, _, weights_grad, *others = results
            lora_grads = others[-len(LORA_NAMES) :] if lora else []  # behind those of the base, which are None
            names = ("x_grad", "weights_grad", *(f"{name}_grad" for name in LORA_NAMES))
            found = zip(names, (x_grad, weights_grad, *lora_grads), strict=False)
            grads = {name: grad.detach() for name, grad in found if grad is not None}
            backward = {"grad": given[0].detach(), **grads}
            if written or self._wants(backward):
                written[:] = [self._write(call, backward, *written)]

        if out.grad_fn is not None and (written or self.when == ON_NONFINITE):
            node_of(out).register_hook(after_backward)

    def _wants(self, tensors: Mapping[str, Tensor]) -> bool:
        if self.finished:
            return False
        return self.when == NEXT_CALL or not all(tensor.isfinite().all() for tensor in tensors.values())

    def _write(self, call: Captured, backward: Mapping[str, Tensor], path: Path | None = None) -> Path:
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


def node_of(out: Tensor) -> Any:
    """The layer's node in the autograd graph of its result; reshapes come after it."""
    node: Any = out.grad_fn
    while node.name() != "ExpertsBackward":
        node = node.next_functions[0][0]
    return node


def _versions() -> dict[str, str | int]:
    return {
        "jitmoe": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpu": cpu.detect().model,
        "threads": torch.get_num_threads(),
    }
