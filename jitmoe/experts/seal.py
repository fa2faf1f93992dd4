"""Notices that packed weights, which are frozen, were written to or replaced."""

from collections.abc import Iterable

import torch

from jitmoe.errors import WeightsChangedError
from jitmoe.experts.inputs import check_plain


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
