"""The rules of reinforcement learning that need no JAX, and what a null stands for."""

import math

import pytest

from recipes.schema import RewardsSection, RLSection


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"dual_clip": 1.1}, "set it above 1 + epsilon_high = 1.2,"),
        ({"dual_clip": 1.2}, "set it above 1 + epsilon_high = 1.2,"),
        ({"dual_clip": 1.5, "epsilon_high": 0.5}, "set it above 1 + epsilon_high = 1.5,"),
        ({"dual_clip": 1.28, "loss_algo": "dapo"}, "set it above 1 + epsilon_high = 1.28,"),
        ({"dual_clip": 1.25}, None),
        ({"dual_clip": 1.3, "loss_algo": "dapo"}, None),
        ({"dual_clip": 3.0, "epsilon_high": 1.5}, None),
    ],
)
def test_a_dual_clip_bounds_ratios_that_the_clip_does_not(settings, line):
    if line is None:
        assert RLSection(**settings).dual_clip == settings["dual_clip"]
        return
    with pytest.raises(ValueError, match=f"dual_clip={settings['dual_clip']}: it bounds ratios that") as caught:
        RLSection(**settings)
    assert line in str(caught.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf, "much", True, None])
def test_a_weight_that_is_no_finite_number_is_refused_by_its_key(weight):
    with pytest.raises(ValueError, match=r"functions\.length=\S+: a weight is a finite number"):
        RewardsSection(functions={"gsm8k_exact": 1, "length": weight})


@pytest.mark.parametrize(
    ("settings", "clip", "rounds"),
    [
        ({}, 0.2, 0),
        ({"epsilon": 0.3}, 0.3, 0),
        ({"loss_algo": "gspo", "max_resamples": 3}, 0.2, 3),
        # DAPO's own: the higher clip, and dynamic sampling.
        ({"loss_algo": "dapo"}, 0.28, 10),
        ({"loss_algo": "dapo", "epsilon_high": 0.4, "max_resamples": 0}, 0.4, 0),
    ],
)
def test_what_is_not_set_is_the_algorithms_own(settings, clip, rounds):
    section = RLSection(**settings)
    assert (section.clip_high, section.resample_rounds) == (clip, rounds)
