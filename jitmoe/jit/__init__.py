"""Compiles: what this machine can execute, the compiler, the cache, and the kernels as Python functions."""
