"""Quantised matmuls for training: int8 through AQT, fp8 with current scaling."""

import functools

import jax

from models.ops.linear import DotGeneral


@functools.cache
def dot_general_for(quantization: str) -> DotGeneral:
    """The `dot_general` that decoder layers use under `model.quantization`."""
    if quantization == "none":
        return jax.lax.dot_general
    raise ValueError(f"model.quantization={quantization}: not supported; use none")
