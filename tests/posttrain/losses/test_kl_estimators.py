"""Estimators of the KL divergence against arithmetic by hand and whole distributions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses.kl_estimators import EXP_BOUND, KL_ESTIMATORS, estimate_kl


def value_and_slope(d, estimator):
    """The estimate at log pi = -1 and log pi_ref = -1 + d, and its derivative in log pi."""
    estimate = lambda logp: estimate_kl(logp, -1.0 + jnp.asarray(d), estimator=estimator)  # noqa: E731
    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(estimate)(jnp.asarray(-1.0))
    return float(value), float(slope)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        # d = ln 2: exp(d) - 1 - d = 1 - ln 2, and its derivative in log pi is 1 - exp(d) = -1.
        ("low_var_kl", 1 - math.log(2), -1.0),
        ("mse_kl", math.log(2) ** 2 / 2, -math.log(2)),
        ("abs", math.log(2), -1.0),
        ("kl", -math.log(2), 1.0),
    ],
)
def test_estimates_at_a_reference_twice_as_probable_are_the_hand_computed_ones(estimator, value, slope):
    assert value_and_slope(math.log(2), estimator) == pytest.approx((value, slope), rel=1e-12)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_equal_log_probabilities_give_zero(estimator):
    assert value_and_slope(0.0, estimator)[0] == 0.0


def test_the_mean_over_the_policy_is_the_divergence_and_plain_kl_has_no_mean_gradient():
    rng = np.random.default_rng(0)
    logits, ref = rng.normal(size=7), rng.normal(size=7)
    with jax.enable_x64(True):
        logp, logq = jax.nn.log_softmax(jnp.asarray(logits)), jax.nn.log_softmax(jnp.asarray(ref))
        p = jnp.exp(logp)
        kl = float((p * (logp - logq)).sum())
        for estimator in ("low_var_kl", "kl"):
            assert float((p * estimate_kl(logp, logq, estimator=estimator)).sum()) == pytest.approx(kl, rel=1e-12)

        def mean_gradient(estimator):
            def mean(logits):
                return (p * estimate_kl(jax.nn.log_softmax(logits), logq, estimator=estimator)).sum()

            return np.asarray(jax.grad(mean)(jnp.asarray(logits)))

        forward = jax.grad(lambda x: (jnp.exp(logq) * (logq - jax.nn.log_softmax(x))).sum())(jnp.asarray(logits))
        reverse = jax.grad(lambda x: (jax.nn.softmax(x) * (jax.nn.log_softmax(x) - logq)).sum())(jnp.asarray(logits))
        found = {estimator: mean_gradient(estimator) for estimator in ("kl", "low_var_kl", "mse_kl")}
    np.testing.assert_allclose(found["kl"], 0.0, atol=1e-15)
    np.testing.assert_allclose(found["low_var_kl"], forward, atol=1e-14)
    np.testing.assert_allclose(found["mse_kl"], reverse, atol=1e-14)


def test_a_small_difference_keeps_its_digits_in_float32():
    # d = 1e-4: exp(d) - 1 - d = d^2 / 2 + d^3 / 6 = 5.00017e-9, of which a float32 exp(d) - 1 knows nothing.
    d = jnp.float32(1e-4)
    found = float(estimate_kl(jnp.float32(0.0), d, estimator="low_var_kl"))
    assert found == pytest.approx(5.00017e-9, rel=5e-3)


@pytest.mark.parametrize("d", [EXP_BOUND + 1, 1e3, -1e3])
def test_an_absurd_difference_is_finite_and_never_pushes_the_wrong_way(d):
    estimate = lambda logp: estimate_kl(logp, logp + 0 + jax.lax.stop_gradient(d), estimator="low_var_kl")  # noqa: E731
    assert np.isfinite(estimate(jnp.float32(-1.0)))
    slope = value_and_slope(d, "low_var_kl")[1]
    assert np.isfinite(slope) and slope * d <= 0
