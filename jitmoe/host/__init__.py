"""Numba functions of the host: routing, moving rows, and scans for values that are not finite."""
