"""Decides: which kernels a config needs, how rows are cut, and where scratch lies. Nothing is allocated."""
