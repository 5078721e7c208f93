"""What every loss returns, in pretraining and post-training.

A loss never divides: it gives a numerator and a weight, and the step divides once, over all micro-batches and devices.
Metrics are kept the same way, each with a weight of its own.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Any
"""A float32 scalar. No array type stands here because the same containers also hold abstract shapes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A mean before division."""

    sum: Scalar
    weight: Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOutput:
    """A loss before division."""

    loss_sum: Scalar
    """Numerator, float32. The only differentiable field."""
    weight_sum: Scalar
    """Divisor: tokens, sequences or pairs, as the loss says."""
    metrics: dict[str, Mean]
    """Further means under the names of the log, such as `policy/kl`."""
    rows: dict[str, Any] = field(default_factory=dict)
    """Arrays [R, ...] of the batch's rows that the caller wants back, such as log-probabilities; never summed."""


def masked_mean(values: Float[Array, "..."], weights: Float[Array, "..."]) -> Mean:
    """The weighted mean of `values`, before division; where a weight is 0 the value is ignored, NaN included."""
    weights = weights.astype(jnp.float32)
    kept = jnp.where(weights != 0, values.astype(jnp.float32), 0.0)
    return Mean(jax.lax.stop_gradient((kept * weights).sum()), weights.sum())
