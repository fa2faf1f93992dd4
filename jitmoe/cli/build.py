"""``jitmoe build``."""

from jitmoe.cli import console
from jitmoe.cli.options import ConfigOptions, takes_config
from jitmoe.jit import build as jit


@takes_config
def build(config: ConfigOptions) -> None:
    """Compile the kernels of a config into the cache."""
    console.table(jit.build(config.make()).rows())
