"""Masks, cell by cell, against the sentences that define them."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.masks import FULL_WINDOW, cache_mask, causal_mask

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


@pytest.mark.parametrize("window", [None, 1, 3, FULL_WINDOW])
def test_a_cached_query_stands_behind_what_its_slot_held(window: int | None) -> None:
    lengths = np.array([0, 2, 5])
    mask = np.asarray(cache_mask(jnp.asarray(lengths), 3, 9, window))
    assert mask.shape == (3, 3, 9)
    for b, t, s in np.ndindex(3, 3, 9):
        at = lengths[b] + t
        assert mask[b, t, s] == (s <= at and (window is None or at - s < window)), (b, t, s)


def test_the_two_masks_agree_where_a_cache_is_filled_from_its_start() -> None:
    full = causal_mask(jnp.ones((1, 6), jnp.int32), 4)
    parts = [cache_mask(jnp.array([start]), 2, 6, 4) for start in (0, 2, 4)]
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), full)
