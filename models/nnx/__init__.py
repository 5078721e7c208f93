"""The transformer in Flax NNX; file for file the twin of models.linen."""
