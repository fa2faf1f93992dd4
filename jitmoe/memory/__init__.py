"""How much memory a layer, a call and a model take, before any of it is allocated."""
