"""Policy-gradient losses over sampled tokens: GRPO, GSPO, Dr. GRPO, DAPO and RLOO.

Every array is [R, T], aligned with the tokens that positions predict. Rows hold one sequence or several, told apart by
their segment ids; sums over a sequence are sums over a segment of its row.

With A the sequence's advantage, rho the ratio below, and sg(.) a constant for differentiation, the loss of a token is

    -w * min(rho * A, clip(rho, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL - c * entropy

| name         | ratio rho of token t in sequence i                      | clipped | source                          |
|--------------|---------------------------------------------------------|---------|---------------------------------|
| `grpo`       | pi_t / old_t                                            | yes     | arXiv:2402.03300, equation 3    |
| `dapo`       | the same, epsilon_high > epsilon                        | yes     | arXiv:2503.14476, equation 8    |
| `dr_grpo`    | the same                                                | yes     | arXiv:2503.20783, section 3     |
| `gspo`       | s_i = exp(mean_t log(pi_t / old_t)), differentiated     | yes     | arXiv:2507.18071, equations 5-7 |
| `gspo-token` | sg(s_i) * pi_t / sg(pi_t)                               | yes     | arXiv:2507.18071, equation 13   |
| `rloo`       | pi_t / old_t; on policy its gradient is REINFORCE's     | no      | arXiv:2402.14740                |

The names differ also in advantages and in aggregation, which are choices of their own: ALGORITHMS gives each paper's.
With advantages that are constant within a sequence, as here, `gspo` and `gspo-token` have the same value and, under
sequence-mean-token-mean, the same gradient.

w is the truncated importance weight of `posttrain.losses.importance`: min(old / sampler, cap). It weighs the clipped
term alone.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from posttrain.losses.aggregation import from_segments, segment_sums, token_weights
from posttrain.losses.base import LossOutput, Mean, masked_mean
from posttrain.losses.importance import check_sampler_correction, sampler_metrics, sampler_weights
from posttrain.losses.kl_estimators import EXP_BOUND, estimate_kl
from recipes.complaints import nearest

# GSPO's ratio is a geometric mean over a sequence, so e^10 is already beyond all use.
_SEQUENCE_EXP_BOUND = 10.0


class Algorithm(NamedTuple):
    """What a named algorithm consists of.

    Attributes:
        ratio: how the importance ratio is formed.
        clips: whether the ratio is clipped; where it isn't, the epsilons and the dual clip have no effect.
        advantage: the paper's advantages, a name of `posttrain.advantages.ADVANTAGES`.
        aggregation: the paper's aggregation, a name of `posttrain.losses.aggregation.AGGREGATIONS`.
    """

    ratio: Literal["token", "sequence", "sequence-token"]
    clips: bool
    advantage: str
    aggregation: str


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm("token", True, "group", "sequence-mean-token-mean"),
    "dapo": Algorithm("token", True, "group", "token-mean"),
    "dr_grpo": Algorithm("token", True, "dr_grpo", "sequence-mean-token-sum-norm"),
    "gspo": Algorithm("sequence", True, "group", "sequence-mean-token-mean"),
    "gspo-token": Algorithm("sequence-token", True, "group", "sequence-mean-token-mean"),
    "rloo": Algorithm("token", False, "rloo", "sequence-mean-token-sum"),
}


def policy_loss(
    logps: Float[Array, "R T"],
    *,
    old_logps: Float[Array, "R T"] | None,
    sampler_logps: Float[Array, "R T"] | None,
    ref_logps: Float[Array, "R T"] | None,
    entropy: Float[Array, "R T"] | None,
    advantages: Float[Array, "R T"],
    mask: Bool[Array, "R T"] | Int[Array, "R T"] | Float[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    algorithm: str,
    epsilon: float,
    epsilon_high: float | None,
    dual_clip: float | None,
    kl_coefficient: float,
    kl_estimator: str,
    entropy_coefficient: float,
    aggregation: str,
    length_norm: float | None,
    sampler_correction: str,
    sampler_cap: float,
    max_segments: int,
) -> LossOutput:
    """The loss of the module's docstring, as a weighted sum and its divisor; differentiable in `logps` and `entropy`.

    A token whose mask is 0 contributes exactly zero to value and gradient, whatever the arrays hold there. Settings
    are static under `jit`; `check_policy_settings` has their rules.

    Args:
        logps: log-probability of each sampled token under the policy, in nats, at the sampling temperature.
        old_logps: under the policy that the first of several updates started from; None where this is it.
        sampler_logps: as the sampler reported it; None only with sampler_correction "off".
        ref_logps, entropy: under the reference, and of the policy in nats; None only where the coefficient is 0.
        advantages: constant within a sequence.
        mask: non-zero at the completion tokens that count.
        segment_ids: 1 to max_segments: a token's sequence within its row; a counted token of another makes NaN.
        algorithm: one of ALGORITHMS.
        epsilon: the clip's lower bound is 1 - epsilon.
        epsilon_high: its upper bound is 1 + epsilon_high; None takes epsilon.
        dual_clip: bounds the ratio where the advantage is negative (arXiv:1912.09729, equation 5); None does not.
        kl_coefficient: beta.
        kl_estimator: one of `kl_estimators.KL_ESTIMATORS`.
        entropy_coefficient: c.
        aggregation: one of `aggregation.AGGREGATIONS`.
        length_norm: tokens that sequence-mean-token-sum-norm divides by, None for the others.
        sampler_correction: one of `importance.SAMPLER_CORRECTIONS`; "off" sets w = 1.
        sampler_cap: bound on w from above.
        max_segments: sequences a row may hold.

    Raises:
        ValueError: a setting is unknown or out of range, or an array that one needs is None.
    """
    check_policy_settings(algorithm=algorithm, epsilon=epsilon, epsilon_high=epsilon_high, dual_clip=dual_clip)
    check_sampler_correction(sampler_correction, sampler_cap)
    keep = mask != 0
    logps, entropy = _clean(keep, logps), _clean(keep, entropy)
    old, sampler, ref, advantages = (
        lax.stop_gradient(_clean(keep, array)) for array in (old_logps, sampler_logps, ref_logps, advantages)
    )
    old = lax.stop_gradient(logps) if old is None else old
    weights, weight_sum = token_weights(
        keep,
        segment_ids,
        aggregation=aggregation,
        length_norm=length_norm,
        max_segments=max_segments,
        dtype=logps.dtype,
    )
    importance = sampler_weights(
        old, sampler, keep, segment_ids, correction=sampler_correction, cap=sampler_cap, max_segments=max_segments
    )
    bounds = _clip_bounds(algorithm, epsilon, epsilon_high, dual_clip)
    segments = _Segments(keep, segment_ids, max_segments)
    objective, metrics = _objective(logps, old, advantages, segments, ALGORITHMS[algorithm].ratio, bounds)
    policy_sum = -(objective * importance * weights).sum()
    kl_sum, kl_metrics = _kl_term(logps, ref, keep, weights, kl_coefficient, kl_estimator)
    entropy_sum, entropy_metrics = _entropy_term(entropy, keep, weights, entropy_coefficient)
    metrics |= kl_metrics | entropy_metrics | sampler_metrics(old, sampler, importance, keep)
    metrics["policy/loss"] = Mean(lax.stop_gradient(policy_sum), weight_sum)
    return LossOutput(policy_sum + kl_sum + entropy_sum, weight_sum, metrics)


def check_policy_settings(
    *, algorithm: str, epsilon: float, epsilon_high: float | None, dual_clip: float | None
) -> None:
    """Checks the algorithm and its clip; other settings are checked by the modules that they belong to.

    Raises:
        ValueError: in the house form.
    """
    if algorithm not in ALGORITHMS:
        guess = nearest(algorithm, ALGORITHMS)
        raise ValueError(
            f"rl.loss_algo: {algorithm!r}: no such algorithm; "
            + (f"did you mean {guess}? " if guess else "")
            + f"use {', '.join(ALGORITHMS)}"
        )
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0.0 <= epsilon <= 1.0 and high >= 0.0):
        raise ValueError(
            f"rl.epsilon={epsilon}, rl.epsilon_high={epsilon_high}: ratios are clipped to [1 - epsilon, "
            "1 + epsilon_high], and a ratio is positive; set 0 <= epsilon <= 1 and epsilon_high >= 0"
        )
    if dual_clip is not None and not dual_clip > 1.0 + high:
        raise ValueError(
            f"rl.dual_clip={dual_clip}: it bounds ratios that the clip leaves alone; set it above "
            f"1 + epsilon_high = {1.0 + high}, for instance 3, or leave it unset"
        )


class _Bounds(NamedTuple):
    low: float
    high: float
    dual: float | None


class _Segments(NamedTuple):
    mask: jax.Array
    ids: jax.Array
    max_segments: int

    def mean(self, values):
        """Each token's mean over its sequence."""
        counted = self.mask.astype(values.dtype)
        sums = segment_sums(values * counted, self.ids, max_segments=self.max_segments)
        counts = segment_sums(counted, self.ids, max_segments=self.max_segments)
        return from_segments(sums / jnp.maximum(counts, 1), self.ids)


