"""Tables of steps on several machines, where scaling stops, and what would help there."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from jitmoe.bench.cluster import Cluster, Step, assumptions_text, predict_step
from jitmoe.errors import ConfigError
from jitmoe.text import size, table

STOPS = 0.5
"""Scaling has stopped where a machine does less than this share of the tokens that it does among the fewest."""


def report(cluster: Cluster, nodes: Sequence[int], name: str) -> str:
    """The prediction for each number of machines; each number works on ``cluster.tokens`` tokens a machine.

    Raises:
        ConfigError: there are fewer experts than machines, or no machines.
    """
    if not nodes or min(nodes) < 1:
        raise ConfigError("nodes must be numbers of machines, at least 1")
    steps = [predict_step(cluster, number) for number in sorted(set(nodes))]
    return "\n".join(
        [
            _title(cluster, name),
            table(_rows(cluster, steps)),
            "",
            table(_memory_rows(steps)),
            "",
            *_verdict(cluster, steps),
            "",
            "assumed:",
            assumptions_text(cluster),
        ]
    )


def _title(cluster: Cluster, name: str) -> str:
    config = cluster.config
    routing = f"skewed routing (odds n^-{cluster.zipf:g})" if cluster.zipf else "even routing"
    return (
        f"{name}: {cluster.layers} layers of {config.num_experts} experts {config.hidden_size} x "
        f"{config.intermediate_size}, top {config.top_k}, {config.weight_format}, LoRA of rank {config.lora_rank}, "
        f"{cluster.dense / 1e9:.3g} billion other parameters; {cluster.tokens} tokens a machine and step, "
        f"{'training' if cluster.training else 'inference'}, {cluster.gigabits:g} Gbit/s, {routing}"
    )


def _rows(cluster: Cluster, steps: Sequence[Step]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("machines", "memory of one", "fits", "network of one", "step s", "tokens/s", "a machine", "waits for network",
         "busiest / mean", "experts bound by")
    ]  # fmt: skip
    for step in steps:
        rows.append(
            (
                str(step.nodes),
                size(step.nbytes),
                "yes" if step.nbytes <= cluster.memory else "NO",
                f"{size(step.sent)} a step",
                f"{step.seconds:.3g}",
                f"{step.rate:.4g}",
                f"{step.rate / step.nodes:.4g}",
                f"{step.network / step.seconds:.0%}",
                f"{step.imbalance:.2f}",
                step.bound,
            )
        )
    return rows


def _memory_rows(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    kinds = list(dict.fromkeys(kind for step in steps for kind in step.memory))
    head = ("memory of one machine", *(f"of {step.nodes}" for step in steps))
    return [head, *((kind, *(size(step.memory.get(kind, 0)) for step in steps)) for kind in kinds)]


def _verdict(cluster: Cluster, steps: Sequence[Step]) -> Iterator[str]:
    fitting = [step for step in steps if step.nbytes <= cluster.memory]
    if not fitting:
        yield f"It does not fit into {size(cluster.memory)} a machine on any of these numbers of machines."
    elif fitting[0] is not steps[0]:
        yield f"It fits into {size(cluster.memory)} a machine from {fitting[0].nodes} machines on."
    first = steps[0].rate / steps[0].nodes
    stop = next((step for step in steps if step.rate / step.nodes < STOPS * first), None)
    if stop is None:
        last = steps[-1]
        yield (
            f"Up to {last.nodes} machines a machine keeps {last.rate / last.nodes / first:.0%} of the tokens/s that it "
            f"has on {steps[0].nodes}."
        )
        stop = last
    else:
        share = stop.rate / stop.nodes / first
        yield f"Scaling stops at {stop.nodes} machines: each does {share:.0%} of what it does on {steps[0].nodes}."
    if stop.nodes > 1:
        gains = {change: predict_step(other, stop.nodes).rate / stop.rate for change, other in _changes(cluster)}
        helps = [f"{change} {gain:.2f} x" for change, gain in sorted(gains.items(), key=lambda item: -item[1])]
        yield f"What would change the tokens/s there: {'; '.join(helps)}."


def _changes(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    yield "four times the network", replace(cluster, gigabits=4 * cluster.gigabits)
    yield "four times the tokens of a step", replace(cluster, tokens=4 * cluster.tokens)
    machine = cluster.machine
    yield "twice the arithmetic", replace(cluster, machine=replace(machine, products=2 * machine.products))
    yield "twice the memory bandwidth", replace(cluster, machine=replace(machine, bandwidth=2 * machine.bandwidth))
    if cluster.zipf:
        yield "even routing", replace(cluster, zipf=0.0)
