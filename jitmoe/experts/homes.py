"""Where packed weights lie: each part's on the NUMA node whose threads compute it; looked at after loading."""

from collections.abc import Mapping

from torch import Tensor

from jitmoe import settings
from jitmoe.config import MoEConfig
from jitmoe.experts.supplies import supplies
from jitmoe.files import warn_once
from jitmoe.plan.parts import Part, parts_of
from jitmoe.plan.teams import home_of
from jitmoe.topology import topology


def prefer_home(packed: Tensor, part: Part, parts: int) -> None:
    """Let fresh memory for a part come from its node. Where the system refuses, the first thread to write decides."""
    nodes = supplies().nodes()
    if parts == 1 or len(nodes) == 1:
        return
    refused = supplies().prefer(packed.data_ptr(), packed.nbytes, home_of(part.index, parts, nodes).number)
    if refused:
        warn_once(
            f"packed weights cannot be bound to a NUMA node ({refused}): they lie where the threads of that node "
            "write them first. A container needs the system call, in Docker --cap-add SYS_NICE"
        )


def check_homes(config: MoEConfig, packed: Mapping[str, Tensor]) -> None:
    """Warn, once for each reason, of nodes that are not used, and of packed weights that lie on another node."""
    nodes = supplies().nodes()
    if config.parts == 1:
        return
    if len(nodes) < config.parts:
        warn_once(
            f"tensor_parallel={config.parts}, and this process may use {len(nodes)} NUMA "
            f"node{'s' if len(nodes) > 1 else ''}{_why()}: the results are those of {config.parts} parts, without the "
            "speed of as many nodes"
        )
    if len(nodes) == 1:
        return
    if bound := _binders():
        warn_once(f"{bound}: the threads of a NUMA node may be put on another one. Unset it")
    for part in parts_of(config):
        home = home_of(part.index, config.parts, nodes).number
        for name in part.names():
            _check_home(packed[name], home)


def _check_home(packed: Tensor, home: int) -> None:
    found = supplies().nodes_of(packed.data_ptr(), packed.nbytes)
    if isinstance(found, str):
        warn_once(f"the system does not say on which NUMA node packed weights lie ({found})")
        return
    here = found.get(home, 0)
    elsewhere = sorted(node for node in found if node >= 0 and node != home)
    if elsewhere:  # without numbers of pages, which would make a warning of each layer
        warn_once(
            f"packed weights whose home is NUMA node {home} lie {'in part' if here else 'all'} on node "
            f"{', '.join(map(str, elsewhere))}: results are the same, and slower. `jitmoe doctor` tries each node"
        )


def _why() -> str:
    """What keeps nodes from being used, as far as it is known."""
    reasons = [*topology().left_out, *filter(None, [_binders()])]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _binders() -> str:
    """Variables by which OpenMP binds threads to CPUs; empty where none is set."""
    names = [settings.SETTINGS[name].variable for name in ("omp_proc_bind", "gomp_affinity") if settings.get(name)]
    return f"{' and '.join(names)} binds threads to CPUs" if names else ""
