"""The one copy of the frozen weights: packed once, owned by the layer, given back bit for bit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd.graph import increment_version

from jitmoe.config import MoEConfig, read_fields
from jitmoe.errors import CheckpointError, InputError, WeightsChangedError
from jitmoe.experts.inputs import check_plain, in_memory
from jitmoe.experts.packed_file import map_packed
from jitmoe.experts.quantized import SCALE_DTYPES, ExpertSource, Quantized, check_base
from jitmoe.experts.workspace import allocate, memory_errors
from jitmoe.formats import BFLOAT16, Packing
from jitmoe.jit.kernels import Kernels
from jitmoe.process import usable_threads


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Experts that are packed already, int16 [E, packed items]; a layer takes them as they are."""

    tensor: torch.Tensor


def open_packed(path: Path, config: MoEConfig, verify: bool) -> dict[str, PackedExperts]:
    """The experts in a file of packed weights under gate, up and down; see :func:`map_packed`."""
    matrices = map_packed(path, config, verify)
    with torch.inference_mode(False):  # as in empty_packed
        return {name: PackedExperts(torch.from_numpy(matrix)) for name, matrix in matrices.items()}


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
    experts = packed.shape[0]
    if isinstance(source, (torch.Tensor, Quantized)):
        check_base(name, source, (experts,), out, in_, packing)
    elif not callable(source) and len(source) != experts:
        raise InputError(f"{name} has {len(source)} matrices, expected one for each of {experts} experts")
    if not packed.is_inference():
        increment_version(packed)  # the kernel writes behind torch's back; before, as a source may fail halfway
    for expert in range(experts):
        matrix = source(expert) if callable(source) else source[expert]
        checked = check_base(f"{name}[{expert}]", matrix, (), out, in_, packing)
        with memory_errors():
            values, *scales = (
                in_memory((f"{name}[{expert}]",), (tensor,))[0].contiguous() for tensor in checked if tensor is not None
            )
        threads = usable_threads(torch.get_num_threads())
        scales_at = scales[0].data_ptr() if scales else None
        kernels.pack(values.data_ptr(), packed[expert].data_ptr(), 1, out, in_, threads, scales_at)


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


def version_of(packed: torch.Tensor) -> int:
    """How often torch has seen ``packed`` written to; an inference tensor, as in a copy made there, counts nothing."""
    return 0 if packed.is_inference() else packed._version


class Seal:
    """Notices writes to packed weights through torch's version counter of each tensor."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}
        self._forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._open: set[str] = set()

    def open(self, names: Iterable[str]) -> None:
        """The contents of these are about to be replaced: nothing may be computed before all are closed again."""
        self._open.update(names)

    def close(self, name: str, packed: torch.Tensor) -> None:
        """Take the present contents of ``packed`` as the right ones."""
        self._seen[name] = (packed.data_ptr(), version_of(packed))
        self._forms[name] = (packed.shape, packed.dtype)
        self._open.discard(name)

    def check_form(self, name: str, packed: torch.Tensor) -> None:
        """Refuse a tensor that was put in the place of the packed one and has another form.

        Raises:
            WeightsChangedError: the shape, dtype or strides are not those of the sealed tensor.
            InputTypeError: as of :func:`~jitmoe.experts.inputs.check_plain`.
            InputError: likewise.
        """
        check_plain(f"packed {name}", packed)
        shape, dtype = self._forms.get(name, (packed.shape, packed.dtype))
        same = packed.shape == shape and packed.dtype == dtype and packed.device.type == "cpu"
        if not (same and packed.is_contiguous()):
            raise WeightsChangedError(
                f"the packed {name} weights were replaced by a tensor {list(packed.shape)} of {packed.dtype} on "
                f"{packed.device} with strides {list(packed.stride())}, expected contiguous {list(shape)} of {dtype} "
                "on the CPU; load new ones with load_state_dict()"
            )

    def check(self, name: str, packed: torch.Tensor) -> None:
        """Raise :class:`WeightsChangedError` if ``packed`` was written to; a copy elsewhere is sealed anew.

        Torch counts the writes: those through ``.data``, NumPy or another process's mapping are not seen.
        """
        if self._open:
            raise WeightsChangedError(
                f"loading the base weights was interrupted ({', '.join(sorted(self._open))} are not loaded): load them "
                "again with load_state_dict()"
            )
        address, version = self._seen.get(name, (0, 0))
        if address != packed.data_ptr():
            self.close(name, packed)
        elif version != version_of(packed):
            raise WeightsChangedError(
                f"the packed {name} weights were written to; they are frozen. Load new ones with load_state_dict()"
            )


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
