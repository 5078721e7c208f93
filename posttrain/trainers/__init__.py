"""Trainers: Tunix's, with our step, data and checkpoints."""
