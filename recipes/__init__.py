"""Recipes: typed sections, the YAML loader, the run directory and the metrics file. Nothing here imports JAX."""
