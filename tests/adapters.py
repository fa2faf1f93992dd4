"""Adapters for tests: neutral values with all sizes, and what they mean."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jitmoe.hf.adapters.value import ExpertAdapter, LayerAdapter, Pair, same_bits

PREFIX = "base_model.model.model.layers.{}.mlp.experts"

SIZES = {"unequal": (5, 3, 24, 10), "H == I": (4, 3, 8, 8), "H == 2I": (4, 3, 16, 8), "E == r == H == I": (2, 2, 2, 2)}
"""E, r, H, I."""

OLD_SIZES = SIZES | {"E * r == H": (4, 6, 24, 12), "one expert": (1, 3, 8, 8)}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small whole numbers: sums of their products are exact in any order."""
    return torch.randint(-3, 4, shape).to(dtype)


def adapter_of(
    sizes: str | tuple[int, int, int, int] = "unequal",
    *,
    dtype: torch.dtype = torch.float32,
    shared: bool = True,
    scale: float = 2.0,
    ranks: tuple[int, int] = (0, 0),
    rslora: bool = False,
    layers: tuple[int, ...] = (0, 11),
    nan: bool = True,
) -> ExpertAdapter:
    """An adapter of two layers; ``ranks``: of gate and up, and of down, where they are not that of ``sizes``."""
    torch.manual_seed(0)
    experts, rank, hidden, intermediate = SIZES[sizes] if isinstance(sizes, str) else sizes
    fine, coarse = (given or rank for given in ranks)
    made = []
    for layer in layers:
        a = torch.randn(experts, fine, hidden).to(dtype)
        other_a = a if shared else torch.randn(experts, fine, hidden).to(dtype)
        gate_b, up_b = torch.randn(2, experts, intermediate, fine).to(dtype)
        down = torch.randn(experts, coarse, intermediate).to(dtype), torch.randn(experts, hidden, coarse).to(dtype)
        if nan:
            gate_b[0, 0, 0] = float("nan")
        gate, up = Pair(a, gate_b, scale), Pair(other_a, up_b, scale)
        made.append(LayerAdapter(PREFIX.format(layer), gate, up, Pair(*down, scale)))
    return ExpertAdapter(tuple(made), rslora)


def assert_same(found: ExpertAdapter, expected: ExpertAdapter) -> None:
    """Every tensor bit for bit, and every scale."""
    assert {layer.prefix for layer in found.layers} == {layer.prefix for layer in expected.layers}
    by_prefix = {layer.prefix: layer for layer in found.layers}
    for layer in expected.layers:
        for (name, one), (_, other) in zip(by_prefix[layer.prefix].pairs(), layer.pairs(), strict=True):
            assert one.scale == other.scale, (layer.prefix, name)
            assert same_bits(one.a, other.a) and same_bits(one.b, other.b), (layer.prefix, name)
    assert found.others.keys() == expected.others.keys()
    assert all(same_bits(found.others[name], tensor) for name, tensor in expected.others.items())


def deltas(adapter: ExpertAdapter) -> Iterator[tuple[str, torch.Tensor]]:
    """The change of each base weight, [E, out, in] in float64: exact for :func:`numbers`."""
    for layer in sorted(adapter.layers, key=lambda layer: layer.prefix):
        for name, pair in layer.pairs():
            yield f"{layer.prefix}.{name}", pair.scale * (pair.b.double() @ pair.a.double())


def assert_same_deltas(found: ExpertAdapter, expected: ExpertAdapter) -> None:
    for (name, one), (other_name, other) in zip(deltas(found), deltas(expected), strict=True):
        assert name == other_name and torch.equal(one, other), name


def with_numbers(adapter: ExpertAdapter) -> ExpertAdapter:
    """``adapter`` with :func:`numbers` in all tensors."""
    layers = []
    for layer in adapter.layers:
        pairs = [
            Pair(numbers(*pair.a.shape, dtype=pair.a.dtype), numbers(*pair.b.shape, dtype=pair.b.dtype), pair.scale)
            for _, pair in layer.pairs()
        ]
        layers.append(LayerAdapter(layer.prefix, *pairs))
    return ExpertAdapter(tuple(layers), adapter.rslora, adapter.others, adapter.config)


def edit_tensors(path: Path, change) -> None:
    """Let ``change`` write to the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
