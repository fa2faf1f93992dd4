"""Checkpoints with quantised experts read by numpy alone, from the description of their formats."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<u4", "I8": "i1", "BF16": "<u2", "F8_E4M3": "u1"}


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def items(self) -> NDArray[np.generic]:
        return np.frombuffer(self.data, DTYPES[self.dtype]).reshape(self.shape)

    @property
    def numbers(self) -> Array:
        """What a tensor of floats or whole numbers stands for."""
        if self.dtype == "BF16":
            return (self.items.astype("<u4") << 16).view("<f4").astype(np.float64)
        return (E4M3[self.items] if self.dtype == "F8_E4M3" else self.items).astype(np.float64)


def e4m3(code: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa; subnormals; NaN where all seven are set."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(code) for code in range(256)])

GRIDS = {
    "fp8_block": np.unique(E4M3[np.isfinite(E4M3)]),
    "int8_row": np.arange(-127.0, 128),
    "int4_group": np.arange(-8.0, 8),
}
"""All codes of a format."""

LARGEST = {"fp8_block": 448, "int8_row": 127, "int4_group": 7}
"""The code of the largest weight that has a scale."""


def read(path: Path) -> dict[str, Raw]:
    """All tensors of a safetensors file; the header must describe each byte once."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), len(content) - 8 - length]
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        raw = Raw(entry["dtype"], tuple(entry["shape"]), content[8 + length + start : 8 + length + end])
        if raw.dtype in DTYPES:
            assert (8 + length + start) % np.dtype(DTYPES[raw.dtype]).itemsize == 0, "not aligned to its items"
            assert len(raw.data) == np.prod(raw.shape) * np.dtype(DTYPES[raw.dtype]).itemsize
        found[name] = raw
    return found


def read_folder(folder: Path) -> dict[str, Raw]:
    """All tensors of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read(folder / "model.safetensors")
    places = json.loads(index.read_text())["weight_map"]
    files = {name: read(folder / name) for name in set(places.values())}
    assert sum(map(len, files.values())) == len(places)
    return {name: files[file][name] for name, file in places.items()}


class Decoded(NamedTuple):
    """One matrix [out, in]: codes as numbers, and the scale of each."""

    codes: Array
    scales: Array

    @property
    def weights(self) -> NDArray[np.float32]:
        """W': the product as float32, rounded to bfloat16 to nearest even."""
        return bfloat16(self.codes.astype(np.float32) * self.scales.astype(np.float32))


def decode(tensors: dict[str, Raw], module: str, weight_format: str, out: int, in_: int, group: int) -> Decoded:
    """A matrix of the checkpoint, which must have the tensors of its format and no others."""
    mine = {name.removeprefix(f"{module}."): raw for name, raw in tensors.items() if name.startswith(f"{module}.")}
    outline = {name: (raw.dtype, raw.shape) for name, raw in mine.items()}
    rows, columns = np.arange(out), np.arange(in_)
    if weight_format == "fp8_block":
        squares = -(-out // 128), -(-in_ // 128)
        assert outline == {"weight": ("F8_E4M3", (out, in_)), "weight_scale_inv": ("F32", squares)}
        scales = mine["weight_scale_inv"].numbers[rows[:, None] // 128, columns // 128]
        return Decoded(mine["weight"].numbers, scales)
    if weight_format == "int8_row":
        assert outline == {"weight": ("I8", (out, in_)), "weight_scale": ("F32", (out, 1))}
        return Decoded(mine["weight"].numbers, np.broadcast_to(mine["weight_scale"].numbers, (out, in_)))
    groups = -(-in_ // group)
    assert outline == {
        "weight_packed": ("I32", (out, -(-in_ // 8))),
        "weight_scale": ("BF16", (out, groups)),
        "weight_shape": ("I64", (2,)),
    }
    assert mine["weight_shape"].items.tolist() == [out, in_]
    words = mine["weight_packed"].items
    codes = (words[:, columns // 8] >> (4 * (columns % 8)).astype("<u4") & 15).astype(np.float64) - 8
    return Decoded(codes, mine["weight_scale"].numbers[:, columns // group])


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Finite float32 rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def check_nearest(decoded: Decoded, weights: Array, weight_format: str) -> None:
    """Neither code beside it is nearer to the weight; the quotient that is coded was rounded to float32."""
    grid = GRIDS[weight_format]
    found = np.searchsorted(grid, decoded.codes)
    assert (grid[found] == decoded.codes).all(), "no code of the format"
    error = np.abs(decoded.codes * decoded.scales - weights)
    for step in (-1, 1):
        beside = grid[np.clip(found + step, 0, len(grid) - 1)]
        assert (error <= np.abs(beside * decoded.scales - weights) + np.abs(weights) * 2.0**-23).all()


def check_scales(decoded: Decoded, weights: Array, weight_format: str, group: int) -> None:
    """Each is the largest of the weights that share it over the largest code, rounded to its dtype."""
    out, in_ = weights.shape
    tall, wide = {"fp8_block": (128, 128), "int8_row": (1, in_), "int4_group": (1, group)}[weight_format]
    for top in range(0, out, tall):
        for left in range(0, in_, wide):
            part = np.s_[top : top + tall, left : left + wide]
            scale = np.abs(weights[part]).max().astype(np.float32) / np.float32(LARGEST[weight_format])
            expected = bfloat16(scale[None])[0] if weight_format == "int4_group" else scale
            assert (decoded.scales[part] == expected).all()


def value_bytes(weight_format: str, out: int, in_: int, group: int) -> int:
    """Bytes of a matrix in a file, values, scales and all, by arithmetic."""
    if weight_format == "int4_group":
        return 4 * out * -(-in_ // 8) + 2 * out * -(-in_ // group) + 16
    return out * in_ + 4 * (out if weight_format == "int8_row" else -(-out // 128) * -(-in_ // 128))
