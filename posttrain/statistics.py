"""Estimates from sampled answers, with 95 % confidence intervals: pass@k, maj@k, avg@k.

Every estimate is of an expectation over samples, computed exactly from the n samples at hand and not by drawing k of
them. Intervals say how an estimate would vary over other problems of the same kind.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float

Z_95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
_CHUNK = 1 << 22
"""Numbers drawn at a time by the bootstrap (32 MiB)."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    value: float
    low: float
    high: float
    num_problems: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that at least one of k samples of a problem is correct.

    Unbiased: 1 - C(n - c, k) / C(n, k), over all choices of k of the n samples (Chen et al. 2021, "Evaluating Large
    Language Models Trained on Code", equation 1).

    Args:
        num_samples: n, samples of the problem.
        num_correct: c, how many of them are correct.
        k: samples that are allowed.

    Returns:
        The probability.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    _check_k("pass@k", num_samples, k)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@k: num_correct={num_correct}: of {num_samples} samples between 0 and all are correct; count again"
        )
    # Integers of any size, so that the quotient is rounded once.
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """The probability that the majority of k samples of a problem is correct.

    It is the mean over all choices of k of the n samples, which is unbiased as pass@k is. The answer with most votes
    wins; where several have most, each is as likely to be taken. A winner stands for one of the samples that gave it,
    each as likely, and is right where that sample is. Samples without an answer do not vote; where nobody votes, the
    majority is wrong.

    Args:
        answers: the samples' answers in one spelling (`rewards.normalization.canonical`); None where there is none.
        correct: which samples are correct.
        k: samples that vote.

    Returns:
        The probability.

    Raises:
        ValueError: not 1 <= k <= n.
    """
    _check_k("maj@k", len(answers), k)
    votes = Counter(answers)
    silent = votes.pop(None, 0)
    right = Counter(answer for answer, holds in zip(answers, correct, strict=True) if holds and answer is not None)
    wins = Fraction(0)
    for answer, count in right.items():
        others = [number for other, number in votes.items() if other != answer]
        # By symmetry, the k samples' share of right ones among those of this answer is that of all n in the mean.
        wins += Fraction(count, votes[answer]) * _wins(votes[answer], others, silent, k)
    return float(wins / math.comb(len(answers), k))


def _wins(own: int, others: Sequence[int], silent: int, k: int) -> Fraction:
    """In how many choices of k samples an answer that `own` of them gave wins; a tie counts as its share.

    Rational, for the numbers of choices pass the largest float from about a thousand samples on.
    """
    wins = Fraction(0)
    for most in range(1, min(own, k) + 1):
        # ways[s][t]: choices of s samples of other answers, none of which has over `most` votes, and t of which have
        # that many.
        ways = {(chosen, 0): math.comb(silent, chosen) for chosen in range(min(silent, k) + 1)}
        for count in others:
            ways = _with_answer(ways, count, most, k)
        for (chosen, tied), number in ways.items():
            if chosen == k - most:
                wins += Fraction(math.comb(own, most) * number, 1 + tied)
    return wins


def _with_answer(ways: dict[tuple[int, int], int], count: int, most: int, k: int) -> dict[tuple[int, int], int]:
    """Lets another answer, which `count` samples gave, take part: up to `most` of them are chosen."""
    extended: dict[tuple[int, int], int] = {}
    for (chosen, tied), number in ways.items():
        for taken in range(min(count, most, k - chosen) + 1):
            key = chosen + taken, tied + (taken == most)
            extended[key] = extended.get(key, 0) + number * math.comb(count, taken)
    return extended


def avg_at_k(correct: Bool[np.ndarray, "P k"]) -> Float[np.ndarray, "P"]:
    """The share of correct samples of each problem; its mean estimates pass@1 with less noise than one sample.

    Args:
        correct: which samples are correct.

    Returns:
        float64, one share for each problem.

    Raises:
        ValueError: there is no sample.
    """
    if correct.ndim != 2 or correct.shape[1] < 1:
        raise ValueError(f"avg@k: correct has shape {correct.shape}: one row a problem and one column a sample; sample")
    return correct.mean(axis=1, dtype=np.float64)


def estimate_proportion(successes: int, total: int) -> Estimate:
    """A share of independent yes-or-no trials: greedy accuracy, one answer a problem.

    The interval is Wilson's (1927), which stays inside [0, 1] and is not empty where all trials agree.

    Args:
        successes: trials that said yes.
        total: trials.

    Returns:
        The share with its interval.

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"proportion: {successes} of {total}: a share is of at least one trial; evaluate more problems"
        )
    return _wilson(successes / total, total)


def _wilson(share: float, total: int) -> Estimate:
    scale = 1 + Z_95**2 / total
    centre = (share + Z_95**2 / (2 * total)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    # At the ends the exact bounds are 0 and 1, which rounding would miss.
    low = 0.0 if share == 0.0 else centre - half
    high = 1.0 if share == 1.0 else centre + half
    return Estimate(share, low, high, total)


def estimate_mean(values: Float[np.ndarray, "P"], *, seed: int, num_resamples: int) -> Estimate:
    """The mean of a figure per problem (pass@k, maj@k, avg@k), by the bootstrap over problems.

    The interval is the percentile bootstrap's (Efron 1979). Problems are what is drawn anew, since samples of one
    problem are not independent. Where all problems have the same value, drawing anew shows no spread, and the interval
    is Wilson's for as many yes-or-no trials as there are problems: among means in [0, 1] none spreads wider.

    Args:
        values: the figure of each problem, in [0, 1].
        seed: seed of the draws; the same values and seed give the same interval.
        num_resamples: draws of a whole set of problems; 10,000 fix the bounds to about a hundredth of the interval.

    Returns:
        The mean with its interval.

    Raises:
        ValueError: no problem, a value outside [0, 1] or not finite, or no resample.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 1:
        raise ValueError(f"mean: {values.shape} values: a mean is over at least one problem; evaluate some")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"mean: {values.min()} to {values.max()}: accuracies lie in [0, 1]; give shares, not counts")
    if num_resamples < 1:
        raise ValueError(f"mean: num_resamples={num_resamples}: an interval needs draws; set at least 1000")
    count = len(values)
    if values.min() == values.max():
        return _wilson(float(values[0]), count)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, _CHUNK // count)
    for first in range(0, num_resamples, rows):
        drawn = rng.integers(count, size=(min(rows, num_resamples - first), count))
        means[first : first + len(drawn)] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), count)


def _check_k(name: str, num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"{name}: k={k} of {num_samples} samples: k samples cannot be chosen from fewer; "
            "lower k, or sample more completions"
        )
