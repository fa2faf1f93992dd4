"""``jitmoe bench``: the layer, the machine's ceilings and the peers, measured side by side in one run."""
