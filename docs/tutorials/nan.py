# # Find a NaN
#
# In a project that came before jitmoe, the LoRA weights of experts 17 to 24 became NaN in a run, and no others.
# The cause was memory: a buffer that was still alive shared scratch with another one.
# The loss says only that something, somewhere, once went wrong. This page plays such a day:
# something writes a NaN into one value of one expert, and we find it. It is a script, `docs/tutorials/nan.py`, that
# was run.
#
# ## The accident
import torch

import jitmoe

torch.manual_seed(0)
config = jitmoe.MoEConfig(num_experts=32, hidden_size=256, intermediate_size=176, top_k=2, lora_rank=8, lora_alpha=16.0)
gate, up = torch.randn(2, 32, 176, 256).bfloat16() / 16
layer = jitmoe.MoELayer(config, gate, up, torch.randn(32, 256, 176).bfloat16() / 16)
x = torch.randn(200, 256).bfloat16()
weights, topk_ids = torch.randn(200, 32).softmax(-1).topk(2)

with torch.no_grad():
    layer.up_lora_b[17, 3, 2] = float("nan")
y = layer(x, topk_ids, weights)
print(f"{y.isnan().any(-1).sum()} of {len(y)} tokens have a NaN: those that the router sent to expert 17")

# ## Trace the call
#
# Inside `jitmoe.trace()` the layer runs other instances of its kernels, which look into each step of both passes,
# expert by expert. Ordinary calls pay nothing. `first()` names the step, the expert, the token, and what is at fault.
with jitmoe.trace() as report:
    layer(x, topk_ids, weights).sum().backward()
print(report.first())
assert "up_lora_b[17, 3, 2]" in str(report.first())

# ## How far it has got
#
# Gradients of the expert's LoRA are lost, and those of no other expert. An optimizer that steps now makes every
# weight of the expert NaN: this is what "experts 17 to 24" looked like.
broken = {e for e in range(32) for g in (layer.gate_lora_b.grad, layer.down_lora_b.grad) if g[e].isnan().any()}
print(f"experts with NaN gradients: {sorted(broken)}")
assert broken == {17}

# ## If it shows once a day
#
# `layer.capture(path, when="on_nonfinite")` writes the call to a file when it happens; `jitmoe replay FILE --trace`
# computes it again, on any machine, beside float64. `JITMOE_TRACE=1` traces a whole program until there is something to
# say.
#
# ## If memory is the suspect
#
# The ancestor's fault cannot be seen in values alone: each buffer held what was written to it. jitmoe plans scratch
# before it is taken, and proves that buffers which share addresses are never alive together. `JITMOE_CHECKED=1` runs
# kernels that hold each step to this plan: the first byte used outside of its life is a `PlanError` that names step and
# buffer.
plan = jitmoe.MemoryPlan.of(config, tokens=200)
print("\n".join(str(plan).splitlines()[:12]))
