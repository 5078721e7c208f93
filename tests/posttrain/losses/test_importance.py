"""Truncated importance weights against arithmetic by hand; the loss they weigh is tested with the policy losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses.importance import sampler_weights

# Two sequences in a row, of two tokens and one, and a token of padding. old / sampler: 1/2, 3 and 4.
OLD = jnp.log(jnp.asarray([[0.1, 0.6, 0.8, 1.0]]))
SAMPLER = jnp.log(jnp.asarray([[0.2, 0.2, 0.2, 1.0]])).at[0, 3].set(jnp.nan)
MASK = jnp.asarray([[True, True, True, False]])
SEGMENTS = jnp.asarray([[1, 1, 2, 0]])


@pytest.mark.parametrize(
    ("correction", "cap", "expected"),
    [
        ("token", 10.0, [0.5, 3.0, 4.0, 1.0]),
        ("token", 2.0, [0.5, 2.0, 2.0, 1.0]),
        # The first sequence's product is 1/2 * 3 = 1.5.
        ("sequence", 10.0, [1.5, 1.5, 4.0, 1.0]),
        ("sequence", 2.0, [1.5, 1.5, 2.0, 1.0]),
        ("off", 2.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights_are_the_hand_computed_ones(correction, cap, expected):
    found = sampler_weights(OLD, SAMPLER, MASK, SEGMENTS, correction=correction, cap=cap, max_segments=2)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_weights_are_constants_for_differentiation():
    def total(old):
        return sampler_weights(old, SAMPLER, MASK, SEGMENTS, correction="token", cap=10.0, max_segments=2).sum()

    assert not np.any(jax.grad(total)(OLD))
