"""Fine-tunes a tiny layer and a tiny transformers model with an installed jitmoe: python installed.py CHECKOUT."""

import sys
from pathlib import Path

import peft
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import jitmoe
import jitmoe.hf

CHECKOUT = Path(sys.argv[1])


def check_place() -> None:
    """Refuse to try a jitmoe that is not the installed one."""
    place = Path(jitmoe.__file__).resolve()
    if place.is_relative_to(CHECKOUT) or "site-packages" not in place.parts:
        sys.exit(f"jitmoe was imported from {place}, which is not an installation")


def train(parameters: list[torch.Tensor], loss_of) -> None:
    """Take steps, and refuse a loss that does not fall."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        sys.exit(f"the loss does not fall: {losses}")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


def layer() -> None:
    """A layer of its own."""
    config = jitmoe.MoEConfig(num_experts=4, hidden_size=64, intermediate_size=96, top_k=2, lora_rank=4, lora_alpha=8.0)
    gate, up = torch.randn(2, 4, 96, 64).bfloat16() / 8
    moe = jitmoe.MoELayer(config, gate, up, torch.randn(4, 64, 96).bfloat16() / 8)
    x, aim = torch.randn(2, 32, 64).bfloat16()
    weights, ids = torch.randn(32, 4).softmax(-1).topk(2)
    train(list(moe.parameters()), lambda: (moe(x, ids, weights) - aim).float().square().mean())


def model() -> None:
    """A model of transformers with PEFT's adapters."""
    jitmoe.hf.register()
    sizes = {"vocab_size": 100, "hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(**sizes, **heads, intermediate_size=96, num_experts_per_tok=2)
    base = Qwen3MoeForCausalLM(config).bfloat16()
    base.set_experts_implementation("jitmoe")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[], target_parameters=experts))
    ids = torch.randint(0, 100, (2, 16))
    train([p for p in tuned.parameters() if p.requires_grad], lambda: tuned(input_ids=ids, labels=ids).loss)
    jitmoe.hf.report(tuned)


if __name__ == "__main__":
    check_place()
    torch.manual_seed(0)
    layer()
    model()
