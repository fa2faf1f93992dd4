"""Names of the layouts, where torch is not needed to know them."""

from typing import Literal

FormatName = Literal["peft-fused", "peft-per-expert", "sglang", "ancestor", "jitmoe"]
