"""Checkpoints with quantised experts, in the layouts in which others ship and read them."""
