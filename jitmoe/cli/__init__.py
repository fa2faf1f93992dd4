"""The ``jitmoe`` command: one module a command, which holds options in and tables out and nothing else."""

from jitmoe.cli.app import main

__all__ = ["main"]