def _clip_bounds(algorithm, epsilon, epsilon_high, dual_clip):
    if not ALGORITHMS[algorithm].clips:
        return None
    return _Bounds(1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high), dual_clip)


def _objective(logps, old, advantages, segments, ratio_kind, bounds):
    """The clipped objective of each token, and the statistics of its ratio."""
    ratio = jnp.exp(_log_ratio(logps, old, segments, ratio_kind))
    counted = segments.mask.astype(ratio.dtype)
    metrics = {
        "policy/ratio": masked_mean(ratio, counted),
        "policy/log_ratio_abs": masked_mean(jnp.abs(logps - old), counted),
    }
    objective = ratio * advantages
    if bounds is None:
        return objective, metrics
    # min(rho * A, clip(rho) * A) takes its second branch, a constant, exactly here. Spelled so because where its terms
    # are equal, as at rho = 1, a minimum would split the gradient between them.
    above, below = (advantages > 0) & (ratio > bounds.high), (advantages < 0) & (ratio < bounds.low)
    objective = jnp.where(above, bounds.high * advantages, jnp.where(below, bounds.low * advantages, objective))
    shares = {"clip_fraction": above | below, "clip_fraction_high": above, "clip_fraction_low": below}
    if bounds.dual is not None:
        bounded = (advantages < 0) & (ratio > bounds.dual)
        objective = jnp.where(bounded, bounds.dual * advantages, objective)
        shares["dual_clip_fraction"] = bounded
    metrics |= {f"policy/{name}": masked_mean(share.astype(ratio.dtype), counted) for name, share in shares.items()}
    return objective, metrics


