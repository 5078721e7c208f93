"""Self-attention."""

from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.attend import attend
from models.config import TransformerConfig
from models.context import LayerInput, StepContext, layer_noise_key
from models.inference.cache import KVCache
from models.lora import adapted_specs
from models.nnx.norm import Norm
from models.nnx.projection import Projection
from models.parameters import attention_specs
from models.remat import SAVED_PROJECTIONS
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class Attention(nnx.Module):
    """Grouped-query attention with optional fused projection, biases and per-head norms."""

    def __init__(
        self,
        config: TransformerConfig,
        options: ModelSection,
        *,
        static_window: int | None,
        adapters: LoraSection | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.options, self.static_window = config, options, static_window
        specs = adapted_specs(attention_specs(config), adapters, "self_attention")
        make = partial(Projection, quantization=options.quantization, options=options, adapters=adapters, rngs=rngs)

        def projection(name: str, num_contract: int) -> Projection:
            return make(specs[name], name=name, num_contract=num_contract)

        if config.fused_qkv:
            self.qkv_proj = projection("qkv_proj", 1)
        else:
            self.query, self.key, self.value = (projection(name, 1) for name in ("query", "key", "value"))
        self.out = projection("out", 2)
        if config.qk_norm:
            self.query_norm = Norm(specs["query_norm"], config, options=options, rngs=rngs)
            self.key_norm = Norm(specs["key_norm"], config, options=options, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: StepContext, layer: LayerInput, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends within x [B, T, D], or to the cache; returns the output and the cache with x in this layer."""
        noise_key = layer_noise_key(context, layer)
        if self.config.fused_qkv:
            fused = self.qkv_proj(x, noise_key)
            heads = [fused[:, :, i] for i in range(3)]
        else:
            heads = [project(x, noise_key) for project in (self.query, self.key, self.value)]
        query, key, value = (
            checkpoint_name(constrain(head, "batch", "time", "activation_heads", None), name)
            for head, name in zip(heads, SAVED_PROJECTIONS, strict=True)
        )
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed, cache = attend(
            self.config,
            context,
            layer,
            cache,
            query,
            key,
            value,
            static_window=self.static_window,
            implementation=self.options.attention,
        )
        return self.out(mixed, noise_key), cache
