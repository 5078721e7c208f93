"""Losses of post-training: pure functions that return a numerator and a weight."""