def _log_ratio(logps, old, segments, kind):
    """The log of rho: [R, T], bounded so that its exponential is finite."""
    if kind == "token":
        return jnp.clip(logps - old, -EXP_BOUND, EXP_BOUND)
    mean = segments.mean(logps - old)
    if kind == "sequence-token":
        mean = logps - lax.stop_gradient(logps) + lax.stop_gradient(mean)
    return jnp.minimum(mean, _SEQUENCE_EXP_BOUND)


def _kl_term(logps, ref, keep, weights, coefficient, estimator):
    if ref is None:
        _check_unused("kl_coefficient", coefficient, "the reference's log-probabilities")
        return 0.0, {}
    kl = estimate_kl(logps, ref, estimator=estimator)
    # Measured even where it isn't penalised; then nothing of it may reach the sum, an infinity least of all.
    term = coefficient * (kl * weights).sum() if coefficient != 0.0 else 0.0
    return term, {"policy/kl": masked_mean(kl, keep.astype(kl.dtype))}


def _entropy_term(entropy, keep, weights, coefficient):
    if entropy is None:
        _check_unused("entropy_coefficient", coefficient, "the entropies")
        return 0.0, {}
    term = -coefficient * (entropy * weights).sum() if coefficient != 0.0 else 0.0
    return term, {"policy/entropy": masked_mean(entropy, keep.astype(entropy.dtype))}


def _check_unused(setting, coefficient, array):
    if coefficient != 0.0:
        raise ValueError(f"rl.{setting}={coefficient}: {array} are missing; compute them, or set rl.{setting}=0")


def _clean(keep, values):
    # Before any arithmetic, since NaN * 0 is NaN in values and in gradients.
    if values is None:
        return None
    return jnp.where(keep, values.astype(jnp.promote_types(jnp.float32, values.dtype)), 0.0)
