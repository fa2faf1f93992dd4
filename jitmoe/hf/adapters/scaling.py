"""Alpha, rank and scale: how they follow from each other, and other ranks with the same delta."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.value import ExpertAdapter, LayerAdapter, Pair, same_bits

Note = Callable[[str], None]
"""Takes a sentence for people about what a conversion changed."""


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by, computed as PEFT does; rsLoRA: Kalajdzievski 2023."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha that gives ``scale`` at ``rank``, whole where a whole one does.

    Raises:
        AdapterError: none gives it, in the float32 that LoRA is scaled in.
    """
    near = scale * (math.sqrt(rank) if rslora else rank)
    if not math.isfinite(near):
        raise AdapterError(f"a scale of {scale} has no alpha: lora_alpha must be a finite number")
    candidates = (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    for alpha in candidates:
        if scale_of(alpha, rank, rslora) == scale:
            return alpha
    # Doubles skip some quotients; kernels see the scale as a float32.
    if np.float32(scale_of(near, rank, rslora)) == np.float32(scale):
        return near
    raise AdapterError(f"no alpha gives the scale {scale} at rank {rank}")


def rescaled(pair: Pair, scale: float, where: str) -> Pair:
    """The same delta with another scale: B takes the quotient, which must be a power of two to be exact.

    Raises:
        AdapterError: it is not, or B would leave the range of its dtype.
    """
    if pair.scale == scale:
        return pair
    factor = pair.scale / scale if scale else 0.0
    b = pair.b * factor
    if math.frexp(factor)[0] != 0.5 or not same_bits(b / factor, pair.b):
        raise AdapterError(
            f"{where}: scale {pair.scale} differs from {scale}, this format has one scale for all, and B "
            "cannot take the quotient without rounding: choose a format of PEFT, which has a scale for each"
        )
    return Pair(pair.a, b, scale)


def padded(pair: Pair, rank: int) -> Pair:
    """The same delta at a higher rank: A and B end in zeros. The scale stays."""
    more = rank - pair.rank
    if not more:
        return pair
    a = torch.nn.functional.pad(pair.a, (0, 0, 0, more))
    return Pair(a, torch.nn.functional.pad(pair.b, (0, more)), pair.scale)


def with_one_rank(adapter: ExpertAdapter, note: Note) -> ExpertAdapter:
    """The same deltas with one rank and one scale for all layers and projections.

    Raises:
        AdapterError: the scales differ by more than powers of two.
    """
    pairs = [pair for layer in adapter.layers for _, pair in layer.pairs()]
    widest = max(pairs, key=lambda pair: pair.rank)
    ranks, scales = sorted({pair.rank for pair in pairs}), sorted({pair.scale for pair in pairs})
    if len(ranks) > 1:
        note(f"ranks {ranks} became rank {widest.rank}: this format has one rank, A and B are padded with zeros")
    if len(scales) > 1:
        note(f"scales {scales} became {widest.scale}: this format has one, B is multiplied by powers of two")

    def uniform(layer: LayerAdapter) -> LayerAdapter:
        pairs = (
            padded(rescaled(pair, widest.scale, f"{name} of {layer.prefix}"), widest.rank)
            for name, pair in layer.pairs()
        )
        return LayerAdapter(layer.prefix, *pairs)

    return replace(adapter, layers=tuple(uniform(layer) for layer in adapter.layers))


def with_shared_a(layer: LayerAdapter) -> LayerAdapter:
    """The same deltas with one A for gate and up, which are then one tensor.

    Where they differ, A is that of gate above that of up, and each B has zeros for the other's rows: twice the rank.

    Raises:
        AdapterError: gate and up have scales that differ by more than a power of two.
    """
    if layer.shares_a:
        return replace(layer, up=replace(layer.up, a=layer.gate.a))
    gate, up = layer.gate, rescaled(layer.up, layer.gate.scale, f"up of {layer.prefix}")
    a = torch.cat([gate.a, up.a], dim=1)
    return replace(
        layer,
        gate=Pair(a, torch.nn.functional.pad(gate.b, (0, up.rank)), gate.scale),
        up=Pair(a, torch.nn.functional.pad(up.b, (gate.rank, 0)), gate.scale),
    )
