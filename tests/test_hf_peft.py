"""PEFT, unchanged, on models whose experts run on jitmoe: right by the yardstick, never folded, and the same files."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from families import (
    EVERY_FAMILY,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    eager_model,
    experts_of,
    on_jitmoe,
    seeds_with_same_routing,
    tokens,
)
from helpers import same_bits
from safetensors.torch import load_file
from test_hf_models import batch_of, check, together
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jitmoe
from jitmoe.errors import AdapterError

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'jitmoe[hf]'")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CALLS, TOKENS = 3, 200


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    jitmoe.hf.register()


def lora_config(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_parameters": TARGETS, **fields})


def randomise(model: Any, seed: int = 0) -> None:
    """LoRA values that matter, representable in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.3).bfloat16())


def peft_models(family: str = "qwen3_moe", *configs: Any) -> tuple[Any, Any]:
    """The same PEFT model with eager experts and on jitmoe; adapters are named "default", "second" and so on."""
    eager = eager_model(family)
    models = []
    for base in (eager, on_jitmoe(eager)):
        model = peft.get_peft_model(base, (configs or (lora_config(),))[0])
        for name, config in zip(("second", "third"), configs[1:], strict=False):
            model.add_adapter(name, config)
        randomise(model)
        models.append(model)
    return models[0], models[1]


def step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    found = {"logits": out.logits.detach()[batch["labels"] >= 0]}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Result and gradients of the experts of the first layer, called through PEFT's wrappers.

    x is small: where a gate of gpt-oss is at its limit, rounding decides about gradients.
    """
    experts = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    generator = torch.Generator().manual_seed(1)
    x, dout = (0.4 * torch.randn(2, TOKENS, HIDDEN, generator=generator)).bfloat16().to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 3, generator=generator).to(dtype)
    model.zero_grad()
    out = experts(x.requires_grad_(), ids, weights)
    out.backward(dout)
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}


def check_step(eager: Any, ours: Any) -> None:
    """The experts alone are more right than stock PEFT, the model, most of whose error is not theirs, is as right."""
    double = copy.deepcopy(eager).double()
    results, oracle, plain = alone(ours, torch.bfloat16), alone(double, torch.float64), alone(eager, torch.bfloat16)
    assert results.keys() == plain.keys()
    check(results, oracle, plain, coarse=set())
    seeds = seeds_with_same_routing((eager, double, ours), lambda seed: batch_of(seed, padded=False))
    batches = [batch_of(seed, padded=False) for seed in islice(seeds, CALLS)]
    steps = [[{"logits": step(model, b)["logits"]} for b in batches] for model in (ours, double, eager)]
    check(*map(together, steps), coarse={"logits"})


@EVERY_FAMILY
def test_a_step_with_lora_is_as_right_as_stock_peft(family: str) -> None:
    check_step(*peft_models(family))


CONFIGS = {
    "rslora": lora_config(use_rslora=True),
    "rank-pattern": lora_config(rank_pattern={"mlp.experts.down_proj": 2}, alpha_pattern={"mlp.experts.down_proj": 3}),
    "with-attention": lora_config(target_modules=["q_proj", "v_proj"]),
    "gate-up-alone": lora_config(target_parameters=TARGETS[:1]),
    "down-alone": lora_config(target_parameters=TARGETS[1:]),
    "other-order": lora_config(target_parameters=TARGETS[::-1]),
    "rank-of-40": lora_config(r=40),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_kind_of_config(family: str, config: str) -> None:
    check_step(*peft_models(family, CONFIGS[config]))


def test_rank_patterns_are_applied() -> None:
    _, ours = peft_models("qwen3_moe", CONFIGS["rank-pattern"])
    ranks = {m.parameter_name: m.r["default"] for m in ours.modules() if hasattr(m, "parameter_name")}
    assert ranks == {"down_proj": 2, "gate_up_proj": 4}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_several_adapters_add_up(family: str) -> None:
    eager, ours = peft_models(family, lora_config(), lora_config(r=6, lora_alpha=3))
    for model in (eager, ours):
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    check_step(eager, ours)


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens() if ids is None else ids).logits
    return found


def test_adapters_are_set_disabled_and_deleted() -> None:
    eager, ours = peft_models("qwen3_moe", lora_config(), lora_config(r=6))
    first = logits(ours)
    ours.set_adapter("second")
    second = logits(ours)
    ours.set_adapter("default")
    assert same_bits(logits(ours), first) and not same_bits(first, second)
    with ours.disable_adapter():
        assert same_bits(logits(ours), logits(on_jitmoe(eager.unload())))
    assert same_bits(logits(ours), first)
    ours.delete_adapter("default")
    ours.set_adapter("second")
    assert same_bits(logits(ours), second)


@EVERY_FAMILY
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_merging_gives_the_weights_of_stock_peft(family: str, safe: bool) -> None:
    eager, ours = peft_models(family)
    logits(ours)  # packs
    merged, expected = (model.merge_and_unload(safe_merge=safe) for model in (ours, eager))
    names = [name for name, _ in expected.named_parameters()]
    assert names == [name for name, _ in merged.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert same_bits(merged.get_parameter(name).contiguous(), parameter), name
    assert same_bits(logits(merged), logits(on_jitmoe(expected)))


def test_merge_and_unmerge_in_place() -> None:
    eager, ours = peft_models()
    logits(ours)
    for model in (eager, ours):
        model.merge_adapter()
    for mine, stock in zip(experts_of(ours).values(), experts_of(eager).values(), strict=True):
        assert same_bits(mine.gate_up_proj.contiguous(), stock.gate_up_proj)
    for model in (eager, ours):
        model.unmerge_adapter()
    for mine, stock in zip(experts_of(ours).values(), experts_of(eager).values(), strict=True):
        assert same_bits(mine.gate_up_proj.contiguous(), stock.gate_up_proj)


class Sizes(TorchDispatchMode):
    """Remembers operators whose result is as large as all matrices of one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is Tensor and leaf.numel() >= EXPERTS * INTERMEDIATE * HIDDEN:
                self.large.append(str(func))
        return result


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_base_is_never_folded(family: str, several: bool) -> None:
    models = peft_models(family, lora_config(), lora_config(r=2))
    found = []
    for model in models:
        if several:
            model.base_model.set_adapter(["default", "second"])
        step(model, batch_of(0, padded=False))  # packs
        with Sizes() as sizes:
            step(model, batch_of(0, padded=False))
        found.append(sizes.large)
    assert found[0], "stock PEFT folds, and this test sees it"
    assert found[1] == []


