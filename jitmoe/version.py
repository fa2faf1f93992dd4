"""The version of jitmoe."""

__version__ = "0.1.0"
