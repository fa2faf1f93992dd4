"""What the ranks of tests of data parallelism with transformers and PEFT do."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import HIDDEN, TOP_K, eager_model, experts_of, seeds_with_same_routing
from helpers import different
from jobs_data import once_in_memory
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from training import tiny_model, train, with_lora
from transformers.distributed.expert_parallel import apply_expert_parallelism

import jitmoe.hf
from jitmoe.distributed import check_replicas
from jitmoe.errors import UnsupportedExpertsError
from jitmoe.hf.weight import PackedWeight
from jitmoe.oracle.yardstick import judge_one


def peft(rank: int, world: int, folder: str) -> None:
    """A PeftModel over experts that were packed before it was wrapped: gradients of the whole batch, replicas alike."""
    jitmoe.hf.register()
    model, seed = _model("jitmoe"), torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        exact, plain = _model("eager").double(), _model("eager")
        seed[0] = next(seeds_with_same_routing([exact, plain, model], _batch))
    dist.broadcast(seed, 0)
    batch = _batch(int(seed))
    assert jitmoe.hf.pack(model) == 2
    parallel = DistributedDataParallel(model)
    packed = [(name, w) for name, w in model.named_parameters() if isinstance(w, PackedWeight)]
    assert len(packed) == 4 and {name for name, _ in packed} <= set(parallel.parameters_to_ignore)
    rows = {name: tensor[rank * 4 // world : (rank + 1) * 4 // world] for name, tensor in batch.items()}
    parallel(**rows).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    told: list[Any] = [None] * world
    dist.all_gather_object(told, found)
    assert not any(different(one, found) for one in told)
    if rank == 0:
        for one in (exact, plain):
            one(**batch).loss.backward()
        rights = {name: p.grad for name, p in exact.named_parameters()}
        for name, p in plain.named_parameters():
            if p.requires_grad:
                _judge(name, found[name], rights[name], p.grad)
    holder = Holder(model)  # which hides the names: everything is broadcast, and nobody writes
    DistributedDataParallel(holder)
    assert [weight.packed.writes for _, weight in packed] == [0] * 4
    _mapped(rank, world, folder)


class Holder(nn.Module):
    """A module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _judge(name: str, found: Tensor, right: Tensor, plain: Tensor) -> None:
    reached = torch.ones(right.shape[:1], dtype=torch.bool)
    verdict = judge_one(name, found, right, [(plain.double() - right).flatten()], reached, coarse=True)
    assert not verdict.fault, str(verdict)


def _model(implementation: str) -> Any:
    model = with_lora(tiny_model(implementation))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # or A would have no gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train(False)


def _batch(seed: int) -> dict[str, Tensor]:
    # Short rows: each token is one more that may stand between two experts.
    ids = torch.randint(259, (4, 15), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def _mapped(rank: int, world: int, folder: str) -> None:
    """Experts in files that one rank packed, mapped by all, through DDP's broadcasts too."""
    base, kept = Path(folder, "base"), Path(folder, "packed")
    if rank == 0:
        tiny_model("eager").save_pretrained(base)
        jitmoe.hf.from_pretrained(base, packed=kept)
    dist.barrier()
    model = jitmoe.hf.from_pretrained(base, packed=kept)
    parallel = DistributedDataParallel(Holder(with_lora(model)))
    parallel.module.model(**_batch(0)).loss.backward()
    dist.barrier()
    for path in kept.glob("*.packed"):
        once_in_memory(path, world)
    dist.barrier()


def expert_parallel(rank: int, world: int) -> None:
    """A module on jitmoe inside transformers' expert parallelism, and inside ours: what the eager one computes."""
    jitmoe.hf.register()
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("tp", "ep"))
    for implementation in ("all_to_all", "all_reduce", "jitmoe"):
        module = _first_experts(eager_model("qwen3_moe", num_experts=4 * world)).requires_grad_(False)
        plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
        module.config._experts_implementation = "jitmoe"
        plan = {"gate_up_proj": "grouped_gemm", "down_proj": "grouped_gemm", "": "ep_dispatch_experts"}
        shared = implementation == "all_reduce"
        apply_expert_parallelism(module, mesh["ep"], mesh["ep" if shared else "tp"], plan, implementation)
        for tokens, chosen in ((12, 4 * world), (0 if rank == 1 and not shared else 9, 4), (40, 4 * world)):
            generator = torch.Generator().manual_seed(0 if shared else rank)
            x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
            ids = torch.rand(tokens, chosen, generator=generator).argsort(-1)[:, :TOP_K]
            weights = torch.rand(tokens, TOP_K, generator=generator)
            found = _of(module, x, ids, weights)
            if tokens:
                right, usual = (_of(one, x, ids, weights) for one in (exact, plain))
            for name in found if tokens else ():
                _judge(f"{implementation} {name}", found[name], right[name], usual[name])
        assert type(module.gate_up_proj._local_tensor) is PackedWeight
    with pytest.raises(UnsupportedExpertsError, match="needs experts_implementation='jitmoe'"):
        apply_expert_parallelism(plain, mesh["ep"], mesh["tp"], {"": "ep_dispatch_experts"}, "jitmoe")


def _first_experts(model: Any) -> Any:
    return next(iter(experts_of(model).values()))


def _of(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    dtype = torch.float64 if next(module.parameters()).dtype == torch.float64 else torch.bfloat16
    x = x.to(dtype, copy=True).requires_grad_()
    weights = weights.to(dtype if dtype == torch.float64 else torch.float32, copy=True).requires_grad_()
    out = module(x, ids, weights)
    (out * torch.linspace(-1, 1, HIDDEN, dtype=dtype)).sum().backward()
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad}


def trainer(rank: int, world: int, out: str, resume: str, rows: int, accumulation: int) -> None:
    """The stock Trainer around a PEFT model that was packed; the first rank prints the losses."""
    jitmoe.hf.register()
    model = with_lora(tiny_model("jitmoe"))
    jitmoe.hf.pack(model)
    more = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    done = train(model, Path(out), Path(resume) if resume else None, **more)
    check_replicas(done.model)
    if rank == 0:
        print(json.dumps([loss for _, kind, loss in done.losses if kind == "loss"]))
