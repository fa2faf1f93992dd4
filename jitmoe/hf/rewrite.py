"""Writing new values to packed weights: bfloat16 ones take them, quantised ones the nearest codes, with a warning."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from jitmoe.experts.quantize import QuantizationReport, check_finite, difference, encode, error_of
from jitmoe.hf.packed import Packed

NewOf = Callable[[int, Tensor], Tensor]
"""From an expert's number and its old matrix to the new one, in the old one's dtype; it may write to the old one."""


def rewrite(packed: Packed, new_of: NewOf) -> None:
    """Replace each expert's matrix; whoever computes next prepares anew.

    Quantised weights get fresh scales and the codes nearest to the new values, which are made in float32. A projection
    of an expert that does not change keeps its codes.

    Raises:
        InputError: a new value of a quantised weight is not finite; nothing was written.
    """
    if packed.packing.quantized:
        _requantize(packed, new_of)
        return
    for expert in range(packed.layout.experts):
        new = new_of(expert, packed.read([expert], packed.parts)[0])
        packed.write(expert, packed.layout.split(new, packed.parts))


def _requantize(packed: Packed, new_of: NewOf) -> None:
    for expert in range(packed.layout.experts):
        for part, matrix in _new_parts(packed, new_of, expert).items():
            check_finite(f"{packed.name} ({part})", expert, matrix)
    lost: dict[str, list[tuple[float, float, float, float]]] = {part: [] for part in packed.parts}
    changed = False
    for expert in range(packed.layout.experts):
        matrices = _new_parts(packed, new_of, expert)
        found = packed.quantized([expert], packed.parts)
        for part, matrix in matrices.items():
            if not torch.equal(matrix, _read(packed, expert, part)):
                found[part], changed = encode(packed.packing, matrix), True
            else:
                found[part] = found[part][0]
            lost[part].append(difference(packed.packing, found[part], matrix))
        packed.write(expert, [found[part] for part in packed.parts])
    if changed:
        _warn(packed, lost)


def _new_parts(packed: Packed, new_of: NewOf, expert: int) -> dict[str, Tensor]:
    """float32 [out, in] of each projection."""
    new = new_of(expert, packed.read([expert], packed.parts)[0].float())
    return dict(zip(packed.parts, packed.layout.split(new, packed.parts), strict=True))


def _read(packed: Packed, expert: int, part: str) -> Tensor:
    return packed.layout.split(packed.read([expert], (part,))[0].float(), (part,))[0]


def _warn(packed: Packed, lost: dict[str, list[tuple[float, float, float, float]]]) -> None:
    errors = {part: error_of(torch.tensor(rows, dtype=torch.float64, device="cpu")) for part, rows in lost.items()}
    name = packed.packing.format.name
    warnings.warn(
        f"{packed.name} is kept in {name}, and new values were written to it (a merge of adapters does that): it has "
        f"the codes nearest to them, with fresh scales, and loses what the table says, where W is what was to be "
        f"written. To unmerge does not give the old weights back. For a merge without loss call "
        f"jitmoe.hf.unpack(model) before it.\n{QuantizationReport(name, errors)}",
        stacklevel=2,
    )
