"""Our implementation of experts among those of transformers."""

from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from jitmoe.errors import ConfigError
from jitmoe.hf import experts, peft_lora
from jitmoe.hf.peft_lora import IMPLEMENTATION


def register(unsupported: Literal["error", "eager"] = "error") -> None:
    """Offer jitmoe to transformers as an implementation of experts, and to PEFT as one that takes its LoRA as it is.

    Then ``experts_implementation="jitmoe"`` in ``from_pretrained`` or ``from_config``, or
    ``model.set_experts_implementation("jitmoe")``. Each experts module packs its weights at its first call, in place of
    its parameters. Calling this again changes nothing but ``unsupported``.

    Args:
        unsupported: what becomes of experts that jitmoe does not understand: "error", or "eager", which leaves them to
            transformers with a warning for each class.

    Raises:
        ImportError: transformers is not installed.
        AdapterError: PEFT is installed, in a version whose wrappers are not as we know them.
        ConfigError: another value of ``unsupported``.
    """
    if unsupported not in ("error", "eager"):
        raise ConfigError(f"unsupported must be 'error' or 'eager', got {unsupported!r}")
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            f"jitmoe.hf needs transformers 5 with its experts interface ({error}): pip install 'jitmoe[hf]'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts.run if unsupported == "error" else experts.run_or_leave)
    if find_spec("transformers.distributed.expert_parallel") is not None:  # transformers 5.23 has it
        import_module("jitmoe.hf.expert_parallel").offer()
    if find_spec("peft") is not None:
        peft_lora.install()
