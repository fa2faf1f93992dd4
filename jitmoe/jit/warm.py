"""From configs to compiled kernels, before they are needed."""

from collections.abc import Iterable
from dataclasses import dataclass

from jitmoe.config import MoEConfig
from jitmoe.jit.build import KernelReport, build_instances
from jitmoe.jit.capability import describe, resolve_isa
from jitmoe.jit.render import render
from jitmoe.plan.shapes import plan_kernels
from jitmoe.text import table


@dataclass(frozen=True)
class BuildReport:
    """What :func:`build` did; prints as a table."""

    kernels: tuple[KernelReport, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of the table; the first is its head."""
        rows: list[tuple[str, ...]] = [("kernel", "isa", "M_STEP", "status", "seconds", "library")]
        for kernel in self.kernels:
            figures = (str(kernel.m_step), kernel.status, f"{kernel.seconds:.2f}", str(kernel.path))
            rows.append((kernel.shape.name, describe(kernel.isa), *figures))
        return rows

    def __str__(self) -> str:
        return table(self.rows())


def build(configs: MoEConfig | Iterable[MoEConfig], progress: bool = True) -> BuildReport:
    """Compile every kernel that ``configs`` can need, so that no later call waits for the compiler.

    Args:
        configs: one config or several. Kernels that they share are built once.
        progress: say on stderr how many kernels are done; see :func:`~jitmoe.progress.track`.

    Returns:
        One report per kernel, in the order of the configs and their plans.

    Raises:
        ConfigError: a config's ``m_step`` is no register block of its instruction set.
        IsaError: a config names an instruction set that cannot run here.
        BuildError: there is no compiler, or it fails.
        CacheSecurityError: somebody else could write into the cache.
    """
    wanted = (configs,) if isinstance(configs, MoEConfig) else tuple(configs)
    plans = [plan_kernels(config, resolve_isa(config.requested_isa)) for config in wanted]
    wanted_shapes = dict.fromkeys(shape for kernel_plan in plans for shape in kernel_plan.shapes)
    return BuildReport(tuple(build_instances([render(shape) for shape in wanted_shapes], progress)))
