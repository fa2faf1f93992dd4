"""Models of transformers on jitmoe: as right as with eager experts, by the yardstick, in every way of running."""

import copy
import pickle
from itertools import islice
from typing import Any

import pytest
import torch
from families import (
    EVERY_FAMILY,
    EXPERTS,
    LAYERS,
    TOP_K,
    VOCABULARY,
    eager_model,
    experts_of,
    freeze_experts,
    on_jitmoe,
    seeds_with_same_routing,
    tokens,
)
from helpers import same_bits
from torch import Tensor

import jitmoe
from jitmoe.errors import FrozenWeightsError
from jitmoe.oracle.yardstick import judge_one

TOKENS = 96

CALLS = 4
"""Calls that are judged together: with eager experts one of few tokens may be right by luck."""

Step = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    jitmoe.hf.register()


def check(results: Step, oracle: Step, plain: Step, coarse: set[str]) -> None:
    """Hold ``results`` to the error rule; those in ``coarse`` may be as wrong as eager, the others must be better."""
    everything = torch.ones((), dtype=torch.bool)
    errors = {name: (plain[name].double() - oracle[name]).flatten() for name in results}
    verdicts = [
        judge_one(name, result, oracle[name], [errors[name]], everything, name in coarse)
        for name, result in results.items()
    ]
    wrong = [str(verdict) for verdict in verdicts if verdict.fault or verdict.doubt]
    assert not wrong, "\n".join(wrong)


def together(steps: list[Step]) -> Step:
    return {name: torch.cat([step[name].flatten() for step in steps]) for name in steps[0]}


