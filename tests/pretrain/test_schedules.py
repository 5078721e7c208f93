"""Learning rates at the steps where a schedule's definition fixes them, computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.schedules import make_schedule
from recipes.schema import ScheduleSection

PEAK = 2e-3


def rates(total_steps, up_to=None, peak=1.0, **keys):
    schedule = make_schedule(ScheduleSection(**keys), peak, total_steps)
    return np.asarray([schedule(step) for step in range(up_to or total_steps)])


def test_cosine_warms_up_from_zero_and_ends_at_the_final_fraction():
    # S = 20: W = 2, so steps 0 and 1 have 0 and 1/2 of the peak. The fall has n = 18 steps; at its i-th step the share
    # of the peak is a + 0.1 (1 - a), a = (1 + cos(pi i / 17)) / 2. a is 1 at i = 0 and 0 at i = 17 (step 19).
    actual = rates(20, up_to=23, peak=PEAK) / PEAK
    share = lambda i: (1 + math.cos(math.pi * i / 17)) / 2  # noqa: E731
    expected = [0.0, 0.5] + [share(i) + 0.1 * (1 - share(i)) for i in range(18)] + [0.0, 0.0, 0.0]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
    assert actual[2] == pytest.approx(1.0)
    assert actual[19] == pytest.approx(0.1, rel=1e-6)


def test_ten_steps_start_with_a_rate_of_zero_and_peak_at_the_second():
    # S = 10: W = 1. The step after the warm-up is the first of n = 9; its middle, i = 4, is halfway: (1 + 0.1) / 2.
    actual = rates(10)
    assert actual[0] == 0.0
    assert actual[1] == 1.0
    assert actual[5] == pytest.approx(0.55)
    assert actual[9] == pytest.approx(0.1)


def test_wsd_holds_the_peak_and_falls_over_the_last_tenth():
    # S = 40: W = 4, and the fall has 4 steps, at 0, 1/3, 2/3 and 1 of the way from 1 to 0.1.
    expected = [0.0, 0.25, 0.5, 0.75] + [1.0] * 32 + [1.0, 0.7, 0.4, 0.1] + [0.0]
    np.testing.assert_allclose(rates(40, up_to=41, kind="wsd"), expected, rtol=1e-6, atol=1e-7)


def test_wsd_falls_along_half_a_cosine_where_asked():
    # At a third of the way (1 + cos 60 deg) / 2 = 3/4 is kept: 3/4 + 0.1/4; at two thirds 1/4: 1/4 + 0.3/4.
    actual = rates(40, kind="wsd", decay_shape="cosine")
    np.testing.assert_allclose(actual[36:], [1.0, 0.775, 0.325, 0.1], rtol=1e-6)


def test_linear_falls_evenly_from_the_peak():
    # S = 11, W = 0: n = 11 steps from 1 to 0.5, 0.05 less each.
    actual = rates(11, kind="linear", warmup_fraction=0.0, final_fraction=0.5)
    np.testing.assert_allclose(actual, 1 - 0.05 * np.arange(11), rtol=1e-6)


def test_constant_holds_the_peak_after_the_warm_up_until_the_end():
    expected = [0.0, 1 / 3, 2 / 3] + [1.0] * 7 + [0.0]
    np.testing.assert_allclose(rates(10, up_to=11, kind="constant", warmup_fraction=0.3), expected, rtol=1e-6)


def test_schedule_steps_take_the_place_of_the_runs_and_the_rate_is_zero_after_them():
    longer, own = rates(20, up_to=20), rates(7, up_to=20, steps=20)
    np.testing.assert_array_equal(longer, own)
    np.testing.assert_array_equal(rates(20, steps=5)[5:], np.zeros(15))


def test_warm_up_of_less_than_a_step_starts_at_the_peak():
    # int(9 * 0.1) = 0.
    assert rates(9)[0] == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_single_step_has_the_peak_rate(kind):
    assert rates(1, kind=kind).tolist() == [1.0]


def test_schedule_of_a_traced_count_is_a_float32_scalar_equal_to_the_eager_one():
    schedule = make_schedule(ScheduleSection(), PEAK, 1000)
    traced = jax.jit(schedule)(jnp.asarray(500, jnp.int32))
    assert traced.dtype == jnp.float32
    assert traced.shape == ()
    assert float(traced) == pytest.approx(float(schedule(500)), rel=1e-6)
