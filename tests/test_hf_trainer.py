"""Training through stock tools: transformers' Trainer and PEFT's LoRA, in bfloat16, with the experts on jitmoe."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_threads, same_bits
from torch import Tensor
from training import ATTENTION, EXPERTS, HELD_OUT, ROWS, Run, byte_tokenizer, tiny_config, tiny_model, train, with_lora

pytest.importorskip("transformers", reason="jitmoe.hf needs transformers")
pytest.importorskip("peft", reason="LoRA is PEFT's")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

import jitmoe.hf
from jitmoe.oracle.yardstick import Verdict, judge_one

STOCK = ("eager", "grouped_mm", "batched_mm")
"""Implementations of experts that transformers brings."""

AUX = {"output_router_logits": True}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    jitmoe.hf.register()
    with on_threads(1):  # a model as small as this only waits for a second one
        yield


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run on jitmoe, with its checkpoints."""
    out = tmp_path_factory.mktemp("ours")
    return train(with_lora(tiny_model("jitmoe", **AUX)), out), out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same without the router's loss."""
    return train(with_lora(tiny_model("jitmoe")), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Losses of the same run on each of transformers' implementations, and in float64."""
    out = tmp_path_factory.mktemp("stock")
    found = {name: train(with_lora(tiny_model(name, **AUX)), out).curve() for name in STOCK}
    exact = with_lora(tiny_model("eager", **AUX)).double()
    return found | {"float64": train(exact, out).curve()}


def judged(losses: Tensor, stock: dict[str, Tensor]) -> Verdict:
    """The error rule, with the stock implementations' own errors for its yardstick.

    They are as wrong as bfloat16 makes a model of which only the experts differ, so no better result than theirs is
    promised: the limits are those for what is mostly luck.
    """
    errors = [stock[name] - stock["float64"] for name in STOCK]
    return judge_one("loss", losses, stock["float64"], errors, torch.ones_like(losses, dtype=torch.bool), coarse=True)


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


def test_losses_are_as_right_as_those_of_stock_experts(ours: tuple[Run, Path], stock: dict[str, Tensor]) -> None:
    verdict = judged(ours[0].curve(), stock)
    assert not verdict.fault and not verdict.doubt, verdict


def test_experts_that_are_wrong_by_5_percent_are_not(stock: dict[str, Tensor], tmp_path: Path) -> None:
    model = with_lora(tiny_model("jitmoe", **AUX))
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module.register_forward_hook(lambda *call: call[-1] * 1.05)
    assert judged(train(model, tmp_path).curve(), stock).fault


def test_training_and_evaluation_fall(tmp_path: Path) -> None:
    losses = train(with_lora(tiny_model("jitmoe")), tmp_path, max_steps=20, eval_steps=20, save_steps=20).losses
    training = [loss for _, kind, loss in losses if kind == "loss"]
    assert len(training) == 20 and losses[-1][1] == "eval_loss"
    assert sum(training[-5:]) < sum(training[:5]) - 1
    assert losses[-1][2] < training[0]


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(ours: tuple[Run, Path], step: int, tmp_path: Path) -> None:
    run, out = ours
    resumed = train(with_lora(tiny_model("jitmoe", **AUX)), tmp_path, resume=out / f"checkpoint-{step}")
    assert resumed.losses == run.losses, "the log holds the losses before the checkpoint too"
    again, first = adapter_tensors(resumed.model), adapter_tensors(run.model)
    assert [name for name in first if not same_bits(first[name], again[name])] == []


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_activations_give_the_same_bits(plain: Run, use_reentrant: bool, tmp_path: Path) -> None:
    """Without the router's loss, which stock reentrant checkpointing leaves without a gradient."""
    model = with_lora(tiny_model("jitmoe"))
    kind = {"use_reentrant": use_reentrant}
    run = train(model, tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=kind)
    assert run.losses == plain.losses


def test_accumulated_gradients_are_those_of_the_large_batch(ours: tuple[Run, Path], tmp_path: Path) -> None:
    """Only to the rule: sums of a large batch are rounded elsewhere."""
    large = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 1, "eval_strategy": "no"}
    runs = [train(with_lora(tiny_model(name)), tmp_path, **large) for name in ("jitmoe", "eager")]
    parts = [train(with_lora(tiny_model(name)), tmp_path, max_steps=1, eval_strategy="no") for name in ("jitmoe",)]
    (whole, plain), (accumulated,) = ([run.curve() for run in group] for group in (runs, parts))
    exact = train(with_lora(tiny_model("eager")).double(), tmp_path, **large).curve()
    reached = torch.ones(1, dtype=torch.bool)
    assert not judge_one("loss", accumulated, exact, [plain - exact, whole - exact], reached, coarse=True).fault


def test_the_routers_aux_loss_is_in_the_losses(ours: tuple[Run, Path], plain: Run) -> None:
    config = tiny_config()
    # Perfect balance gives top_k, one set of experts for all tokens the number of experts. The Trainer adds it once for
    # each of two accumulated batches.
    aux = (ours[0].losses[0][2] - plain.losses[0][2]) / (2 * config.router_aux_loss_coef)
    assert config.num_experts_per_tok <= aux <= config.num_experts


def test_a_saved_adapter_loads_in_stock_peft(ours: tuple[Run, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    run, _ = ours
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("eager", **AUX), tmp_path)
    saved, found = (get_peft_model_state_dict(model) for model in (run.model, loaded))
    assert saved.keys() == found.keys()
    assert sum("experts" in name for name in saved) == 2 * 2 * 2, "A and B of two parameters in two layers"
    assert [name for name in saved if not same_bits(saved[name], found[name])] == []
    assert all(saved[name].any() for name in saved), "a B that is zero was not trained"


def test_the_adapter_says_the_same_in_stock_peft(ours: tuple[Run, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    run, _ = ours
    run.model.save_pretrained(tmp_path)
    rows = torch.stack(HELD_OUT)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=rows).logits.double()

    models = {name: PeftModel.from_pretrained(tiny_model(name), tmp_path) for name in ("jitmoe", *STOCK)}
    exact = logits(PeftModel.from_pretrained(tiny_model("eager"), tmp_path).double())
    errors = [(logits(models[name]) - exact).flatten() for name in STOCK]
    reached = torch.ones(len(rows), dtype=torch.bool)
    verdict = judge_one("logits", logits(models["jitmoe"]), exact, errors, reached, coarse=True)
    assert not verdict.fault, verdict


TRL = importlib.util.find_spec("trl") is not None


@pytest.mark.skipif(not TRL, reason="trl is not installed; it brings datasets, pyarrow and pandas: 300 MB")
def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in ROWS])
    lora = LoraConfig(r=5, target_modules=ATTENTION, target_parameters=EXPERTS)

    def losses(model: Any) -> Tensor:
        arguments = SFTConfig(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=3, learning_rate=5e-3, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, bf16=model.dtype == torch.bfloat16, save_strategy="no",
        )  # fmt: skip
        torch.manual_seed(1)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=byte_tokenizer(), peft_config=lora
        )
        trainer.train()
        return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row], dtype=torch.float64)

    found = {name: losses(tiny_model(name)) for name in STOCK}
    exact = losses(tiny_model("eager", torch.float64))
    assert not judged(losses(tiny_model("jitmoe")), found | {"float64": exact}).fault
