"""Truncated importance sampling: correcting for a sampler whose probabilities aren't quite the trainer's.

An engine with other kernels, another dtype or weights a version older samples from a distribution a little off the one
that the loss differentiates. Each token's loss is weighted by min(old / sampler, cap), which removes that bias up to
the cap's (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from posttrain.losses.aggregation import from_segments, segment_sums
from posttrain.losses.base import Mean, masked_mean
from posttrain.losses.kl_estimators import EXP_BOUND, estimate_kl

SAMPLER_CORRECTIONS = ("token", "sequence", "off")


def check_sampler_correction(correction: str, cap: float) -> None:
    """Checks the settings of `sampler_weights`.

    Raises:
        ValueError: the correction is unknown, or the cap not positive.
    """
    if correction not in SAMPLER_CORRECTIONS:
        raise ValueError(
            f"rl.sampler_correction: {correction!r}: no such correction; use {', '.join(SAMPLER_CORRECTIONS)}"
        )
    if not cap > 0.0:
        raise ValueError(f"rl.sampler_cap={cap}: a weight capped there is none; set it above 0, for instance 2")


def sampler_weights(
    old_logps: Float[Array, "R T"],
    sampler_logps: Float[Array, "R T"] | None,
    mask: Bool[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    *,
    correction: str,
    cap: float,
    max_segments: int,
) -> Float[Array, "R T"]:
    """Truncated importance weights min(old / sampler, cap), constants for differentiation; 1 where the mask is 0.

    Args:
        old_logps: log-probabilities of the sampled tokens, as the trainer computes them; 0 where the mask is 0.
        sampler_logps: the same, as the sampler reported them.
        mask: completion tokens.
        segment_ids: 1 to max_segments.
        correction: one of SAMPLER_CORRECTIONS.
        cap: bound from above.
        max_segments: sequences a row may hold.

    Raises:
        ValueError: there are no `sampler_logps` to correct by.
    """
    if correction == "off":
        return jnp.ones_like(old_logps)
    if sampler_logps is None:
        raise ValueError(
            f"rl.sampler_correction={correction}: the weights are old / sampler, and the sampler's log-probabilities "
            "are missing; keep those of the rollout, or set rl.sampler_correction=off"
        )
    log_weights = jnp.where(mask, old_logps - sampler_logps, 0.0)
    if correction == "sequence":
        sums = segment_sums(log_weights, segment_ids, max_segments=max_segments)
        log_weights = jnp.where(mask, from_segments(sums, segment_ids), 0.0)
    return lax.stop_gradient(jnp.minimum(_bounded_exp(log_weights), cap))


def sampler_metrics(
    old_logps: Float[Array, "R T"],
    sampler_logps: Float[Array, "R T"] | None,
    importance: Float[Array, "R T"],
    mask: Bool[Array, "R T"],
) -> dict[str, Mean]:
    """How far the sampler's distribution is from the trainer's; nothing without the sampler's log-probabilities.

    `sampler/mismatch_kl` estimates KL(sampler || trainer) from the sampler's own tokens, by exp(d) - 1 - d with
    d = old - sampler.
    """
    if sampler_logps is None:
        return {}
    counted = mask.astype(old_logps.dtype)
    return {
        "sampler/mismatch_kl": masked_mean(
            estimate_kl(sampler_logps, old_logps, estimator="low_var_kl"),
            counted,
        ),
        "sampler/logp_diff_abs": masked_mean(jnp.abs(old_logps - sampler_logps), counted),
        "sampler/importance_weight": masked_mean(importance, counted),
    }


def _bounded_exp(values):
    return jnp.exp(jnp.clip(values, -EXP_BOUND, EXP_BOUND))
