"""Measures the layer beside the machine's ceilings and peers, in one run."""
