"""What ``jitmoe train`` expects to hold, beside what torch and PEFT really make."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_threads
from training import ATTENTION, EXPERTS, tiny_model, with_lora

pytest.importorskip("transformers", reason="jitmoe train needs transformers")
pytest.importorskip("peft", reason="jitmoe train needs PEFT")

import jitmoe.hf
from jitmoe.errors import BudgetError
from jitmoe.hf.train.estimate import estimate, lora_elements
from jitmoe.hf.train.sketch import Held, Sketch, counting, experts_of, held_by_torch, sketch, stand_in

RANK, BATCH = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jitmoe.hf.register()
    folder = tmp_path_factory.mktemp("model")
    tiny_model("eager").save_pretrained(folder)
    return folder


@pytest.fixture
def found(folder: Path) -> Sketch:
    return sketch(folder)


def elements(model: Any, name: str) -> int:
    return sum(p.numel() for key, p in model.named_parameters() if name in key)


def test_a_sketch_is_the_model(found: Sketch) -> None:
    model = tiny_model("eager")
    (understood,) = found.experts
    assert (found.experts[understood], found.top_k) == (2, 3)
    assert (understood.layout.experts, understood.layout.hidden, understood.layout.intermediate) == (7, 40, 24)
    assert list(found.attention) == ATTENTION and list(found.parameters) == EXPERTS
    assert found.other_weights == sum(p.numel() for p in model.parameters()) - elements(model, ".experts.")


@pytest.mark.parametrize("length", [31, 128])
def test_activations_are_those_of_a_real_step_to_the_byte(found: Sketch, length: int) -> None:
    from peft import LoraConfig, get_peft_model

    expected = held_by_torch(found, RANK, BATCH, length)
    model = get_peft_model(tiny_model("eager"), LoraConfig(r=RANK, target_modules=ATTENTION))
    for module in experts_of(model):
        module.forward = stand_in
    model.train()
    ids = torch.zeros(BATCH, length, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    places = torch.arange(length).expand(BATCH, length)
    with on_threads(1), counting() as count, torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids, attention_mask=mask, position_ids=places, use_cache=False).loss.backward()
    assert expected.peak == count.peak
    assert expected.peak > 4 * BATCH * length * 259, "the logits alone are more"


def test_lora_is_that_of_peft(found: Sketch) -> None:
    (understood,) = found.experts
    model = with_lora(tiny_model("eager"), RANK)
    held = held_by_torch(found, RANK, BATCH, 31)
    assert 2 * lora_elements(understood, RANK) + held.lora == elements(model, "lora_")


def test_items_are_bytes_of_what_they_say(found: Sketch) -> None:
    held_by_torch(found, RANK, BATCH, 31)  # it gives the model of the sketch LoRA, which is not to be counted twice
    held = Held(peak=1_000_000, lora=77)
    rows = dict(estimate(found, held, RANK, 93, 1, None).items)
    (understood,) = found.experts
    lora = 4 * (2 * lora_elements(understood, RANK) + 77)
    assert rows["LoRA, float32"] == rows["gradients of LoRA"] == lora and rows["AdamW, two moments"] == 2 * lora
    model = tiny_model("eager")
    others = sum(p.numel() for p in model.parameters()) - elements(model, ".experts.")
    assert rows["all other weights, bfloat16"] == 2 * others
    assert rows["activations outside of the experts"] == 1_000_000
    assert rows["experts, packed"] >= 2 * 2 * 3 * 7 * 40 * 24, "packing pads"


def test_more_layers_and_tokens_hold_more(found: Sketch) -> None:
    held = Held(0, 0)
    one = estimate(found, held, RANK, 93, 1, None)
    (understood,) = found.experts
    deeper = replace(found, experts=Counter({understood: 4}))
    assert dict(estimate(deeper, held, RANK, 93, 1, None).items)["experts, packed"] == 2 * one.items[0][1]
    assert estimate(found, held, RANK, 9300, 1, None).total > one.total


def test_the_smaller_of_budget_and_free_memory_counts(found: Sketch) -> None:
    held = Held(0, 0)
    with pytest.raises(BudgetError, match="--memory-budget is 1 kB"):
        estimate(found, held, RANK, 93, 1, 1000).check()
    with pytest.raises(BudgetError, match="free memory of this machine"):
        estimate(found, Held(1 << 60, 0), RANK, 93, 1, 1 << 61).check()
    estimate(found, held, RANK, 93, 1, None).check()


def test_what_cannot_be_told_is_said(found: Sketch) -> None:
    expected = estimate(found, "RuntimeError: it looks at values", RANK, 93, 1, None)
    assert "it looks at values" in expected.unknown
    assert "activations outside of the experts" not in dict(expected.items)
