"""Models: configuration, pure operations, Linen and NNX shells, checkpoints, tokenizers and inference."""
