"""The ``jitmoe`` command. Each command is a module with its options and its tables, and nothing else."""

from jitmoe.cli.app import main

__all__ = ["main"]
