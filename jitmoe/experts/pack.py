"""The one copy of the frozen weights: packed once, owned by the layer, given back bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.autograd.graph import increment_version

from jitmoe.config import MoEConfig, read_fields
from jitmoe.errors import CheckpointError, InputError
from jitmoe.experts.inputs import in_memory
from jitmoe.experts.packed_file import map_packed
from jitmoe.experts.quantized import SCALE_DTYPES, ExpertSource, Quantized, check_base
from jitmoe.experts.slices import extent_of, join, piece
from jitmoe.experts.teams import by_part
from jitmoe.experts.workspace import allocate, memory_errors
from jitmoe.formats import BFLOAT16, Packing
from jitmoe.jit.kernels import Kernels
from jitmoe.plan.parts import Part, parts_of
from jitmoe.plan.projections import NAMES, Projection
from jitmoe.plan.teams import Team
from jitmoe.process import usable_threads


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Experts that are packed already, int16 [E, packed items]; a layer takes them as they are.

    Attributes:
        tensor: of the first part of ``tensor_parallel``.
        others: of the other parts.
    """

    tensor: torch.Tensor
    others: tuple[torch.Tensor, ...] = ()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Of all parts."""
        return [self.tensor, *self.others]


def open_packed(path: Path, config: MoEConfig, verify: bool) -> dict[str, PackedExperts]:
    """The experts in a file of packed weights under gate, up and down; see :func:`map_packed`."""
    matrices = map_packed(path, config, verify)
    with torch.inference_mode(False):  # as in empty_packed
        tensors = {name: torch.from_numpy(matrix) for name, matrix in matrices.items()}
    suffixes = [part.suffix for part in parts_of(config)]
    by_name = {name: [tensors[f"{name}{suffix}"] for suffix in suffixes] for name in NAMES}
    return {name: PackedExperts(first, tuple(others)) for name, (first, *others) in by_name.items()}


def empty_packed(experts: int, out: int, in_: int, packing: Packing = BFLOAT16) -> torch.Tensor:
    """Room for ``experts`` packed matrices, int16 [E, packed items]: bits that ``.to(dtype)`` leaves alone."""
    pages = allocate(experts * packing.packed_bytes(out, in_))
    with torch.inference_mode(False):  # an inference tensor counts no versions, which the seal reads
        return torch.from_numpy(pages).view(torch.int16).view(experts, -1)


def pack_experts(
    kernels: Kernels,
    name: str,
    source: ExpertSource,
    packed: torch.Tensor,
    out: int,
    in_: int,
    packing: Packing = BFLOAT16,
) -> None:
    """Fill ``packed`` expert by expert.

    Args:
        kernels: any instance with this packing; the layout is the same in all.
        name: of the tensor, for error messages.
        source: see :data:`~jitmoe.experts.quantized.ExpertSource`; matrices are [out, in] on the CPU.
        packed: from :func:`empty_packed`.
        out: rows of a matrix.
        in_: columns of a matrix.
        packing: of the matrices.

    Raises:
        InputError: wrong number, shape or device. Nothing is packed from a stacked tensor or sequence then.
        InputTypeError: not of the packing's format.
    """
    threads = usable_threads(torch.get_num_threads())
    for expert, matrix in _matrices(name, source, [packed], out, in_, packing):
        _pack_one(kernels, f"{name}[{expert}]", matrix, packed[expert], out, in_, threads)


def pack_parts(
    kernels: Kernels,
    name: str,
    source: ExpertSource,
    packed: Sequence[torch.Tensor],
    projection: Projection,
    parts: Sequence[Part],
    packing: Packing,
) -> None:
    """Fill ``packed``, one tensor a part of the projection; the other arguments and errors as of :func:`pack_experts`.

    The first thread to write to a page decides on which NUMA node it lies: each part is written by those that read it.
    """
    threads = usable_threads(torch.get_num_threads())
    for expert, matrix in _matrices(name, source, packed, projection.out, projection.in_, packing):
        targets = [tensor[expert] for tensor in packed]
        by_part(
            parts, threads, partial(_pack_piece, kernels, f"{name}[{expert}]", matrix, targets, projection, packing)
        )


def _pack_piece(
    kernels: Kernels,
    name: str,
    matrix: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    projection: Projection,
    packing: Packing,
    part: Part,
    team: Team,
) -> None:
    pieces = matrix if part.is_whole else piece(matrix, packing, projection.cut_axis, part)
    _pack_one(kernels, name, pieces, targets[part.index], *extent_of(projection, part), team.threads)


def _matrices(
    name: str, source: ExpertSource, packed: Sequence[torch.Tensor], out: int, in_: int, packing: Packing
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Each expert with its values and scales, found right, for tensors that are about to be written."""
    experts = packed[0].shape[0]
    if isinstance(source, (torch.Tensor, Quantized)):
        check_base(name, source, (experts,), out, in_, packing)
    elif not callable(source) and len(source) != experts:
        raise InputError(f"{name} has {len(source)} matrices, expected one for each of {experts} experts")
    for tensor in packed:
        if not tensor.is_inference():
            increment_version(tensor)  # the kernel writes behind torch's back; before, as a source may fail halfway
    for expert in range(experts):
        matrix = source(expert) if callable(source) else source[expert]
        checked = check_base(f"{name}[{expert}]", matrix, (), out, in_, packing)
        yield expert, [tensor for tensor in checked if tensor is not None]


