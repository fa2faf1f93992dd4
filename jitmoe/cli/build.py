"""``jitmoe build``."""

from jitmoe.cli import console
from jitmoe.cli.options import ConfigOptions, takes_config
from jitmoe.jit import warm


@takes_config
def build(config: ConfigOptions) -> None:
    """Compile the kernels of a config into the cache."""
    console.table(warm.build(config.make()).rows())
