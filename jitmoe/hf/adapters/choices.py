"""What a person may say about a conversion, and hear of it."""

from dataclasses import dataclass

from jitmoe.hf.adapters.scaling import Note


def _silent(sentence: str) -> None:
    del sentence


@dataclass(frozen=True)
class Choices:
    """Facts that files may lack.

    Attributes:
        interleaved: whether rows of gate and up alternate in gate_up_proj; None: as the config says.
        lora_alpha: for a file without a config.
        note: takes sentences about what a conversion changed.
    """

    interleaved: bool | None = None
    lora_alpha: float | None = None
    note: Note = _silent
