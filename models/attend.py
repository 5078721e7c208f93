"""From projected heads to mixed values: rotation, the cache, and the choice of attention; shared by Linen and NNX."""

import jax
from jaxtyping import Array, Float

from models.config import TransformerConfig
from models.context import LayerInput, StepContext, window_choices
from models.inference.cache import write_layer
from models.ops.attention import choose_implementation, dot_product_attention, self_attention
from models.ops.masks import cache_mask
from models.ops.rotary import rotate

Heads = Float[Array, "B T H N"]
CachedLayer = tuple[jax.Array, jax.Array] | None


def attend(
    config: TransformerConfig,
    context: StepContext,
    layer: LayerInput,
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    static_window: int | None,
    implementation: str,
) -> tuple[Heads, CachedLayer]:
    """Rotates queries and keys and mixes values.

    Args:
        config: the architecture.
        context: rotary tables, masks and cache lengths of this pass.
        layer: this layer's traced window and cache.
        query: [B, T, H, N], before rotation.
        key: [B, T, K, N], before rotation.
        value: [B, T, K, N].
        static_window: the layer's window where it isn't traced, in tokens.
        implementation: of attention, as a recipe names it.

    Returns:
        The mixed values [B, T, H, N], and the layer's new cache, or None without one.
    """
    if context.cos is not None and context.sin is not None:
        query = rotate(query, context.cos, context.sin)
        key = rotate(key, context.cos, context.sin)
    window = static_window if layer.window is None else layer.window
    scale, softcap = config.attention_scale, config.attention_softcap
    if layer.cached_key is None or layer.cached_value is None or context.cache_lengths is None:
        if context.attention_mask is not None:
            mixed = dot_product_attention(query, key, value, context.attention_mask, scale=scale, softcap=softcap)
            return mixed, None
        mixed = self_attention(
            query,
            key,
            value,
            segment_ids=context.segment_ids,
            window=window,
            window_choices=window_choices(config),
            scale=scale,
            softcap=softcap,
            implementation=choose_implementation(
                implementation, head_dim=config.head_dim, dtype=query.dtype, softcap=softcap
            ),
        )
        return mixed, None
    keys = write_layer(layer.cached_key, key, context.cache_lengths)
    values = write_layer(layer.cached_value, value, context.cache_lengths)
    mask = context.attention_mask
    if mask is None:
        mask = cache_mask(context.cache_lengths, query.shape[1], keys.shape[1], window)
    mixed = dot_product_attention(
        query, keys.astype(query.dtype), values.astype(query.dtype), mask, scale=scale, softcap=softcap
    )
    return mixed, (keys, values)
