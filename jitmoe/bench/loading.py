"""What it takes to load a model: most memory and time, with experts packed at once, later, or long ago."""

import importlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jitmoe.bench.footprint import in_child, peak_of
from jitmoe.hf.loading import from_pretrained
from jitmoe.hf.peft_lora import IMPLEMENTATION
from jitmoe.hf.registry import register
from jitmoe.progress import track
from jitmoe.text import size, table

LAYERS, EXPERTS, HIDDEN, VOCABULARY = 8, 64, 1024, 1000
"""Of the model that is loaded: a Qwen3-MoE whose experts are nearly all of it."""

SHARD = "500MB"


@dataclass(frozen=True)
class Loading:
    """One way to load the model, measured in a process of its own.

    Attributes:
        way: to load it.
        model: bytes of the checkpoint.
        peak: most bytes that the process took for it beyond those before, pages of mapped files included.
        seconds: until the model was there and had computed one token.
    """

    way: str
    model: int
    peak: int
    seconds: float


def measure_loading(gigabytes: float, threads: int) -> list[Loading]:
    """Make a checkpoint of about ``gigabytes`` and load it in each way, from the page cache."""
    with tempfile.TemporaryDirectory(prefix="jitmoe-bench-") as name:
        folder = Path(name)
        in_child(_make, folder / "model", gigabytes)
        model = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        found = []
        for way in track(WAYS, len(WAYS), "way to load"):
            peak, seconds = in_child(_load, way, folder, gigabytes, threads)
            found.append(Loading(way, model, peak, seconds))
        return found


def loading_table(found: Sequence[Loading]) -> str:
    """Peaks as multiples of the model."""
    head = ("way to load", "model", "peak / model", "to the first token")
    rows = [(f.way, size(f.model), f"{f.peak / f.model:.3f}", f"{f.seconds:.1f} s") for f in found]
    return f"{table([head, *rows])}\nPeaks have pages of mapped files in them, which the system can take back."


def loading_json(found: Sequence[Loading]) -> list[dict[str, Any]]:
    """The same for files."""
    return [vars(f) for f in found]


def _model(gigabytes: float, layers: int = LAYERS, experts: int = EXPERTS) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    width = max(32, int(gigabytes * 1e9 / (LAYERS * EXPERTS * 3 * HIDDEN * 2)) // 32 * 32)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _make(folder: Path, gigabytes: float) -> None:
    _model(gigabytes).save_pretrained(folder, max_shard_size=SHARD)


def _use(model: Any) -> None:
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))


def _stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    register()
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.bfloat16, experts_implementation=IMPLEMENTATION
    )


def _ours(folder: Path) -> Any:
    return from_pretrained(folder / "model")


def _packed(folder: Path) -> Any:
    return from_pretrained(folder / "model", packed=folder / "packed")


WAYS: dict[str, Callable[[Path], Any]] = {
    "transformers, packed at the first call": _stock,
    "jitmoe.hf.from_pretrained": _ours,
    "jitmoe.hf.from_pretrained, packed= written": _packed,
    "jitmoe.hf.from_pretrained, packed= mapped": _packed,
}
"""In this order: the last one finds what the one before has written."""


def _load(way: str, folder: Path, gigabytes: float, threads: int) -> tuple[int, float]:
    """Bytes and seconds in this fresh process, which has imported everything and compiled the kernels before."""
    torch.set_num_threads(threads)
    importlib.import_module("jitmoe.hf.packing")
    register()
    small = _model(gigabytes, layers=1, experts=2)
    small.set_experts_implementation(IMPLEMENTATION)
    _use(small)
    del small
    start = time.perf_counter()
    peak = peak_of(lambda: _use(WAYS[way](folder)))
    return peak, time.perf_counter() - start
