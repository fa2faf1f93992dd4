"""Contenders: a function from a batch to its result, and what must be known to judge its time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jitmoe import settings
from jitmoe.config import MoEConfig
from jitmoe.errors import BenchError
from jitmoe.experts.layer import MoELayer
from jitmoe.experts.quantize import quantize
from jitmoe.experts.quantized import Quantized
from jitmoe.formats import WeightFormat
from jitmoe.isa import ISAS
from jitmoe.jit.capability import resolve_isa
from jitmoe.jit.warm import build
from jitmoe.oracle.data import Base
from jitmoe.oracle.reference import LoraTensors
from jitmoe.oracle.workloads import Workload


@dataclass(frozen=True)
class Contender:
    """One implementation of the layer, ready to be called.

    Attributes:
        name: in tables.
        call: (x, topk_ids, weights) -> out, differentiable.
        parameters: trainable tensors, whose gradients are dropped before each call.
        dtype: of x and out.
        rank: LoRA rank that the contender really computes, 0 for none.
        bf16_products: it multiplies bfloat16 pairs, so the peak of these products is its ceiling.
        isa: instruction set that it must run on; None for a peer.
        comparable: contenders with the same text compute the same function of the same values.
    """

    name: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    dtype: torch.dtype
    rank: int
    bf16_products: bool
    isa: str | None = None
    comparable: str = "lora"

    def without_weights(self) -> "Contender":
        """This contender for tables: it holds no memory, and a call raises BenchError."""
        return replace(self, call=_spent, parameters=())


def _spent(*_: Tensor) -> Tensor:
    raise BenchError("this contender was measured already and has given its weights back")


def our_layer(
    workload: Workload, isa: str, base: Base, lora: LoraTensors | None, lora_dtype: str = "float32"
) -> Contender:
    """The layer on ``isa``, compiled, with a packed copy of ``base`` and the values of ``lora``.

    Raises:
        IsaError: ``isa`` cannot run here.
        BuildError: the kernels cannot be compiled.
        BenchError: the layer would use another instruction set.
    """
    config = workload.config(isa, lora_dtype)
    return _contender(workload, config, lora, base.gate_proj, base.up_proj, base.down_proj)


def our_quantized_layer(
    workload: Workload, base: Base, lora: LoraTensors | None, weight_format: WeightFormat
) -> Contender:
    """The layer on the best set, with ``base`` quantised: it computes another function. Errors as of the above."""
    isa = resolve_isa(workload.config("auto").requested_isa)
    config = replace(workload.config(isa), weight_format=weight_format)
    weights = {"gate_proj": base.gate_proj, "up_proj": base.up_proj, "down_proj": base.down_proj}
    sources, _ = quantize(weights, weight_format)
    return replace(_contender(workload, config, lora, *sources.values()), isa=None, comparable=weight_format)


def _contender(
    workload: Workload, config: MoEConfig, lora: LoraTensors | None, *sources: Tensor | Quantized
) -> Contender:
    isa = config.isa
    build(config, progress=False)
    layer = MoELayer(config, *sources)
    check_isa(isa, layer.isa)
    with torch.no_grad():
        for name, values in lora._asdict().items() if lora else ():
            layer.get_parameter(name).copy_(values)
    return Contender(
        name=f"jitmoe {isa}",
        call=layer,
        parameters=tuple(layer.parameters()),
        dtype=torch.bfloat16,
        rank=workload.rank,
        bf16_products=ISAS[isa].operand == "bfloat16",
        isa=isa,
        comparable="lora" if workload.rank else "base",
    )


def refuse_watching() -> None:
    """Refuse to measure while the environment asks for checked or traced kernels, which are slower than those of users.

    Raises:
        BenchError: a variable asks for them; the message names it.
    """
    for name in ("checked", "trace"):
        if settings.get(name):
            variable = settings.SETTINGS[name].variable
            raise BenchError(
                f"{variable} is set, which makes calls run on slower kernels that watch themselves: unset it to "
                f"measure (env -u {variable} jitmoe ...)"
            )


def check_isa(asked: str, used: str) -> None:
    """Refuse to measure one instruction set under the name of another.

    Raises:
        BenchError: ``used`` is not ``asked``.
    """
    if asked != used:
        raise BenchError(f"{asked} was to be measured and {used} would run: is JITMOE_ISA set, or the CPU not able to?")
