"""Post-training of language models in JAX, on Tunix: the command line, data, losses, samplers and trainers."""
