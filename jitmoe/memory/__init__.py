"""Plans the memory of a layer, a call and a model before any of it is allocated."""