def batch_of(seed: int, padded: bool) -> Step:
    ids = tokens(3, 8, seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3], mask[1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def training_step(model: Any, batch: Step) -> Step:
    """Loss of each token, logits, and gradients of embeddings and routers."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    logits, labels = out.logits.detach(), batch["labels"]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    found = {"losses": losses[labels[:, 1:].flatten() >= 0], "logits": logits[labels >= 0]}
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_tokens.weight", "mlp.gate.weight", "router.weight")):
            assert parameter.grad is not None, name
            rows = batch["input_ids"].unique() if "embed" in name else slice(None)  # others are zero
            found[name] = parameter.grad[rows].clone()
    return found


@EVERY_FAMILY
@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
def test_a_training_step_is_as_right_as_with_eager_experts(family: str, padded: bool) -> None:
    eager = eager_model(family)
    freeze_experts(eager)
    ours, double = on_jitmoe(eager), copy.deepcopy(eager).double()
    seeds = seeds_with_same_routing((eager, double, ours), lambda seed: batch_of(seed, padded))
    batches = [batch_of(seed, padded) for seed in islice(seeds, CALLS)]
    results, oracle, plain = (
        together([training_step(model, batch) for batch in batches]) for model in (ours, double, eager)
    )
    assert sum("gate" in name or "router" in name for name in results) == LAYERS
    check(results, oracle, plain, coarse=set(results))  # most of the error comes from the rest of the model


def experts_step(module: Any, dtype: torch.dtype, weights_dtype: torch.dtype, skip: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = module.down_proj.shape[-1 if module.is_transposed else 1]
    x = (2 * torch.randn(TOKENS, hidden, generator=generator)).bfloat16().to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, generator=generator).bfloat16()
    dout = torch.randn(TOKENS, hidden, generator=generator).bfloat16().to(dtype)
    if skip:
        dropped = torch.rand(TOKENS, TOP_K, generator=generator) < 0.3
        if dtype == torch.bfloat16:
            ids = ids.masked_fill(dropped, EXPERTS + 2)
        else:
            weights = weights.masked_fill(dropped, 0.0)  # transformers' own experts know one id beyond the last at most
    weights = weights.to(dtype if dtype == torch.float64 else weights_dtype).requires_grad_()
    out = module(x, ids, weights)
    out.backward(dout)
    kept = ~dropped if skip else torch.ones(TOKENS, TOP_K, dtype=torch.bool)
    if skip and dtype == torch.bfloat16:
        assert weights.grad[dropped].count_nonzero() == 0
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad[kept]}


@EVERY_FAMILY
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=["weights32", "weights16"])
def test_the_experts_alone_are_more_right_than_eager(family: str, weights_dtype: torch.dtype) -> None:
    model = eager_model(family)
    freeze_experts(model)
    eager = next(iter(experts_of(model).values()))
    ours = next(iter(experts_of(on_jitmoe(model)).values()))
    double = copy.deepcopy(eager).double()
    results = experts_step(ours, torch.bfloat16, weights_dtype, skip=False)
    oracle = experts_step(double, torch.float64, weights_dtype, skip=False)
    plain = experts_step(eager, torch.bfloat16, weights_dtype, skip=False)
    assert results["weights"].dtype == weights_dtype
    # Both take the gradient of the weights in float32. Where a gate is at its limit, rounding decides about x's.
    check(results, oracle, plain, coarse={"weights", "x"} if family == "gpt_oss" else {"weights"})


@EVERY_FAMILY
def test_ids_beyond_the_experts_are_skipped(family: str) -> None:
    model = eager_model(family)
    freeze_experts(model)
    eager = next(iter(experts_of(model).values()))
    ours = next(iter(experts_of(on_jitmoe(model)).values()))
    results = experts_step(ours, torch.bfloat16, torch.float32, skip=True)
    oracle = experts_step(copy.deepcopy(eager).double(), torch.float64, torch.float32, skip=True)
    plain = experts_step(eager, torch.bfloat16, torch.float32, skip=False)
    whole = experts_step(copy.deepcopy(eager).double(), torch.float64, torch.float32, skip=False)
    # Errors of plain torch on the call without skipping: more slots, and a larger error, in each row.
    plain = {name: oracle[name] + plain[name].double() - whole[name] for name in ("out", "x")}
    del results["weights"]
    check(results, oracle, plain, coarse={"x"} if family == "gpt_oss" else set())


@EVERY_FAMILY
def test_generate_takes_tokens_that_eager_experts_find_best(family: str) -> None:
    eager = eager_model(family)
    ours = on_jitmoe(eager)
    prompt = tokens(2, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    said = ours.generate(prompt, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert said.shape == (2, 11)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.int64)], 1)
    with torch.no_grad():
        logits = eager(said, attention_mask=mask).logits.float()[:, 4:-1]
        own = ours(said, attention_mask=mask).logits.float()[:, 4:-1]
    logits[..., 2] = own[..., 2] = -torch.inf  # the end of a sentence was forbidden
    taken = logits.gather(-1, said[:, 5:, None])[..., 0]
    # Two that are closer than the two models are to each other may change places.
    slack = 2 * (own - logits).nan_to_num(0.0).abs().amax(-1)
    assert (taken >= logits.amax(-1) - slack).all()


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY_FAMILY
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_no_bit(family: str, reentrant: bool) -> None:
    model = on_jitmoe(eager_model(family)).train()
    freeze_experts(model)
    ids = tokens()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, ids)
    assert expected.keys() == found.keys() and expected
    assert [name for name in expected if not same_bits(expected[name], found[name])] == []


@EVERY_FAMILY
def test_autocast(family: str) -> None:
    eager = eager_model(family)
    freeze_experts(eager)
    module = next(iter(experts_of(on_jitmoe(eager)).values()))
    x = torch.randn(8, module.down_proj.shape[-1 if module.is_transposed else 1])
    ids, weights = torch.arange(8)[:, None] % EXPERTS, torch.ones(8, 1)
    expected = module(x.bfloat16(), ids, weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x, ids, weights)
    assert found.dtype == torch.float32
    assert same_bits(found.bfloat16(), expected)


@EVERY_FAMILY
def test_inference_mode_deepcopy_and_pickle(family: str) -> None:
    model = on_jitmoe(eager_model(family))
    ids = tokens()
    with torch.inference_mode():
        expected = model(ids).logits.clone()
    with torch.no_grad():
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same_bits(other(ids).logits, expected)
    freeze_experts(model)  # weights that were packed in inference mode
    model(ids, labels=ids).loss.backward()


def test_base_weights_that_want_a_gradient_are_an_error_in_backward() -> None:
    model = on_jitmoe(eager_model("qwen3_moe"))
    ids = tokens()
    loss = model(ids, labels=ids).loss  # forward alone is fine: evaluation is often run so
    with pytest.raises(FrozenWeightsError, match=r"Qwen3MoeExperts have requires_grad=True.*requires_grad_\(False\)"):
        loss.backward()
    freeze_experts(model)
    model(ids, labels=ids).loss.backward()


def test_the_choice_is_made_in_from_config_too() -> None:
    from transformers import AutoModelForCausalLM

    eager = eager_model("qwen3_moe")
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(eager.config), dtype=torch.bfloat16, experts_implementation="jitmoe"
    )
    model.load_state_dict(eager.state_dict())
    ids = tokens()
    with torch.no_grad():
        assert same_bits(model(ids).logits, on_jitmoe(eager)(ids).logits)
    assert model.vocab_size == VOCABULARY
