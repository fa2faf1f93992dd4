"""One tree's side of a comparison of two: a program of its own, which knows jitmoe by its public names alone.

``jitmoe.bench.revisions`` runs this file with another tree of jitmoe on the path, which need not have it. It makes a
layer, prints ``ready``, and for each line that it reads one line with the seconds of forward and of forward and
backward.
"""

import importlib
import json
import sys
import time

import torch

# Of whichever tree is on the path, whose wings may be others: the package alone has names that stay.
jitmoe = importlib.import_module("jitmoe")


def main() -> None:
    """Answer one line for each line read; the sizes are the only argument, as JSON."""
    sizes = json.loads(sys.argv[1])
    tokens, top_k, experts, hidden = (sizes[name] for name in ("tokens", "top_k", "experts", "hidden"))
    torch.set_num_threads(sizes["threads"])
    generator = torch.Generator().manual_seed(0)
    layer = _layer(sizes, generator)
    print("ready", flush=True)
    for _ in sys.stdin:
        x, out_grad = torch.randn(2, tokens, hidden, generator=generator).bfloat16()
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=-1).indices
        weights = torch.rand(tokens, top_k, generator=generator).softmax(-1)
        start = time.perf_counter()
        with torch.no_grad():
            layer(x, ids, weights)
        forward = time.perf_counter() - start
        layer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        layer(x.requires_grad_(), ids, weights.requires_grad_()).backward(out_grad)
        print(forward, time.perf_counter() - start, flush=True)


def _layer(sizes: dict[str, int | str], generator: torch.Generator) -> torch.nn.Module:
    experts, hidden, intermediate = int(sizes["experts"]), int(sizes["hidden"]), int(sizes["intermediate"])
    config = jitmoe.MoEConfig(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        top_k=int(sizes["top_k"]),
        lora_rank=int(sizes["rank"]),
        lora_alpha=16.0,
        isa=str(sizes["isa"]),
    )

    def matrices(out: int, in_: int) -> list[torch.Tensor]:
        return [(torch.randn(out, in_, generator=generator) / in_**0.5).bfloat16() for _ in range(experts)]

    gate, up = matrices(intermediate, hidden), matrices(intermediate, hidden)
    layer: torch.nn.Module = jitmoe.MoELayer(config, gate, up, matrices(hidden, intermediate))
    with torch.no_grad():
        for parameter in layer.parameters():  # with B at zero, LoRA would be no ordinary work
            parameter.normal_(generator=generator).mul_(0.02)
    return layer


if __name__ == "__main__":
    main()
