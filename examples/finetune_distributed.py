"""The job of finetune.py on several processes: each holds a share of the experts, and works on a part of each batch.

    torchrun --nproc-per-node=4 examples/finetune_distributed.py --expert-parallel 2

Here two processes share the experts, and two such pairs are replicas (data parallel): DistributedDataParallel adds up
the gradients of those that hold the same experts, and nothing else is trained. The adapter is saved whole, and loaded
into one process, where the validation loss must be that of all. With --compare the first process trains alone
afterwards, and in plain torch: the losses may differ by FACTOR times what separates bfloat16 from float32.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from finetune import FACTOR, positive
from model import DecoderLM
from report import Curves, table
from safetensors.torch import load, save_file
from text import Corpus, all_windows, load_corpus, random_batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from training import (
    BATCH,
    LEARNING_RATE,
    MODEL,
    adapter_of,
    base_of,
    finetune,
    jitmoe_experts,
    load_model,
    optimizer_of,
    plain_experts,
    pretrain,
    reloaded_loss,
)

import jitmoe
from jitmoe.distributed import ExpertParallel, check_replicas, lora_state_dict


def main() -> int:
    options = parse_options()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    experts = options.expert_parallel or world
    if world % experts or world > BATCH:
        raise SystemExit(f"{world} processes are no multiple of --expert-parallel {experts}, or more than {BATCH} rows")
    mesh = init_device_mesh("cpu", (world // experts, experts), mesh_dim_names=("data", "expert"))
    config = jitmoe.MoEConfig(
        MODEL.experts, MODEL.hidden, MODEL.intermediate, MODEL.top_k, lora_rank=8, lora_alpha=16.0
    )
    corpus, base = load_corpus(), options.out / "base.safetensors"
    if rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        pretrain(corpus, options.pretrain_steps, options.seed, base)
    model = load_shared(base, config, mesh["expert"].get_group(), options.seed)
    curves = train(model, mesh["data"].get_group(), corpus, options)
    state = lora_state_dict(model)
    if rank == 0:
        save_file(state, options.out / "adapter.safetensors")
        (options.out / "losses.json").write_text(json.dumps([curves.train, list(curves.validation.values())]))
        status = verdict(curves, base, config, corpus, options)
    else:
        status = 0
    dist.barrier()
    dist.destroy_process_group()
    return status


def load_shared(base: Path, config: jitmoe.MoEConfig, group: dist.ProcessGroup, seed: int) -> DecoderLM:
    """The frozen model of the first process's file, with this process's share of the experts."""
    content = [base.read_bytes() if dist.get_rank() == 0 else b""]
    dist.broadcast_object_list(content)
    torch.manual_seed(seed)
    model = DecoderLM(MODEL)
    model.load_state_dict(load(content[0]))
    make = lambda _, old: ExpertParallel.shard(config, *base_of(old).values(), group)  # noqa: E731
    model.replace_experts(make, torch.bfloat16)
    return model


def train(model: DecoderLM, replicas: dist.ProcessGroup, corpus: Corpus, options: argparse.Namespace) -> Curves:
    """As finetune() of training.py, each process with its rows of each batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    curves = Curves(f"{world} ranks", tokens=options.steps * BATCH * MODEL.context)
    parallel = DistributedDataParallel(model, process_group=replicas)
    parameters = list(adapter_of(model).values())
    optimizer, schedule = optimizer_of(parameters, options.steps, LEARNING_RATE)
    curves.validation[0] = validation_loss(model, corpus)
    between = max(1, options.steps // 4)
    start = time.perf_counter()
    for step, batch in enumerate(
        random_batches(corpus.train, BATCH, MODEL.context, options.steps, options.seed + 1), start=1
    ):
        part = share_of_loss(parallel, batch[rank::world], batch.numel())
        optimizer.zero_grad()
        (part * dist.get_world_size(replicas)).backward()  # DDP takes the mean of the replicas, this is their sum
        clip_shared_gradients(model, parameters, 1.0)
        optimizer.step()
        schedule.step()
        if options.check_replicas:
            check_replicas(model, replicas)
        curves.train.append(added_up(part))
        if step % between == 0 or step == options.steps:
            curves.seconds += time.perf_counter() - start
            curves.validation[step] = validation_loss(model, corpus)
            start = time.perf_counter()
    return curves


def share_of_loss(model: nn.Module, windows: Tensor, elements: int) -> Tensor:
    """What these windows add to the mean loss of a batch of so many elements."""
    losses = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    return losses / (elements * MODEL.context / (MODEL.context + 1))


def added_up(part: Tensor) -> float:
    total = part.detach().double()
    dist.all_reduce(total)
    return total.item()


def clip_shared_gradients(model: DecoderLM, parameters: list[nn.Parameter], limit: float) -> None:
    """As clip_grad_norm_ of one process: the norm is that of the experts of all processes that share them."""
    squares = sum(parameter.grad.square().sum() for parameter in parameters)
    dist.all_reduce(squares, group=model.blocks[0].experts.peers.group)
    factor = (limit / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        parameter.grad.mul_(factor)


def validation_loss(model: DecoderLM, corpus: Corpus) -> float:
    windows = all_windows(corpus.validation, MODEL.context)
    with torch.no_grad():
        return added_up(share_of_loss(model, windows[dist.get_rank() :: dist.get_world_size()], windows.numel()))


def verdict(ours: Curves, base: Path, config: jitmoe.MoEConfig, corpus: Corpus, options: argparse.Namespace) -> int:
    """Exit status: 0 where everything this example promises holds; says which does not."""
    alone = reloaded_loss(base, config, options.out / "adapter.safetensors", corpus)
    promises = {
        f"validation loss falls: {ours.before:.4f} -> {ours.after:.4f}": ours.after < ours.before,
        f"one process with the saved adapter has the same loss: {alone:.4f}": abs(alone - ours.after)
        <= torch.finfo(torch.bfloat16).eps * alone,
    }
    if options.compare:
        torch.manual_seed(options.seed)
        model = load_model(base, jitmoe_experts(config), torch.bfloat16)
        adapter = {name: parameter.detach().clone() for name, parameter in adapter_of(model).items()}
        one = finetune("one process", model, corpus, options.steps, options.seed)
        plain, exact = (
            finetune(
                f"torch {str(dtype).removeprefix('torch.')}",
                load_model(base, plain_experts(adapter, config.lora_scale, dtype), dtype),
                corpus,
                options.steps,
                options.seed,
            )
            for dtype in (torch.bfloat16, torch.float32)
        )
        bound, difference = FACTOR * plain.largest_difference(exact), ours.largest_difference(one)
        print(table(ours, [one, plain, exact]))
        promises[f"largest difference from one process {difference:.4f} <= {bound:.4f}"] = difference <= bound
    for promise, holds in promises.items():
        print(f"{'ok    ' if holds else 'FAILED'}  {promise}")
    return 0 if all(promises.values()) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo-distributed"), help="directory to write to")
    parser.add_argument("--expert-parallel", type=positive, help="processes that share the experts (default: all)")
    parser.add_argument("--steps", type=positive, default=60, help="fine-tuning steps (default: %(default)s)")
    parser.add_argument("--pretrain-steps", type=positive, default=100, help="for the base (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the values and the batches (default: %(default)s)")
    parser.add_argument("--check-replicas", action="store_true", help="compare the replicas after each step")
    parser.add_argument("--compare", action="store_true", help="train in one process and in plain torch afterwards")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
