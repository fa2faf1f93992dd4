"""The table of layouts, and which of them a file or folder has."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters import ancestor, native, peft_fused, peft_per_expert, sglang
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import FUSED, MODEL, Content, read_metadata
from jitmoe.hf.adapters.keys import PEFT_FUSED, PER_EXPERT, SGLANG
from jitmoe.hf.adapters.names import FormatName
from jitmoe.hf.adapters.value import ExpertAdapter


@dataclass(frozen=True)
class Format:
    """How a layout is read and written.

    Attributes:
        read: the adapter at a path.
        write: content of each file of an adapter; under an empty name, of the one file that it is.
        holds_others: whether it has a place for LoRA outside the experts.
        keys: names of experts' tensors in ``adapter_model.safetensors``, for layouts that differ in them.
    """

    read: Callable[[Path, Choices], ExpertAdapter]
    write: Callable[[ExpertAdapter, Choices], Mapping[str, Content]]
    holds_others: bool = True
    keys: re.Pattern[str] | None = None


FORMATS: Mapping[FormatName, Format] = {
    "peft-fused": Format(peft_fused.read, peft_fused.write, keys=PEFT_FUSED),
    "peft-per-expert": Format(peft_per_expert.read, peft_per_expert.write, keys=PER_EXPERT),
    "sglang": Format(sglang.read, sglang.write, keys=SGLANG),
    "ancestor": Format(ancestor.read, ancestor.write),
    "jitmoe": Format(native.read, native.write, holds_others=False),
}


def detect(source: Path) -> FormatName:
    """The layout of the adapter at ``source``, told by names and metadata.

    Raises:
        AdapterError: there is no adapter of experts, or more than one.
    """
    if source.is_file():
        if read_metadata(source)[1].get("layout") == native.LAYOUT:
            return "jitmoe"
        raise AdapterError(f"{source} is no adapter of jitmoe's: of other layouts, name the folder")
    if (source / FUSED).exists():
        return "ancestor"
    if not (source / MODEL).exists():
        raise AdapterError(f"{source} has neither {MODEL} nor {FUSED}: name the folder of an adapter in safetensors")
    keys, _ = read_metadata(source / MODEL)
    found: list[FormatName] = [
        name for name, layout in FORMATS.items() if layout.keys and any(map(layout.keys.fullmatch, keys))
    ]
    if len(found) != 1:
        what = f"of {' and '.join(found)} at a time" if found else "of no layout that is known"
        raise AdapterError(f"{source / MODEL} has LoRA of routed experts {what}")
    return found[0]
