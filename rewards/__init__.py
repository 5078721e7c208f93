"""Rewards: what a completion is worth, one reward a file, and the pool of processes that runs them. No JAX here."""