def test_saving_an_adapter_unpacks_nothing(tmp_path: Path) -> None:
    _, ours = peft_models()
    logits(ours)
    with Sizes() as sizes:
        ours.save_pretrained(tmp_path)
    assert sizes.large == []


@EVERY_FAMILY
def test_saved_adapters_are_those_of_stock_peft(family: str, tmp_path: Path) -> None:
    eager, ours = peft_models(family, lora_config(target_modules=["q_proj"] if family != "deepseek_v2" else None))
    logits(ours)
    for name, model in (("eager", eager), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("eager", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(same_bits(files[0][name], files[1][name]) for name in files[0])
    loaded = peft.PeftModel.from_pretrained(eager_model(family), tmp_path / "ours")
    assert same_bits(logits(loaded), logits(eager))
    again = peft.PeftModel.from_pretrained(on_jitmoe(eager_model(family)), tmp_path / "eager")
    assert same_bits(logits(again), logits(ours))


@pytest.mark.parametrize("autocast", [True, False], ids=["float32", "bfloat16"])
def test_the_dtype_of_lora_is_its_owners(autocast: bool) -> None:
    base = on_jitmoe(eager_model("qwen3_moe"))
    model = peft.get_peft_model(base, lora_config(), autocast_adapter_dtype=autocast)
    randomise(model)
    gradients = {name: grad for name, grad in step(model, batch_of(0, False)).items() if "experts" in name}
    assert {grad.dtype for grad in gradients.values()} == {torch.float32 if autocast else torch.bfloat16}


def test_values_of_lora_are_read_in_every_call() -> None:
    _, ours = peft_models()
    before = logits(ours)
    randomise(ours, seed=1)
    after = logits(ours)
    randomise(ours)
    assert same_bits(logits(ours), before) and not same_bits(before, after)


def test_where_experts_are_eager_peft_does_what_it_did() -> None:
    eager, _ = peft_models()
    expected = logits(eager)
    with unpatched():
        assert same_bits(logits(eager), expected)


@contextmanager
def unpatched() -> Iterator[None]:
    wrapper = peft.tuners.lora.layer.ParamWrapper
    ours = wrapper._activate_lora
    wrapper._activate_lora = ours.folds
    try:
        yield
    finally:
        wrapper._activate_lora = ours


def test_a_parametrised_module_is_refused_not_computed_without_lora() -> None:
    _, ours = peft_models()
    with unpatched(), pytest.raises(jitmoe.UnsupportedExpertsError, match=r"Qwen3MoeExperts .* parametrised"):
        logits(ours)


def test_an_error_in_a_call_leaves_no_adapter_behind() -> None:
    eager, ours = peft_models()
    expected = logits(ours)
    module = next(iter(experts_of(ours).values()))
    wrapper = next(m for m in ours.modules() if getattr(m, "parameter_name", "") == "down_proj")
    with pytest.raises(jitmoe.InputError):
        wrapper(torch.zeros(1, HIDDEN + 1).bfloat16(), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    bare = on_jitmoe(eager.unload())
    call = (torch.randn(5, HIDDEN).bfloat16(), torch.arange(5)[:, None], torch.ones(5, 1))
    with torch.no_grad():
        assert same_bits(module(*call), next(iter(experts_of(bare).values()))(*call))
    assert same_bits(logits(ours), expected)


def test_threads_do_not_see_each_others_calls() -> None:
    _, ours = peft_models()
    batches = [tokens(2, 9, seed) for seed in range(2)]
    expected = [logits(ours, ids) for ids in batches]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(20):
            if not same_bits(logits(ours, batches[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_lora_in_the_layout_of_old_peft_is_an_error() -> None:
    _, ours = peft_models()
    wrapper = next(m for m in ours.modules() if getattr(m, "parameter_name", "") == "down_proj")
    a, b = wrapper.lora_A["default"], wrapper.lora_B["default"]
    a.weight, b.weight = (
        torch.nn.Parameter(torch.zeros(s)) for s in ((EXPERTS * 4, HIDDEN), (INTERMEDIATE, EXPERTS * 4))
    )
    with pytest.raises(AdapterError, match=r"adapter 'default' has A .* for down_proj, expected .* `jitmoe convert`"):
        logits(ours)


def test_a_second_wrapper_of_one_weight_is_refused() -> None:
    _, ours = peft_models()
    wrapper = next(m for m in ours.modules() if getattr(m, "parameter_name", "") == "down_proj")
    second = wrapper._activate_lora(["default"])
    with (
        wrapper._activate_lora(["default"]),
        pytest.raises(AdapterError, match="two wrappers of PEFT hold LoRA"),
        second,
    ):
        pass


def test_lora_on_biases_is_refused() -> None:
    base = on_jitmoe(eager_model("gpt_oss"))
    model = peft.get_peft_model(base, lora_config(target_parameters=["mlp.experts.down_proj_bias"]))
    with pytest.raises(AdapterError, match="LoRA on down_proj_bias of GptOssExperts is not computed"):
        logits(model)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_with_lora_changes_no_bit(reentrant: bool) -> None:
    _, ours = peft_models()
    ours.train()
    batch = batch_of(0, padded=False)
    expected = step(ours, batch)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    found = step(ours, batch)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same_bits(expected[name], found[name])] == []
