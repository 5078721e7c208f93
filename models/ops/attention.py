"""Scaled dot-product attention with grouped heads: the plain reference, and the choice among implementations."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.ops.blocked_attention import blocked_attention
from models.ops.flash_attention import flash_attention, unsupported_reason
from models.ops.masks import FULL_WINDOW, causal_mask

Window = int | Int[Array, ""] | None


def soft_cap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(x / cap), the identity for None (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def dot_product_attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B S K N"],
    value: Float[Array, "B S K N"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H N"]:
    """softmax(scale q k^T) v with a float32 softmax (Vaswani et al. 2017); query head h reads kv head h // (H/K).

    A query that sees no key gives zeros.
    """
    B, T, H, N = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, H // K, N)
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("btkgn,bskn->bkgts", grouped, key, preferred_element_type=accumulate)
    scores = soft_cap(scores * scale, softcap)
    visible = mask[:, None, None]
    # The maximum is a constant shift of the softmax; a large finite minimum keeps empty rows from becoming NaN.
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.where(visible, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("bkgts,bskn->btkgn", weights.astype(value.dtype), value)
    return out.reshape(B, T, H, N).astype(query.dtype)


def choose_implementation(requested: str, *, head_dim: int, dtype: Any, softcap: float | None) -> str:
    """Resolves "auto": the library's flash form where the device has one for these heads, else the blocked form."""
    if requested != "auto":
        return requested
    platform = jax.default_backend()
    if platform == "cpu":
        return "blocked"
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    reason = unsupported_reason(
        platform, head_dim=head_dim, dtype=dtype, softcap=softcap, compute_capability=capability
    )
    return "flash" if reason is None else "blocked"


def self_attention(
    query: Float[Array, "B T H N"],
    key: Float[Array, "B T K N"],
    value: Float[Array, "B T K N"],
    *,
    segment_ids: Int[Array, "B T"],
    prefix_ids: Int[Array, "B T"] | None = None,
    window: Window,
    window_choices: tuple[int | None, ...],
    scale: float,
    softcap: float | None,
    implementation: str,
) -> Float[Array, "B T H N"]:
    """Causal attention of a row to itself, within segments.

    Args:
        query: [B, T, H, N].
        key: [B, T, K, N].
        value: [B, T, K, N].
        segment_ids: the document of each token, 0 for padding (padding gives zeros).
        prefix_ids: a second segment that each token sees, 0 for none; None where no token has one.
        window: tokens a query sees; None for all; a traced scalar where layers are scanned.
        window_choices: the distinct windows of the model, of which a traced `window` is one.
        scale: factor on query-key products.
        softcap: bound on scaled products, or None.
        implementation: "dot_product", "blocked" or "flash", which knows no prefixes.
    """
    assert prefix_ids is None or implementation != "flash", implementation
    if implementation == "dot_product":
        mask = causal_mask(segment_ids, window, prefix_ids)
        return dot_product_attention(query, key, value, mask, scale=scale, softcap=softcap)
    if implementation == "blocked":
        return blocked_attention(
            query,
            key,
            value,
            segment_ids_BT=segment_ids,
            prefix_ids_BT=prefix_ids,
            window=window,
            scale=scale,
            softcap=softcap,
            block_size=None,
        )
    if isinstance(window, jax.Array):
        # The library's kernels want a static window, so each distinct one is its own branch.
        sizes = jnp.array([FULL_WINDOW if choice is None else choice for choice in window_choices])
        branches = [
            lambda q, k, v, s, choice=choice: flash_attention(
                q, k, v, segment_ids_BT=s, window=choice, scale=scale, softcap=softcap, block_size=None
            )
            for choice in window_choices
        ]
        return jax.lax.switch(jnp.argmax(sizes == window), branches, query, key, value, segment_ids)
    return flash_attention(
        query, key, value, segment_ids_BT=segment_ids, window=window, scale=scale, softcap=softcap, block_size=None
    )
