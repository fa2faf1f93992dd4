"""The ``jitmoe`` command."""
