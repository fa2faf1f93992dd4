"""Numba functions of the host: routing, row movement, scans for what is not finite."""
