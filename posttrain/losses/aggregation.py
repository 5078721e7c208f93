"""From per-token losses to one loss: which weight each token has, and what the sum is divided by.

Rows hold one sequence or several, told apart by their segment ids, and a sequence never crosses a row. So every
aggregation is a weighted sum over tokens and a divisor that counts tokens or sequences; both add over micro-batches,
and neither knows how sequences were packed or padded.

With m the mask, n_i = sum_t m_it the tokens of sequence i, and N the sequences that have any:

| name                             | loss                        | weight of a token | divisor | in            |
|----------------------------------|-----------------------------|-------------------|---------|---------------|
| `token-mean`                     | sum_it l_it / sum_i n_i     | 1                 | sum n_i | DAPO          |
| `sequence-mean-token-mean`       | mean_i sum_t l_it / n_i     | 1 / n_i           | N       | GRPO, GSPO    |
| `sequence-mean-token-sum`        | mean_i sum_t l_it           | 1                 | N       | RLOO          |
| `sequence-mean-token-sum-norm`   | mean_i sum_t l_it / length  | 1 / length        | N       | Dr. GRPO      |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recipes.complaints import nearest

AGGREGATIONS = (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-sum",
    "sequence-mean-token-sum-norm",
)
# A name that others advertise and none of them accepts; it can only mean one thing.
_MEANT = {"sequence-mean": "sequence-mean-token-mean"}


class TokenWeights(NamedTuple):
    """How per-token losses add up.

    Attributes:
        weights: factor of each token's loss, 0 where there is no token, NaN where it is of no sequence: sums over
            sequences would leave that token out, and no one would notice.
        weight_sum: divisor of the weighted sum: tokens or sequences.
    """

    weights: Float[Array, "R T"]
    weight_sum: Float[Array, ""]


def check_aggregation(aggregation: str, length_norm: float | None) -> None:
    """Checks an aggregation's name and its length.

    Raises:
        ValueError: the name is unknown, or `length_norm` is missing, not positive, or of no effect.
    """
    if aggregation not in AGGREGATIONS:
        meant = _MEANT.get(aggregation) or nearest(aggregation, AGGREGATIONS)
        raise ValueError(
            f"loss_aggregation: {aggregation!r}: no such aggregation"
            + (f"; use {meant}" if meant else "")
            + f" (there are {', '.join(AGGREGATIONS)})"
        )
    if aggregation == "sequence-mean-token-sum-norm":
        if length_norm is None or not length_norm > 0:
            raise ValueError(
                f"length_norm: {length_norm}: {aggregation} divides every sequence by the same positive number of "
                "tokens; set it, for instance to the largest completion length"
            )
    elif length_norm is not None:
        raise ValueError(
            f"length_norm: {length_norm}: has no effect with {aggregation}; leave it unset, or use "
            "loss_aggregation=sequence-mean-token-sum-norm"
        )


def token_weights(
    mask: Bool[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    *,
    aggregation: str,
    length_norm: float | None,
    max_segments: int,
    dtype: jnp.dtype,
) -> TokenWeights:
    """The weight of each token's loss, and the divisor of their sum.

    Args:
        mask: tokens that count.
        segment_ids: 1 to max_segments, the token's sequence within its row; where the mask is 0 anything.
        aggregation: one of AGGREGATIONS.
        length_norm: tokens that `sequence-mean-token-sum-norm` divides by; None for the others.
        max_segments: sequences a row may hold.
        dtype: of the result.

    Raises:
        ValueError: see `check_aggregation`.
    """
    check_aggregation(aggregation, length_norm)
    weights = mask.astype(dtype)
    stray = mask & (_within(segment_ids, max_segments) == 0)
    if aggregation == "token-mean":
        return TokenWeights(jnp.where(stray, jnp.nan, weights), weights.sum())
    lengths = segment_sums(weights, segment_ids, max_segments=max_segments)
    num_sequences = (lengths > 0).sum().astype(dtype)
    if aggregation == "sequence-mean-token-mean":
        weights = weights / jnp.maximum(from_segments(lengths, segment_ids), 1)
    elif length_norm is not None:
        weights = weights / length_norm
    return TokenWeights(jnp.where(stray, jnp.nan, weights), num_sequences)


def segment_sums(
    values: Float[Array, "R T"], segment_ids: Int[Array, "R T"], *, max_segments: int
) -> Float[Array, "R S"]:
    """Sums each sequence's values within its row; column s is segment s + 1, and other ids are left out."""

    def sum_row(row, ids):
        return jax.ops.segment_sum(row, ids, num_segments=max_segments + 1)[1:]

    return jax.vmap(sum_row)(values, _within(segment_ids, max_segments))


def from_segments(sums: Float[Array, "R S"], segment_ids: Int[Array, "R T"]) -> Float[Array, "R T"]:
    """Gives each token its sequence's value, and 0 to a token of no sequence."""
    ids = _within(segment_ids, sums.shape[1])
    return jnp.take_along_axis(jnp.pad(sums, [(0, 0), (1, 0)]), ids, axis=1)


def _within(segment_ids, max_segments):
    return jnp.where((segment_ids >= 1) & (segment_ids <= max_segments), segment_ids, 0)
