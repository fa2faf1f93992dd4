"""Writing new values to packed weights: bfloat16 ones take them, quantised ones the nearest codes, with a warning."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from jitmoe.errors import InputError
from jitmoe.experts.quantize import Loss, QuantizationReport, error_of, loss_of, nonfinite, quantize_matrix
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
        old = packed.read([expert], packed.parts)[0]
        new = new_of(expert, old.clone())
        # A launcher may hand out what all processes have: pages of a mapped file then stay shared.
        if not torch.equal(old.view(torch.int16), new.view(torch.int16)):
            packed.write(expert, packed.layout.split(new, packed.parts))


def _requantize(packed: Packed, new_of: NewOf) -> None:
    for expert in range(packed.layout.experts):
        for part, matrix in _new_parts(packed, new_of, expert).items():
            if place := nonfinite(matrix):
                at = f"{packed.name} ({part})[{expert}, {place[0]}, {place[1]}]"
                raise InputError(f"{at} is {matrix[place].item()}: it has no code")
    losses: dict[str, list[Loss]] = {part: [] for part in packed.parts}
    changed = []
    for expert in range(packed.layout.experts):
        matrices = _new_parts(packed, new_of, expert)
        found = packed.quantized([expert], packed.parts)
        for part, matrix in matrices.items():
            if torch.equal(matrix, _read(packed, expert, part)):
                found[part] = found[part][0]
                losses[part].append(loss_of(packed.packing, found[part], matrix))
            else:
                found[part], loss = quantize_matrix(packed.packing, matrix)
                losses[part].append(loss)
                changed.append(expert)
        if expert in changed:
            packed.write(expert, [found[part] for part in packed.parts])
    if changed:
        _warn(packed, losses)


def _new_parts(packed: Packed, new_of: NewOf, expert: int) -> dict[str, Tensor]:
    """float32 [out, in] of each projection."""
    new = new_of(expert, packed.read([expert], packed.parts)[0].float())
    return dict(zip(packed.parts, packed.layout.split(new, packed.parts), strict=True))


def _read(packed: Packed, expert: int, part: str) -> Tensor:
    return packed.layout.split(packed.read([expert], (part,))[0].float(), (part,))[0]


def _warn(packed: Packed, losses: dict[str, list[Loss]]) -> None:
    errors = {part: error_of(of_experts) for part, of_experts in losses.items()}
    name = packed.packing.format.name
    warnings.warn(
        f"{packed.name} is kept in {name}, and new values were written to it (a merge of adapters does that): it has "
        f"the codes nearest to them, with fresh scales, and loses what the table says, where W is what was to be "
        f"written. To unmerge does not give the old weights back. For a merge without loss call "
        f"jitmoe.hf.unpack(model) before it.\n{QuantizationReport(name, errors)}",
        stacklevel=2,
    )
