"""Masks, cell by cell, against the sentences that define them."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.masks import FULL_WINDOW, causal_mask

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3], [5, 5, 2, 2, 5, 5, 0]])


@pytest.mark.parametrize("window", [None, 1, 2, 5, FULL_WINDOW])
@pytest.mark.parametrize("traced", [False, True])
def test_a_query_sees_its_own_segment_behind_it_within_the_window(window: int | None, traced: bool) -> None:
    given = jnp.asarray(window) if traced and window is not None else window
    mask = np.asarray(causal_mask(jnp.asarray(SEGMENTS), given))
    for b, i, j in np.ndindex(3, 7, 7):
        sees = j <= i and SEGMENTS[b, i] == SEGMENTS[b, j] != 0 and (window is None or i - j < window)
        assert mask[b, i, j] == sees, (b, i, j)


def test_padding_sees_nothing_and_is_seen_by_nothing() -> None:
    mask = causal_mask(jnp.asarray(SEGMENTS), None)
    assert not mask[0, 5:].any() and not mask[0, :, 5:].any()


def test_a_query_sees_its_prefix_too() -> None:
    segments, prefixes = np.array([[1, 1, 2, 2, 3, 0]]), np.array([[0, 0, 1, 1, 1, 0]])
    mask = np.asarray(causal_mask(jnp.asarray(segments), None, jnp.asarray(prefixes)))
    want = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(mask[0], np.array(want, bool))
