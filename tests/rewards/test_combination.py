"""Totals worked out by hand, and the three rules for a reward that gave no value."""

import math
import re

import numpy as np
import pytest

from rewards.base import Outcome, RewardFailure, RewardInfo
from rewards.combination import combine, total_range

INFOS = (RewardInfo("right", 1.0, 0.0, 1.0), RewardInfo("form", 0.1, -1.0, 4.0), RewardInfo("seen", 0.0, 0.0, 9.0))


def said(*values):
    """Outcomes of one completion; a text is the kind of a failure."""
    return tuple(
        Outcome(info.name, None, value, "so") if isinstance(value, str) else Outcome(info.name, value, None, "")
        for info, value in zip(INFOS, values, strict=True)
    )


OUTCOMES = [said(1.0, 4.0, 9.0), said(0.0, -1.0, 0.0), said("timeout", 2.0, 1.0), said(1.0, "not_finite", 2.0)]


def test_totals_are_the_weighted_sums():
    combined = combine(OUTCOMES[:2], INFOS, groups=[0, 0], on_failure="stop")
    np.testing.assert_allclose(combined.totals, [1.4, -0.1], rtol=1e-15)
    assert combined.kept.all()
    np.testing.assert_array_equal(combined.parts["form"], [4.0, -1.0])
    assert combined.failures == {}


def test_under_zero_a_failed_reward_counts_zero_and_the_others_stand():
    combined = combine(OUTCOMES, INFOS, groups=[0, 0, 1, 1], on_failure="zero")
    np.testing.assert_allclose(combined.totals, [1.4, -0.1, 0.2, 1.0], rtol=1e-15)
    assert combined.kept.all()
    np.testing.assert_array_equal(combined.parts["right"], [1.0, 0.0, math.nan, 1.0])
    assert combined.failures == {("right", "timeout"): 1, ("form", "not_finite"): 1}


def test_under_drop_group_the_whole_group_is_left_out():
    combined = combine(OUTCOMES, INFOS, groups=[7, 5, 5, 7], on_failure="drop_group")
    assert not combined.kept.any()
    combined = combine(OUTCOMES[:3], INFOS, groups=[7, 5, 5], on_failure="drop_group")
    assert combined.kept.tolist() == [True, False, False]
    assert combined.metrics() == {
        "rewards/dropped": 2.0,
        "rewards/total/mean": pytest.approx(1.4),
        "rewards/right/mean": 0.5,
        "rewards/right/failures": 1.0,
        "rewards/form/mean": pytest.approx(5 / 3),
        "rewards/form/failures": 0.0,
        "rewards/seen/mean": pytest.approx(10 / 3),
        "rewards/seen/failures": 0.0,
    }


def test_under_stop_the_error_names_reward_completion_and_reason():
    wanted = "reward right: completion 2: timeout (so): 2 rewards gave no value, and rewards.on_failure=stop; set "
    with pytest.raises(RewardFailure, match=re.escape(wanted)):
        combine(OUTCOMES, INFOS, groups=[0, 0, 1, 1], on_failure="stop")


def test_a_step_in_which_everything_failed_has_no_mean():
    combined = combine([said("died", "died", "died")] * 2, INFOS, groups=[0, 0], on_failure="drop_group")
    assert combined.metrics() == {
        "rewards/dropped": 2.0,
        **{f"rewards/{info.name}/failures": 2.0 for info in INFOS},
    }
    assert combine([], INFOS, groups=[], on_failure="zero").totals.shape == (0,)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="the rules are zero, drop_group and stop"):
        combine(OUTCOMES, INFOS, groups=[0, 0, 1, 1], on_failure="ignore")


def test_the_range_of_the_total_follows_the_weights():
    assert total_range(INFOS) == (-0.1, 1.4)
    assert total_range([RewardInfo("a", -2.0, 0.0, 1.0)]) == (-2.0, 0.0)
    assert total_range([RewardInfo("a", 1.0, -math.inf, math.inf), INFOS[0]]) == (-math.inf, math.inf)
    assert total_range([RewardInfo("a", 0.0, -math.inf, math.inf), INFOS[0]]) == (0.0, 1.0)
