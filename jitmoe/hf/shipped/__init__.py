"""Quantised weights in the layouts of public checkpoints."""
