"""Advantages against arithmetic by hand and loops over the members that were kept."""

import re
import statistics

import numpy as np
import pytest

from posttrain.advantages import ADVANTAGES, group_advantages, has_signal


def by_loop(rewards, kept, estimator):
    """One member at a time, with the statistics module's own mean and deviation."""
    advantages = np.zeros(rewards.shape)
    for p, g in np.ndindex(*rewards.shape):
        members = [float(r) for r, k in zip(rewards[p], kept[p], strict=True) if k]
        if not kept[p, g] or len(members) < 2:
            continue
        centred = rewards[p, g] - statistics.fmean(members)
        if estimator == "group":
            advantages[p, g] = centred / (statistics.stdev(members) + 1e-6)
        elif estimator == "dr_grpo":
            advantages[p, g] = centred
        else:
            others = [float(rewards[p, j]) for j in range(rewards.shape[1]) if j != g and kept[p, j]]
            advantages[p, g] = rewards[p, g] - statistics.fmean(others)
    return advantages


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Rewards 0, 0, 1, 3: mean 1, squared deviations 1, 1, 0, 4, so std with divisor 3 is sqrt(2).
        ("group", [-1 / 2**0.5, -1 / 2**0.5, 0.0, 2 / 2**0.5]),
        ("dr_grpo", [-1.0, -1.0, 0.0, 2.0]),
        # The others' means: 4/3, 4/3, 1, 1/3.
        ("rloo", [-4 / 3, -4 / 3, 0.0, 8 / 3]),
    ],
)
def test_advantages_of_four_members_are_the_hand_computed_ones(estimator, expected):
    found = group_advantages(np.array([[0.0, 0.0, 1.0, 3.0]]), estimator=estimator, kept=None)
    np.testing.assert_allclose(found, [expected], rtol=1e-6 if estimator == "group" else 1e-14, atol=1e-15)


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_advantages_equal_a_loop_over_the_kept_members(rng, estimator):
    rewards, kept = rng.normal(size=(40, 5)), rng.random((40, 5)) > 0.4
    kept[0] = False
    assert {0, 1, 2, 5} <= set(kept.sum(1))
    expected = by_loop(rewards, kept, estimator)
    np.testing.assert_allclose(group_advantages(rewards, estimator=estimator, kept=kept), expected, rtol=0, atol=1e-12)
    everyone = by_loop(rewards, np.ones_like(kept), estimator)
    np.testing.assert_allclose(group_advantages(rewards, estimator=estimator, kept=None), everyone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_a_dropped_members_reward_may_be_anything(rng, estimator):
    rewards = rng.normal(size=(3, 4))
    kept = np.array([[True, True, False, True], [True, False, False, True], [False, False, False, True]])
    spoilt = np.where(kept, rewards, [np.nan, np.inf, -np.inf, np.nan])
    found = group_advantages(spoilt, estimator=estimator, kept=kept)
    np.testing.assert_array_equal(found, group_advantages(rewards, estimator=estimator, kept=kept))
    assert not found[~kept].any()


@pytest.mark.parametrize("estimator", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.1, -1e6 / 3])
def test_equal_rewards_give_exactly_zero(estimator, reward):
    # Three times 0.1 has a mean that isn't 0.1.
    rewards = np.full((2, 3), reward)
    assert not group_advantages(rewards, estimator=estimator, kept=None).any()
    assert not has_signal(rewards, kept=None).any()


def test_signal_is_a_difference_among_kept_members():
    rewards = np.array([[0.0, 1.0, np.nan], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    kept = np.array([[True, True, False], [True, True, False], [True, True, True]])
    assert has_signal(rewards, kept=kept).tolist() == [True, False, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_named(bad):
    rewards = np.zeros((3, 4))
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match=re.escape(f"reward {bad} of prompt 2, completion 1")):
        group_advantages(rewards, estimator="group", kept=None)


def test_groups_of_one_and_unknown_estimators_are_refused():
    with pytest.raises(ValueError, match=r"rl\.num_generations=1"):
        group_advantages(np.zeros((3, 1)), estimator="group", kept=None)
    with pytest.raises(ValueError, match="group, dr_grpo, rloo"):
        group_advantages(np.zeros((3, 2)), estimator="gae", kept=None)
    with pytest.raises(ValueError, match="num_generations"):
        group_advantages(np.zeros(6), estimator="group", kept=None)
