# # Fine-tune, step by step
#
# A tiny Qwen3-MoE learns a sequence, with stock transformers and PEFT, in seconds. Each step is the one that you take
# with a checkpoint of 60 GB; only the sizes differ. This page is a script, `docs/tutorials/finetune.py`, that was run.
#
# ## A model
#
# `register()` offers jitmoe to transformers as an implementation of experts. A checkpoint on disk would come from
# `from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="jitmoe")`.
import tempfile

import peft
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import jitmoe.hf

jitmoe.hf.register()
torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=61,
    hidden_size=46,
    intermediate_size=33,
    moe_intermediate_size=27,
    head_dim=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts=7,
    num_experts_per_tok=3,
)
base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="jitmoe")

# ## Adapters
#
# PEFT puts LoRA on parameters of experts by `target_parameters`. Experts stay frozen; A and B are PEFT's own tensors,
# and jitmoe reads them where they lie, so any optimizer and any scheduler work.
experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=experts)
model = peft.get_peft_model(base, lora)
trainable, total = model.get_nb_trainable_parameters()
print(f"{trainable} of {total} parameters are trained")

# ## Train
#
# Your own loop, `Trainer` or `SFTTrainer`: nothing in it knows of jitmoe. The first step compiles kernels for these
# sizes, once for this machine; `jitmoe build` does that beforehand.
ids = torch.randint(3, 61, (2, 12))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
losses = []
for _ in range(30):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] - 0.5

# ## Look at what runs where
#
# A line for each experts module: the kernel, the format of its weights and the adapters, or why it is not on jitmoe.
jitmoe.hf.report(model)

# ## Keep the adapter
#
# Stock PEFT writes and reads it; a server that knows PEFT's layout loads it. Others: `jitmoe convert`.
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(model.unload(), folder)
    with torch.no_grad():
        print(f"loss of the adapter that was read back: {again(input_ids=ids, labels=ids).loss:.2f}")
