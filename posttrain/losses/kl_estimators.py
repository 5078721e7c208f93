"""Estimators of KL(policy || reference) from the log-probabilities of tokens that the policy sampled.

With d = log pi_ref - log pi at a sampled token (Schulman, "Approximating KL Divergence", 2020):

| name         |            | per token         | value                  | gradient of its mean, on policy     |
|--------------|------------|-------------------|------------------------|-------------------------------------|
| `low_var_kl` | k3         | exp(d) - 1 - d    | unbiased, never < 0    | that of KL(reference || policy)     |
| `mse_kl`     | k2         | d^2 / 2           | biased, never < 0      | that of KL(policy || reference)     |
| `abs`        | |k1|       | |d|               | biased, never < 0      | of constant size, whatever d        |
| `kl`         | k1         | -d                | unbiased               | zero: it moves the policy at random |

`low_var_kl` is the GRPO paper's (arXiv:2402.03300, equation 4). `kl` is fit for a metric, not for a penalty.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

EXP_BOUND = 20.0
"""Arguments of exponentials stay within this of 0: e^20 is 5e8, which no token that was sampled comes near."""


def _k1(d):
    return -d


def _k2(d):
    return 0.5 * jnp.square(d)


def _k3(d):
    # Bounded above in both terms, so that a token the policy has all but given up neither overflows nor, with the
    # exponential's gradient gone and the other left, is pushed the wrong way. Below there's nothing to bound.
    d = jnp.minimum(d, EXP_BOUND)
    # expm1, because for the small d of a policy near its reference exp(d) - 1 - d is all rounding.
    return jnp.expm1(d) - d


KL_ESTIMATORS: dict[str, Callable] = {"low_var_kl": _k3, "mse_kl": _k2, "abs": jnp.abs, "kl": _k1}


def estimate_kl(logps: Float[Array, "..."], ref_logps: Float[Array, "..."], *, estimator: str) -> Float[Array, "..."]:
    """Estimates KL(policy || reference) at each token, in nats; differentiable in `logps`.

    Args:
        logps: log-probabilities of sampled tokens under the policy.
        ref_logps: their log-probabilities under the reference.
        estimator: one of KL_ESTIMATORS.

    Raises:
        ValueError: the estimator is unknown.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(
            f"kl_estimator: {estimator!r}: no such estimator of the KL divergence; use {', '.join(KL_ESTIMATORS)} "
            "(low_var_kl is the GRPO paper's)"
        )
    return KL_ESTIMATORS[estimator](ref_logps - logps)
