"""Where the experts of each family lie in a checkpoint: tensors of one expert each, or stacked ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jitmoe.errors import CheckpointError

Projection = Literal["gate_proj", "up_proj", "down_proj"]

PROJECTIONS: tuple[Projection, Projection, Projection] = ("gate_proj", "up_proj", "down_proj")

STACKED: dict[str, tuple[Projection, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacked tensors [E, rows, in] of transformers, and the projections that share their rows in equal parts."""

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Fields of config.json with the number of experts."""


@dataclass(frozen=True)
class Family:
    """Names of the experts of models that are built alike.

    Attributes:
        block: last part of the name of the module that holds router and experts.
        leaves: last parts of the names of gate, up and down.
    """

    block: str
    leaves: tuple[str, str, str]

    def module(self, block: str, expert: int, projection: Projection) -> str:
        """Name of the linear module of one projection, where ``block`` is the whole name of the block."""
        return f"{block}.experts.{expert}.{self.leaves[PROJECTIONS.index(projection)]}"

    def shipped(self, name: str) -> str:
        """The name that a tensor of a block of transformers has in checkpoints of this family."""
        return name.replace(f".{MODULE}.", f".{self.block}.")

    def place_of(self, name: str) -> "Place | None":
        """What a tensor of an expert of its own holds; None for other tensors."""
        leaves = "|".join(self.leaves)
        found = re.fullmatch(rf"({LAYER}\.{self.block})\.experts\.(\d+)\.({leaves})\.weight", name)
        if found is None:
            return None
        block, expert, leaf = found.groups()
        return Place(block, int(expert), PROJECTIONS[self.leaves.index(leaf)])

    def stacked_place_of(self, name: str) -> "tuple[str, Sequence[Projection]] | None":
        """The block, as checkpoints name it, and the projections of a stacked tensor; None for other tensors."""
        found = re.fullmatch(rf"({LAYER}\.{MODULE})\.experts\.({'|'.join(STACKED)})", name)
        return None if found is None else (self.shipped(f"{found[1]}.").removesuffix("."), STACKED[found[2]])


@dataclass(frozen=True)
class Place:
    """One projection of one expert."""

    block: str
    expert: int
    projection: Projection


LAYER = r"(?:.+\.)?layers\.\d+"

MODULE = "mlp"
"""What transformers calls the block in the families below."""

QWEN = Family("mlp", PROJECTIONS)
MIXTRAL = Family("block_sparse_moe", ("w1", "w3", "w2"))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo"), QWEN),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), QWEN),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), QWEN),
    **dict.fromkeys(("dots1", "ernie4_5_moe", "hunyuan_v1_moe", "exaone_moe", "solar_open"), QWEN),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), MIXTRAL),
}
"""By model_type. transformers has the same names in its conversion_mapping, but for remote code."""

STACKED_ONLY = ("gpt_oss", "llama4", "llama4_text", "dbrx", "granitemoe", "qwen3_vl_moe", "qwen3_5_moe")
"""Families whose experts are shipped stacked: the layouts that we write have no names for them."""


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        CheckpointError: it is not known, or has no names for one expert.
    """
    kind = config.get("model_type")
    if kind in STACKED_ONLY:
        raise CheckpointError(
            f"experts of {kind} are shipped stacked: the layouts of fp8, int8 and int4 have no names for them, and "
            f"nobody would read what we made up"
        )
    if kind not in FAMILIES:
        raise CheckpointError(
            f"model_type {kind!r} of config.json is no family whose experts are known; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def expert_count(config: dict[str, Any]) -> int | None:
    """Number of routed experts that config.json names, if it does."""
    return next((config[name] for name in EXPERT_COUNTS if isinstance(config.get(name), int)), None)
