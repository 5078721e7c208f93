"""From projected heads to mixed values: rotation, the cache, and the choice of attention; shared by Linen and NNX."""

import jax
from jaxtyping import Array, Float

from models.config import TransformerConfig
from models.context import LayerInput, StepContext, window_choices
from models.inference.attention import cached_attention
from models.inference.cache import KVCache, write_layer
from models.ops.attention import choose_implementation, dot_product_attention, self_attention
from models.ops.rotary import rotate

Heads = Float[Array, "B T H N"]


def serves_prefixes(config: TransformerConfig, implementation: str, dtype: str) -> bool:
    """Whether a token may see a second segment: fused kernels know none, and a window counts the cells of a row.

    Args:
        config: the architecture.
        implementation: of attention, as a recipe names it.
        dtype: of queries.
    """
    chosen = choose_implementation(
        implementation, head_dim=config.head_dim, dtype=dtype, softcap=config.attention_softcap
    )
    return chosen != "flash" and all(window is None for window in config.layer_windows())


def attend(
    config: TransformerConfig,
    context: StepContext,
    layer: LayerInput,
    cache: KVCache | None,
    query: Heads,
    key: Heads,
    value: Heads,
    *,
    static_window: int | None,
    implementation: str,
) -> tuple[Heads, KVCache | None]:
    """Rotates queries and keys and mixes values.

    Args:
        config: the architecture.
        context: rotary tables and masks of this pass.
        layer: this layer's index and traced window.
        cache: what earlier tokens left in all layers, or None.
        query: [B, T, H, N], before rotation.
        key: [B, T, K, N], before rotation.
        value: [B, T, K, N].
        static_window: the layer's window where it isn't traced, in tokens.
        implementation: of attention, as a recipe names it.

    Returns:
        The mixed values [B, T, H, N], and the cache with the new tokens in this layer; its lengths stay.
    """
    if context.cos is not None and context.sin is not None:
        query = rotate(query, context.cos, context.sin)
        key = rotate(key, context.cos, context.sin)
    window = static_window if layer.window is None else layer.window
    scale, softcap = config.attention_scale, config.attention_softcap
    if cache is None:
        if context.attention_mask is not None:
            mixed = dot_product_attention(query, key, value, context.attention_mask, scale=scale, softcap=softcap)
            return mixed, None
        mixed = self_attention(
            query,
            key,
            value,
            segment_ids=context.segment_ids,
            prefix_ids=context.prefix_ids,
            window=window,
            window_choices=window_choices(config),
            scale=scale,
            softcap=softcap,
            implementation=choose_implementation(
                implementation, head_dim=config.head_dim, dtype=query.dtype, softcap=softcap
            ),
        )
        return mixed, None
    cache = write_layer(cache, key, value, layer.index)
    if context.attention_mask is None:
        mixed = cached_attention(query, cache, layer.index, window=window, scale=scale, softcap=softcap)
        return mixed, cache
    keys, values = (
        jax.lax.dynamic_index_in_dim(whole, layer.index, keepdims=False).astype(query.dtype)
        for whole in (cache.key, cache.value)
    )
    mixed = dot_product_attention(query, keys, values, context.attention_mask, scale=scale, softcap=softcap)
    return mixed, cache