def _pack_one(
    kernels: Kernels, name: str, matrix: Sequence[torch.Tensor], target: torch.Tensor, out: int, in_: int, threads: int
) -> None:
    """Pack one matrix [out, in], given by its values and scales."""
    with memory_errors():
        values, *scales = (in_memory((name,), (tensor,))[0].contiguous() for tensor in matrix)
    scales_at = scales[0].data_ptr() if scales else None
    kernels.pack(values.data_ptr(), target.data_ptr(), 1, out, in_, threads, scales_at)


def unpack_experts(
    kernels: Kernels,
    packed: torch.Tensor,
    out: int,
    in_: int,
    experts: Sequence[int] | None = None,
    packing: Packing = BFLOAT16,
) -> torch.Tensor | Quantized:
    """A new copy of what was packed, bit for bit, stacked; or of some experts only."""
    chosen = range(packed.shape[0]) if experts is None else experts
    threads = usable_threads(torch.get_num_threads())
    dtype = getattr(torch, packing.format.value_dtype)
    scales = None
    with memory_errors():
        values = torch.empty(len(chosen), *packing.value_shape(out, in_), dtype=dtype, device="cpu")
        if packing.quantized:
            dtype = SCALE_DTYPES[packing.scale]
            scales = torch.empty(len(chosen), *packing.scale_shape(out, in_), dtype=dtype, device="cpu")
    for place, expert in enumerate(chosen):
        scales_at = None if scales is None else scales[place].data_ptr()
        kernels.unpack(packed[expert].data_ptr(), values[place].data_ptr(), 1, out, in_, threads, scales_at)
    return values if scales is None else Quantized(values, scales)


def decode_experts(
    kernels: Kernels, packed: torch.Tensor, out: int, in_: int, experts: Sequence[int] | None = None
) -> torch.Tensor:
    """The bfloat16 weights [E, out, in] that the products multiply with; or of some experts only."""
    chosen = range(packed.shape[0]) if experts is None else experts
    with memory_errors():
        result = torch.empty(len(chosen), out, in_, dtype=torch.bfloat16, device="cpu")
    threads = usable_threads(torch.get_num_threads())
    for place, expert in enumerate(chosen):
        kernels.decode(packed[expert].data_ptr(), result[place].data_ptr(), 1, out, in_, threads)
    return result


def unpack_parts(
    kernels: Kernels,
    packed: Sequence[torch.Tensor],
    projection: Projection,
    parts: Sequence[Part],
    experts: Sequence[int] | None,
    packing: Packing,
) -> torch.Tensor | Quantized:
    """What was packed in parts, bit for bit, as :func:`unpack_experts`."""
    extents = [extent_of(projection, part) for part in parts]
    found = [unpack_experts(kernels, p, *e, experts, packing) for p, e in zip(packed, extents, strict=True)]
    return join(found, packing, projection.cut_axis)


def decode_parts(
    kernels: Kernels,
    packed: Sequence[torch.Tensor],
    projection: Projection,
    parts: Sequence[Part],
    experts: Sequence[int] | None,
) -> torch.Tensor:
    """The bfloat16 weights of all parts, as :func:`decode_experts`."""
    extents = [extent_of(projection, part) for part in parts]
    found = [decode_experts(kernels, p, *e, experts) for p, e in zip(packed, extents, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, projection.cut_axis + 1)


def safetensors_source(path: str | Path, name: str) -> Callable[[int], torch.Tensor]:
    """Read the experts' matrices one by one from a safetensors file.

    Args:
        path: the file, or the index of its shards (``model.safetensors.index.json``).
        name: of one stacked tensor [E, out, in], or with ``{expert}`` in it of one matrix for each expert, e.g.
            ``"model.layers.3.mlp.experts.{expert}.gate_proj.weight"``.

    Returns:
        A function from the expert's number to its matrix, for the constructor of the layer. It raises
        :class:`~jitmoe.errors.CheckpointError` where the file cannot be read, or has no such tensor or expert.
    """
    from safetensors import SafetensorError, safe_open

    def read(expert: int) -> torch.Tensor:
        tensor = name.format(expert=expert)
        shard = _shard_with(Path(path), tensor)
        try:
            with safe_open(str(shard), framework="pt") as file:
                matrix: torch.Tensor
                matrix = file.get_tensor(tensor) if "{expert}" in name else file.get_slice(name)[expert]
        except (OSError, SafetensorError, IndexError, UnicodeError) as error:
            raise CheckpointError(f"{tensor} of expert {expert} cannot be read from {shard}: {error}") from error
        return matrix

    return read


def _shard_with(path: Path, tensor: str) -> Path:
    """The file with ``tensor``: ``path`` itself, or the shard that it names as an index."""
    if path.suffix != ".json":
        return path
    shards = read_fields(path, "an index of safetensors files").get("weight_map")
    shard = shards.get(tensor) if isinstance(shards, dict) else None
    if not isinstance(shard, str):
        raise InputError(f"{path} names no file for {tensor}: it is no index of shards, or of another model")
    return path.parent / shard
