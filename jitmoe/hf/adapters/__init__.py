"""LoRA adapters of experts in the layouts of several projects: one neutral value, one module a layout."""
