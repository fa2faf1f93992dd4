"""From one layout to another, with the same delta for every expert, bit for bit."""

from dataclasses import dataclass, replace
from pathlib import Path

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import write
from jitmoe.hf.adapters.formats import FORMATS, detect
from jitmoe.hf.adapters.names import FormatName
from jitmoe.hf.adapters.value import ExpertAdapter


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        source: layout that was read.
        target: layout that was written.
        adapter: what was read.
        notes: what changed on the way, for people.
    """

    source: FormatName
    target: FormatName
    adapter: ExpertAdapter
    notes: tuple[str, ...]


def read_adapter(source: Path, layout: FormatName | None = None, choices: Choices | None = None) -> ExpertAdapter:
    """The adapter at ``source``, of the layout that it has or is said to have.

    Raises:
        AdapterError: no adapter of experts is there, or it is damaged.
    """
    adapter = FORMATS[layout or detect(source)].read(source, choices or Choices())
    if not adapter.layers:
        raise AdapterError(f"{source} has no LoRA of experts in the layout {layout}")
    return adapter


def convert(
    source: Path,
    destination: Path,
    target: FormatName,
    origin: FormatName | None = None,
    *,
    interleaved: bool | None = None,
    lora_alpha: float | None = None,
    drop_others: bool = False,
    force: bool = False,
) -> Conversion:
    """Write the adapter at ``source`` to ``destination`` in the layout ``target``.

    Args:
        source: a folder, or a file of jitmoe's.
        destination: a folder, or a file for jitmoe's; whole or not at all.
        target: its layout.
        origin: layout of ``source``; None: told by its content.
        interleaved: whether rows of gate and up alternate in gate_up_proj; None: as the config of the adapter says.
        lora_alpha: for a source without a config.
        drop_others: leave out LoRA outside the experts where the target has no place for it.
        force: replace ``destination``.

    Raises:
        AdapterError: the source is damaged, or the target cannot say the same.
    """
    notes: list[str] = []
    choices = Choices(interleaved, lora_alpha, notes.append)
    origin = origin or detect(source)
    adapter = read_adapter(source, origin, choices)
    kept = adapter
    if adapter.others and not FORMATS[target].holds_others:
        names = f"{len(adapter.others)} tensors outside the experts, such as {next(iter(adapter.others))}"
        if not drop_others:
            raise AdapterError(f"{target} has no place for {names}: leave them out with --drop-others")
        notes.append(f"DROPPED: {names}")
        # A config that names what is gone would let PEFT wait for it.
        gone = dict.fromkeys(("modules_to_save", "trainable_token_indices"))
        kept = replace(adapter, others={}, config={**adapter.config, **gone} if adapter.config else {})
    write(destination, FORMATS[target].write(kept, choices), force)
    return Conversion(origin, target, adapter, tuple(notes))
