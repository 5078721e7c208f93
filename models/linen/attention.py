"""Self-attention."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from models.attend import attend
from models.config import TransformerConfig
from models.context import LayerInput, StepContext, layer_noise_key
from models.inference.cache import KVCache
from models.linen.norm import Norm
from models.linen.projection import Projection
from models.lora import adapted_specs
from models.parameters import attention_specs
from models.remat import SAVED_PROJECTIONS
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class Attention(nn.Module):
    """Grouped-query attention with optional fused projection, biases and per-head norms."""

    config: TransformerConfig
    options: ModelSection
    static_window: int | None
    adapters: LoraSection | None = None

    def _projection(self, name: str, num_contract: int) -> Projection:
        specs = adapted_specs(attention_specs(self.config), self.adapters, "self_attention")[name]
        return Projection(specs, num_contract, self.options.quantization, self.options, self.adapters, name=name)

    @nn.compact
    def __call__(
        self, x: jax.Array, context: StepContext, layer: LayerInput, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends within x [B, T, D], or to the cache; returns the output and the cache with x in this layer."""
        noise_key = layer_noise_key(context, layer)
        if self.config.fused_qkv:
            fused = self._projection("qkv_proj", 1)(x, noise_key)
            heads = [fused[:, :, i] for i in range(3)]
        else:
            heads = [self._projection(name, 1)(x, noise_key) for name in ("query", "key", "value")]
        query, key, value = (
            checkpoint_name(constrain(head, "batch", "time", "activation_heads", None), name)
            for head, name in zip(heads, SAVED_PROJECTIONS, strict=True)
        )
        if self.config.qk_norm:
            scale = attention_specs(self.config)["query_norm"]["scale"]
            query = Norm(scale, None, self.config, self.options, name="query_norm")(query)
            key = Norm(scale, None, self.config, self.options, name="key_norm")(key)
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
        return self._projection("out", 2)(mixed, noise_key), cache
