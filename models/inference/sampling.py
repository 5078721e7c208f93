"""Drawing a token of each slot from its logits, with the token's log-probability under the distribution drawn from.

The order is vLLM's: logits / temperature, then the k most probable, then the least set of those that has probability p.
A draw is a function of the slot's logits, seed and count of tokens alone, so that it does not depend on the others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

BLOCK = 128
"""Tokens whose probabilities are summed together; a draw picks a block first, then a token of it."""


def sample_tokens(
    logits: Float[Array, "B V"],
    *,
    seeds: Int[Array, " B"],
    counts: Int[Array, " B"],
    temperature: Float[Array, " B"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token for each row.

    Args:
        logits: float32, unscaled.
        seeds: of each completion.
        counts: tokens drawn so far of each completion; with the seed it makes the key of this draw.
        temperature: divides the logits; 0 takes the most probable token (the first of equals).
        top_k: at least 1; all tokens as probable as the k-th stay.
        top_p: in (0, 1]; 1 keeps all.

    Returns:
        Token ids, and their log-probabilities in nats: of the truncated, scaled distribution; of the unscaled and
        untruncated one at temperature 0.
    """
    greedy = temperature == 0.0
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    top = scaled.max(-1, keepdims=True)
    # Decided at run time, as a program of its own for rows without truncation would round otherwise.
    truncated = ((top_k < logits.shape[1]) | (top_p < 1.0)) & ~greedy
    kept = jax.lax.cond(
        truncated.any(),
        lambda: truncation(scaled, top_k=top_k, top_p=top_p) | ~truncated[:, None],
        lambda: jnp.ones(logits.shape, bool),
    )
    scaled = jnp.where(kept, scaled, -jnp.inf)
    weights = jnp.exp(scaled - top)
    drawn = _draw(weights, jax.vmap(_two_uniforms)(seeds, counts))
    tokens = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)
    return tokens, (chosen - top - jnp.log(weights.sum(-1, keepdims=True)))[:, 0]


def truncation(
    scaled: Float[Array, "B V"], *, top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Bool[Array, "B V"]:
    """The tokens among the k most probable and, of these, in the least set that has probability p.

    A token stays when fewer than k tokens, and a probability less than p, lie strictly above it; so tokens of equal
    logits stay or go together. The two thresholds are found bit by bit, which costs 64 passes and no sort.
    """
    ordered = _ordered_bits(scaled)
    k_th = _greatest(lambda bound: (ordered >= bound).sum(-1) >= top_k, rows=scaled.shape[0])
    weights = jnp.where(ordered >= k_th[:, None], jnp.exp(scaled - scaled.max(-1, keepdims=True)), 0.0)
    wanted = top_p * weights.sum(-1)
    p_th = _greatest(lambda bound: jnp.where(ordered >= bound, weights, 0.0).sum(-1) >= wanted, rows=scaled.shape[0])
    p_th = jnp.where(top_p >= 1.0, jnp.uint32(0), p_th)
    return ordered >= jnp.maximum(k_th, p_th)[:, None]


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers that compare as the floats do: the sign bit is set for positives, all bits are turned for negatives."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _greatest(holds: Callable[[jax.Array], jax.Array], *, rows: int) -> UInt32[Array, " B"]:
    """The greatest bound [B] for which `holds(bound [B, 1])` is true; it is true up to there and false beyond."""

    def with_bit(turn: jax.Array, bound: jax.Array) -> jax.Array:
        larger = bound | (jnp.uint32(1 << 31) >> turn.astype(jnp.uint32))
        return jnp.where(holds(larger[:, None]), larger, bound)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((rows,), jnp.uint32))


def _two_uniforms(seed: jax.Array, count: jax.Array) -> jax.Array:
    """Two uniform numbers of one draw; the generator is named, so that no setting of the process changes it."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), count)
    return jax.random.uniform(key, (2,))


def _draw(weights: Float[Array, "B V"], uniform: Float[Array, "B 2"]) -> Int[Array, " B"]:
    """Draws in proportion to weights: a block by the blocks' sums, then a token of the block.

    Two numbers instead of one keep small probabilities exact in a large vocabulary, and one pass over it suffices.
    """
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block = _inverse_cumulative(blocks.sum(-1), uniform[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _inverse_cumulative(within, uniform[:, 1])


def _inverse_cumulative(weights: Float[Array, "B n"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index whose cumulative weight exceeds uniform x total; never one of weight zero."""
    cumulative = jnp.cumsum(weights, axis=-1)
    reached = (cumulative > (uniform * cumulative[:, -1])[:, None]) & (weights > 0.0)
    # Where rounding puts the target past every sum, the most probable index stands in.
    return jnp.where(reached.any(-1), jnp.argmax(reached, axis=-1), jnp.argmax(weights, axis=-1))
