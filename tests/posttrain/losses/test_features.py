"""Feature losses against NumPy, arithmetic by hand, and complex steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses.base import LossOutput, Mean
from posttrain.losses.features import FEATURE_LOSSES, add_feature_loss, feature_loss

L, R, T, D, STEP = 2, 2, 3, 4, 1e-30


def draw(seed=0):
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random((R, T)) > 0.3, rng.uniform(0.5, 2.0, (R, T)), 0.0)
    return rng.normal(size=(L, R, T, D)), rng.normal(size=(L, R, T, D)), weights


def oracle(student, teacher, weights, kind):
    total = 0.0
    for index in np.ndindex(L, R, T):
        s, t = student[index], teacher[index]
        distance = 1 - (s @ t) / np.sqrt((s @ s) * (t @ t)) if kind == "cosine" else ((s - t) ** 2).mean()
        total += weights[index[1:]] * distance / L
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_loss_and_gradient_equal_numpy(kind, dtype, tolerance):
    student, teacher, weights = draw()
    expected = np.zeros(student.shape)
    for index in np.ndindex(*student.shape):
        moved = student.astype(complex)
        moved[index] += 1j * STEP
        expected[index] = np.imag(oracle(moved, teacher, weights, kind)) / STEP
    with jax.enable_x64(dtype == np.float64):
        given = [jnp.asarray(array, dtype) for array in (student, teacher, weights)]
        value, grads = jax.value_and_grad(lambda *a: feature_loss(*a, kind=kind).loss_sum, argnums=(0, 1, 2))(*given)
    assert float(value) == pytest.approx(oracle(student, teacher, weights, kind), rel=tolerance)
    assert np.abs(np.asarray(grads[0]) - expected).max() <= tolerance * np.abs(expected).max()
    assert not np.any(grads[1]) and not np.any(grads[2])


def test_distances_of_two_vectors_are_the_hand_computed_ones():
    # (3, 4) and (4, 3): cos = 24 / 25, mean squared difference 1; a zero vector has no direction.
    student, teacher = jnp.asarray([[[[3.0, 4.0], [0.0, 0.0]]]]), jnp.asarray([[[[4.0, 3.0], [4.0, 3.0]]]])
    first, both = jnp.asarray([[1, 0]]), jnp.asarray([[1, 1]])
    assert float(feature_loss(student, teacher, first, kind="cosine").loss_sum) == pytest.approx(1 / 25, rel=1e-5)
    assert float(feature_loss(student, teacher, first, kind="l2").loss_sum) == pytest.approx(1.0, rel=1e-6)
    assert float(feature_loss(student, teacher, both, kind="cosine").loss_sum) == pytest.approx(1 + 1 / 25, rel=1e-5)
    grad = jax.grad(lambda s: feature_loss(s, teacher, both, kind="cosine").loss_sum)(student)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_masked_tokens_give_exactly_zero_whatever_they_hold(kind):
    student, teacher, weights = (jnp.asarray(array, jnp.float32) for array in draw())
    dead = weights == 0
    spoilt = jnp.where(dead[..., None], jnp.nan, student)
    run = jax.value_and_grad(lambda s: feature_loss(s, teacher, weights, kind=kind).loss_sum)
    (value, grad), (clean, clean_grad) = run(spoilt), run(student)
    assert float(value) == float(clean)
    np.testing.assert_array_equal(grad, clean_grad)
    assert dead.any() and not np.any(np.asarray(grad)[:, np.asarray(dead)])


def test_features_are_added_with_their_coefficient_over_the_same_tokens():
    student, teacher, weights = (jnp.asarray(array, jnp.float32) for array in draw())
    features = feature_loss(student, teacher, weights, kind="l2")
    plain = LossOutput(jnp.asarray(2.0), weights.sum(), {"distill/soft_loss": Mean(jnp.asarray(1.0), weights.sum())})
    both = add_feature_loss(plain, features, coefficient=0.5)
    assert float(both.loss_sum) == pytest.approx(2.0 + 0.5 * float(features.loss_sum))
    assert float(both.weight_sum) == float(plain.weight_sum) == float(features.weight_sum)
    assert set(both.metrics) == {"distill/soft_loss", "distill/feature_loss"}


def test_unknown_kinds_and_two_widths_are_refused():
    student, teacher, weights = (jnp.asarray(array, jnp.float32) for array in draw())
    with pytest.raises(ValueError, match="use cosine, l2"):
        feature_loss(student, teacher, weights, kind="l1")
    with pytest.raises(ValueError, match="width 4 and of width 3"):
        feature_loss(student, teacher[..., :3], weights, kind="l2")
