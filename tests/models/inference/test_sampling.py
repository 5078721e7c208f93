"""Draws, their log-probabilities and truncation, against float64 loops in NumPy and the chi-square distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from models.inference.sampling import sample_tokens, truncation

V = 300
"""Tokens: two whole blocks of the drawing and a part of a third."""
DRAWS = 2000


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def draw(logits, *, temperature=1.0, top_k=V, top_p=1.0, seeds=None, counts=None):
    """`sample_tokens` with one setting for all rows."""
    rows = len(logits)
    tokens, logprobs = jax.jit(sample_tokens)(
        jnp.asarray(logits, jnp.float32),
        seeds=jnp.arange(rows) if seeds is None else jnp.asarray(seeds),
        counts=jnp.zeros(rows, jnp.int32) if counts is None else jnp.asarray(counts),
        temperature=jnp.full(rows, temperature, jnp.float32),
        top_k=jnp.full(rows, top_k, jnp.int32),
        top_p=jnp.full(rows, top_p, jnp.float32),
    )
    return np.asarray(tokens), np.asarray(logprobs)


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The definition, token by token: fewer than k tokens, and a probability less than p of those k, lie above."""
    kth = np.sort(logits)[::-1][top_k - 1]
    among = logits >= kth
    probabilities = np.where(among, softmax(logits), 0.0)
    probabilities /= probabilities.sum()
    above = np.array([probabilities[logits > logit].sum() for logit in logits])
    return among & ((above < top_p) if top_p < 1.0 else np.ones(V, bool))


@pytest.mark.parametrize(("top_k", "top_p"), [(V, 1.0), (1, 1.0), (7, 1.0), (V, 0.5), (V, 0.95), (40, 0.7), (3, 1e-6)])
def test_truncation_keeps_what_sorting_keeps(rng, top_k, top_p):
    logits = (rng.normal(size=(6, V)) * 3).astype(np.float32)
    logits[1, 50:90] = logits[1, 0]  # Equal logits stay or go together.
    logits[2] = np.abs(logits[2])
    logits[3] = -np.abs(logits[3])
    kept = truncation(jnp.asarray(logits), top_k=jnp.full(6, top_k), top_p=jnp.full(6, top_p, jnp.float32))
    np.testing.assert_array_equal(kept, [kept_by_sorting(row, top_k, top_p) for row in logits])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, V, 1.0), (0.7, V, 1.0), (1.3, 20, 1.0), (0.7, 50, 0.8)]
)
def test_log_probabilities_are_those_of_the_distribution_drawn_from(rng, temperature, top_k, top_p):
    logits = (rng.normal(size=(64, V)) * 3).astype(np.float32)
    tokens, logprobs = draw(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, token, logprob in zip(logits, tokens, logprobs, strict=True):
        kept = kept_by_sorting(row / np.float32(temperature), top_k, top_p)
        assert kept[token]
        expected = softmax(np.where(kept, row / temperature, -np.inf))[token]
        # Float32 sums of 300 terms; 1e-5 nats.
        assert abs(logprob - np.log(expected)) < 1e-5


def test_greedy_takes_the_first_maximum_and_reports_the_unscaled_log_softmax(rng):
    logits = (rng.normal(size=(8, V)) * 3).astype(np.float32)
    logits[0, [200, 30]] = 50.0
    tokens, logprobs = draw(logits, temperature=0.0, top_k=1, top_p=0.1)
    assert tokens[0] == 30
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logprobs, np.log(softmax(logits).max(-1)), atol=1e-5)


def chi_square_p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Of the counts of tokens, those expected fewer than 5 times taken together; a token of probability 0 gives 0."""
    counts, expected = np.bincount(tokens, minlength=V), probabilities * len(tokens)
    if counts[expected == 0].any():
        return 0.0
    order = np.argsort(expected)[::-1]
    frequent = order[expected[order] >= 5]
    rest = np.setdiff1d(order, frequent)
    observed = np.append(counts[frequent], counts[rest].sum())
    wanted = np.append(expected[frequent], expected[rest].sum())
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep] * observed.sum() / wanted[keep].sum()).pvalue)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, V, 1.0), (0.7, V, 1.0), (0.7, V, 0.8), (1.0, 12, 0.9)]
)
def test_draws_pass_chi_square_and_would_not_for_another_temperature(rng, temperature, top_k, top_p):
    row = (rng.normal(size=V) * 2).astype(np.float32)
    tokens, _ = draw(np.tile(row, (DRAWS, 1)), temperature=temperature, top_k=top_k, top_p=top_p)
    kept = kept_by_sorting(row / np.float32(temperature), top_k, top_p)
    assert chi_square_p_value(tokens, softmax(np.where(kept, row / temperature, -np.inf))) > 0.01
    ignored = softmax(np.where(kept, row / (1.0 if temperature != 1.0 else 0.7), -np.inf))
    assert chi_square_p_value(tokens, ignored) < 1e-3


def test_successive_draws_of_one_seed_are_independent(rng):
    """Pairs of neighbours from one seed's counts 0, 1, 2, ... over four equal tokens: 16 cells."""
    tokens, _ = draw(
        np.where(np.arange(V) < 4, 0.0, -1e9) * np.ones((DRAWS, 1)), seeds=[7] * DRAWS, counts=range(DRAWS)
    )
    pairs = np.bincount(tokens[0::2] * 4 + tokens[1::2], minlength=16)
    assert stats.chisquare(pairs).pvalue > 0.01


def test_a_draw_depends_on_its_own_row_alone(rng):
    logits = (rng.normal(size=(8, V)) * 2).astype(np.float32)
    tokens, logprobs = draw(logits, seeds=range(8), counts=range(8))
    shuffled = rng.permutation(8)
    again, logprobs_again = draw(logits[shuffled], seeds=shuffled, counts=shuffled)
    np.testing.assert_array_equal(again, tokens[shuffled])
    np.testing.assert_array_equal(logprobs_again, logprobs[shuffled])


def test_a_token_of_probability_zero_is_never_drawn():
    """One token of 200,000 has all the weight, wherever it stands."""
    for position in (0, 127, 128, 199_999):
        logits = np.full((16, 200_000), -1e9, np.float32)
        logits[:, position] = 0.0
        tokens, logprobs = draw(logits, top_k=200_000)
        np.testing.assert_array_equal(tokens, position)
        np.testing.assert_array_equal(logprobs, 0.0)
