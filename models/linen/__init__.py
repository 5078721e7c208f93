"""The transformer in Flax Linen; file for file the twin of models.nnx."""
