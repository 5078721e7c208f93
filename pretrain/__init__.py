"""Pretraining: data pipelines, losses, optimizers, schedules, the train step and the loop."""
