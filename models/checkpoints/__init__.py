"""Checkpoints: reading and writing (`store`), proving them whole (`manifest`), and the steps of a run (`manager`)."""
