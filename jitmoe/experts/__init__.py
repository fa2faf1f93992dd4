"""Computes: one call of the experts, from the layer to the kernels and back."""
