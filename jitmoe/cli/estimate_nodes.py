"""``jitmoe estimate --nodes``."""

from dataclasses import dataclass, replace
from typing import cast

from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.isa import IsaChoice
from jitmoe.memory.presets import DENSE_PARAMETERS


@dataclass(frozen=True)
class Nodes:
    """The options about machines and their network; None is a default that depends on the model or the machine.

    Attributes:
        network: Gbit/s.
        zipf: skew of the routing.
        dense: billions of parameters beside the routed experts.
        tflops: TFLOP/s of a machine.
        bandwidth: GB/s of its memory.
        memory: GB of its memory.
    """

    network: float
    zipf: float
    dense: float | None
    tflops: float | None
    bandwidth: float | None
    memory: float

    def answer(
        self, config: MoEConfig, name: str, nodes: str, layers: int, tokens: int, training: bool, check: bool
    ) -> str:
        """The prediction, or with ``check`` the comparison with processes here.

        Raises:
            ConfigError: ``nodes`` are no numbers, or a number is out of range.
        """
        from jitmoe.bench.cluster import Cluster
        from jitmoe.bench.cluster_report import report
        from jitmoe.bench.predict import ABSENT

        machine = replace(
            ABSENT[0],
            products=ABSENT[0].products if self.tflops is None else self.tflops * 1e12,
            bandwidth=ABSENT[0].bandwidth if self.bandwidth is None else self.bandwidth * 1e9,
        )
        dense = DENSE_PARAMETERS.get(name, 0.0) if self.dense is None else self.dense * 1e9
        memory = round(self.memory * 1e9)
        cluster = Cluster(config, layers, tokens, self.network, self.zipf, training, dense, machine, memory)
        if check:
            from jitmoe.bench.cluster_check import check as check_here

            return check_here(replace(cluster, layers=1, dense=0.0, training=True), _numbers(nodes))
        if config.isa == "auto":
            cluster = replace(cluster, config=replace(config, isa=cast(IsaChoice, machine.isa)))
        return report(cluster, _numbers(nodes), name)


def _numbers(nodes: str) -> list[int]:
    try:
        return [int(number) for number in nodes.split(",")]
    except ValueError as error:
        raise ConfigError(f"--nodes must be numbers with commas between them, got {nodes!r}") from error
