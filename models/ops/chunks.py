"""Chunks of tokens, and the sums over them: what every loss over a vocabulary is made of.

Chunks are strided along T and whole along B: chunk i of n holds the tokens i, i + n, i + 2n, ... of every row. A batch
sharded along B, T or both then splits into chunks that are sharded alike, and no token changes its device.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


def checked_chunk_size(chunk_size: int) -> int:
    """The chunk size, once it is seen to hold a token."""
    if chunk_size < 1:
        raise ValueError(
            f"loss_chunk_size: {chunk_size}: a chunk holds at least one token; set it >= 1, or leave it unset"
        )
    return int(chunk_size)


def stat_dtype(hidden) -> jnp.dtype:
    """What sums over logits run in: float32, or float64 where the hidden states are."""
    return jnp.promote_types(jnp.float32, hidden.dtype)


def is_target(targets_BC, logits_BCV):
    """[B, C, V]: whether a logit is the target's."""
    # A comparison fuses into its consumer and works on a vocabulary that is sharded; a gather or scatter does not.
    return lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, logits_BCV.ndim - 1) == targets_BC[..., None]


def zero_where(dead_BC, values):
    """Zeroes the rows that count nothing, so that what they hold reaches no sum."""
    return jnp.where(dead_BC[..., None], 0, values)


def accumulators(head_params):
    """Zeros for the gradients of a head, float32 at least; scalars where a leaf gets none."""

    def zeros(leaf):
        shape = leaf.shape if jnp.issubdtype(leaf.dtype, jnp.inexact) else ()
        return jnp.zeros(shape, jnp.promote_types(jnp.float32, leaf.dtype))

    return jax.tree.map(zeros, head_params)


def accumulate(sums, grads):
    """Adds one chunk's gradients."""
    return jax.tree.map(lambda s, g: s if g.dtype == jax.dtypes.float0 else s + g.astype(s.dtype), sums, grads)


def cast_like(grads, params):
    """Gradients in the dtypes of their parameters; None for leaves that get none."""
    # None is the cotangent of an integer leaf.
    return jax.tree.map(lambda g, p: g.astype(p.dtype) if jnp.issubdtype(p.dtype, jnp.inexact) else None, grads, params)


def _num_chunks(batch: int, length: int, chunk_size: int) -> int:
    """The fewest chunks within `chunk_size`, or up to twice as many where those divide the length evenly."""
    fewest = math.ceil(length / max(1, chunk_size // batch))
    divisors = [n for n in range(fewest, min(2 * fewest, length) + 1) if length % n == 0]
    return divisors[0] if divisors else math.ceil(length / math.ceil(length / fewest))


def split_chunks(tree, chunk_size: int):
    """Splits [B, T, ...] into strided chunks [n, B, C, ...], padding T with zeros, which as weights mean no token."""

    def split(x):
        batch, length = x.shape[:2]
        num_chunks = _num_chunks(batch, length, chunk_size)
        columns = math.ceil(length / num_chunks)
        pad = num_chunks * columns - length
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) if pad else x
        return jnp.moveaxis(x.reshape(batch, columns, num_chunks, *x.shape[2:]), 2, 0)

    return jax.tree.map(split, tree)


def join_chunks(chunks, length: int):
    """Undoes `split_chunks` for one array, dropping the padding."""
    num_chunks, batch, columns = chunks.shape[:3]
    whole = jnp.moveaxis(chunks, 0, 2).reshape(batch, columns * num_chunks, *chunks.shape[3:])
    return whole[:, :length]
