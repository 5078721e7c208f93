"""Estimators against enumeration of every choice of samples, and intervals against closed forms and known draws."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.statistics import avg_at_k, estimate_mean, estimate_proportion, maj_at_k, pass_at_k


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs hold the correct one.
        (5, 2, 3, 9 / 10),  # 1 of the 10 triples holds none.
        (5, 3, 3, 1.0),
        (200, 1, 100, 1 / 2),
    ],
)
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(num_samples, num_correct, k, expected):
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_equals_enumeration(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    chosen = list(itertools.combinations(correct, k))
    expected = sum(map(any, chosen)) / len(chosen)
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_exact_for_many_samples():
    # The product form of the paper in rational numbers; factorials would overflow a float here.
    n, c, k = 4000, 7, 1000
    expected = 1 - math.prod((Fraction(n - c - i, n - i) for i in range(k)), start=Fraction(1))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), abs=1e-15)


def majority_by_enumeration(answers, correct, k):
    """The definition, word for word."""
    total, choices = Fraction(0), 0
    for chosen in itertools.combinations(zip(answers, correct, strict=True), k):
        choices += 1
        votes = [answer for answer, _ in chosen if answer is not None]
        most = max((votes.count(answer) for answer in votes), default=0)
        winners = {answer for answer in votes if votes.count(answer) == most}
        for winner in winners:
            own = [holds for answer, holds in chosen if answer == winner]
            total += Fraction(sum(own), len(own)) / len(winners)
    return float(total / choices)


@given(
    st.lists(st.tuples(st.sampled_from(["7", "8", "9", "10", None]), st.booleans()), min_size=1, max_size=9), st.data()
)
def test_maj_at_k_equals_enumeration(samples, data):
    """Also where samples of one answer are not all right or wrong, as where the format counts too."""
    answers, correct = zip(*samples, strict=True)
    k = data.draw(st.integers(1, len(answers)))
    assert maj_at_k(answers, correct, k) == pytest.approx(majority_by_enumeration(answers, correct, k), abs=1e-12)


def majority_of_sevens(answers, k):
    """maj@k where 7 is right."""
    return maj_at_k(answers, [answer == "7" for answer in answers], k)


@pytest.mark.parametrize(
    ("answers", "k", "expected"),
    [
        (["7"], 1, 1.0),
        ([None], 1, 0.0),
        (["7", "8"], 2, 1 / 2),  # A tie.
        (["7", None, None], 3, 1.0),  # One vote, and nobody against it.
        (["7", "7", "8"], 3, 1.0),
        (["7", "8", "8"], 3, 0.0),
        (["7", "7", "8"], 1, 2 / 3),
    ],
)
def test_the_majority_of_few_votes_is_known_by_hand(answers, k, expected):
    assert majority_of_sevens(answers, k) == pytest.approx(expected, abs=1e-15)


def test_maj_at_one_is_avg_and_many_samples_are_quick():
    answers = ["7"] * 30 + ["8"] * 20 + [str(index) for index in range(10, 20)] + [None] * 4
    assert majority_of_sevens(answers, 1) == pytest.approx(30 / 64, abs=1e-12)
    assert majority_of_sevens(answers, 64) == 1.0
    assert 30 / 64 < majority_of_sevens(answers, 16) < 1
    # The number of choices, about 1e328, is past the largest float.
    assert majority_of_sevens(["7"] * 1060 + ["8"] * 40, 550) == 1.0


def test_avg_at_k_is_the_mean_of_each_problem():
    shares = avg_at_k(np.array([[True, False, False, True], [False] * 4]))
    np.testing.assert_array_equal(shares, [0.5, 0.0])


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        # Roots of (share - p)^2 = z^2 p (1 - p) / n, which is Wilson's definition; at 0 of 10: z^2 / (10 + z^2).
        (0, 10, 0.0, 1.959963984540054**2 / (10 + 1.959963984540054**2)),
        (10, 10, 10 / (10 + 1.959963984540054**2), 1.0),
        (1, 2, 0.0945312, 0.9054688),
        (81, 263, 0.2552820, 0.3662082),
    ],
)
def test_wilsons_interval_has_its_published_values(successes, total, low, high):
    found = estimate_proportion(successes, total)
    assert found.value == successes / total
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))


@pytest.mark.parametrize(("successes", "total"), [(1, 2), (81, 263), (399, 400), (3, 1319)])
def test_wilsons_bounds_solve_the_equation_that_defines_them(successes, total):
    found = estimate_proportion(successes, total)
    for bound in (found.low, found.high):
        left = (successes / total - bound) ** 2
        assert left == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / total, rel=1e-10)


def test_the_bootstrap_interval_is_the_normal_one_for_many_problems():
    # 400 problems of 0, 1/4, ... 1: the mean's standard error is sd / sqrt(400). The tolerance is a tenth of it, which
    # covers 20,000 draws' quantile noise (about 0.02 of it) and the bootstrap's own discreteness.
    values = np.resize(np.linspace(0, 1, 5), 400)
    error = values.std() / math.sqrt(400)
    found = estimate_mean(values, seed=1, num_resamples=20_000)
    assert found.value == pytest.approx(0.5, abs=1e-12)
    assert found.low == pytest.approx(0.5 - 1.959964 * error, abs=error / 10)
    assert found.high == pytest.approx(0.5 + 1.959964 * error, abs=error / 10)


def test_the_bootstrap_interval_equals_enumeration_of_all_draws():
    # Four problems have 256 equally likely draws; the percentiles of their means lie on its steps of 1/256.
    values = np.array([0.0, 0.3, 0.5, 1.0])
    means = sorted(float(np.mean(drawn)) for drawn in itertools.product(values, repeat=4))
    # 2.5 % of 256 is 6.4, so the seventh smallest is the exact percentile, and it is the same for some places around.
    found = estimate_mean(values, seed=3, num_resamples=40_000)
    assert means[5] <= found.low <= means[8]
    assert means[-9] <= found.high <= means[-6]


def test_the_bootstrap_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        # Each problem has its own difficulty (mean 1/3), and eight samples.
        shares = rng.binomial(8, rng.beta(1, 2, size=200)) / 8
        found = estimate_mean(shares, seed=trial, num_resamples=400)
        covered += found.low <= 1 / 3 <= found.high
    # 95 % of 400 is 380, with a standard deviation of 4.4; four of them either way, and a little for small samples.
    assert 358 <= covered <= 398


def test_the_same_seed_gives_the_same_interval_in_chunks_or_not(monkeypatch):
    values = np.linspace(0, 1, 37)
    first = estimate_mean(values, seed=5, num_resamples=1000)
    assert estimate_mean(values, seed=5, num_resamples=1000) == first
    assert estimate_mean(values, seed=6, num_resamples=1000) != first
    monkeypatch.setattr("posttrain.statistics._CHUNK", 37 * 16)
    assert estimate_mean(values, seed=5, num_resamples=1000) == first


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_problems_agree_the_interval_is_wilsons_and_not_empty(value):
    found = estimate_mean(np.full(400, value), seed=0, num_resamples=1000)
    assert found == estimate_proportion(int(400 * value), 400)
    assert found.high - found.low > 0.009


@pytest.mark.parametrize(("value", "count"), [(0.5, 3), (0.25, 400), (1 / 3, 10)])
def test_where_all_problems_have_the_same_share_the_interval_is_wilsons_too(value, count):
    found = estimate_mean(np.full(count, value), seed=0, num_resamples=1000)
    assert found.value == value and 0 < found.low < value < found.high < 1
    # The equation that defines Wilson's bounds, as above.
    for bound in (found.low, found.high):
        assert (value - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / count, rel=1e-10)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pass_at_k(4, 1, 5), "pass@k: k=5 of 4 samples"),
        (lambda: pass_at_k(4, 5, 1), "pass@k: num_correct=5"),
        (lambda: maj_at_k(["7"], [True], 0), "maj@k: k=0 of 1 samples"),
        (lambda: avg_at_k(np.zeros((3, 0), bool)), "avg@k: correct has shape (3, 0)"),
        (lambda: estimate_proportion(0, 0), "proportion: 0 of 0"),
        (lambda: estimate_mean(np.array([]), seed=0, num_resamples=10), "at least one problem"),
        (lambda: estimate_mean(np.array([2.0]), seed=0, num_resamples=10), "accuracies lie in [0, 1]"),
        (lambda: estimate_mean(np.array([np.nan]), seed=0, num_resamples=10), "accuracies lie in [0, 1]"),
        (lambda: estimate_mean(np.array([0.5]), seed=0, num_resamples=0), "num_resamples=0"),
    ],
)
def test_impossible_figures_are_refused(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()
