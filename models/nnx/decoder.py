"""Decoder layers, and their stack: scanned or unrolled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.config import TransformerConfig
from models.context import LayerInput, StepContext, layer_input, layer_inputs, layer_noise_key, named_key
from models.inference.cache import KVCache
from models.nnx.attention import Attention
from models.nnx.embedding import Embedding
from models.nnx.mlp import MLP
from models.nnx.norm import Norm
from models.nnx.projection import Projection
from models.ops.linear import dropout
from models.parameters import head_specs, layer_norm_names, norm_specs, position_specs
from models.remat import LAYER_INPUT, remat_policy
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection

Carry = tuple[jax.Array, KVCache | None]
"""Activations [B, T, D] and the cache of all layers, which each layer writes its part of."""


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP with residual sums; Gemma 2 normalises both outputs as well."""

    def __init__(
        self,
        config: TransformerConfig,
        options: ModelSection,
        *,
        static_window: int | None,
        adapters: LoraSection | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.options = config, options
        names = layer_norm_names(config)
        for name in (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp):
            if name is not None:
                setattr(self, name, Norm(norm_specs(config), config, options=options, rngs=rngs))
        self.self_attention = Attention(config, options, static_window=static_window, adapters=adapters, rngs=rngs)
        self.mlp = MLP(config, options, adapters=adapters, rngs=rngs)

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return x if name is None else getattr(self, name)(x)

    def __call__(self, carry: Carry, context: StepContext, layer: LayerInput) -> tuple[Carry, None]:
        """x [B, T, D] to [B, T, D], and the cache with x in this layer."""
        x, cache = carry
        names = layer_norm_names(self.config)
        x = checkpoint_name(constrain(x, "batch", "time", "activation_embed"), LAYER_INPUT)
        noise_key = layer_noise_key(context, layer)
        mixed, cache = self.self_attention(self._norm(names.before_attention, x), context, layer, cache)
        x = x + self._norm(names.after_attention, mixed)
        x = x + self._norm(names.after_mlp, self.mlp(self._norm(names.before_mlp, x), noise_key))
        output_key = named_key(noise_key, "output_dropout")
        x = dropout(x, output_key, rate=self.options.dropout_rate, broadcast_time=True)
        return (x, cache), None


class Decoder(nnx.Module):
    """Positions, layers, the last norm, and the untied output head."""

    def __init__(
        self, config: TransformerConfig, options: ModelSection, *, adapters: LoraSection | None, rngs: nnx.Rngs
    ) -> None:
        self.config, self.options = config, options
        if config.position == "learned":
            self.position_embedder = Embedding(position_specs(config), options=options, rngs=rngs)
        windows = config.layer_windows()
        if options.scan_layers:
            self.layers = self._stacked_layer(windows[0], adapters, rngs)
        else:
            self.layers = nnx.List(
                [
                    DecoderLayer(config, options, static_window=window, adapters=adapters, rngs=rngs)
                    for window in windows
                ]
            )
        self.decoder_norm = Norm(norm_specs(config), config, options=options, rngs=rngs)
        if not config.tied_embeddings:
            # The head stays unquantised, as every recipe of quantised training keeps it.
            self.logits_dense = Projection(
                head_specs(config),
                name="logits_dense",
                num_contract=1,
                quantization="none",
                options=options,
                adapters=None,
                rngs=rngs,
            )

    def _stacked_layer(self, static_window: int | None, adapters: LoraSection | None, rngs: nnx.Rngs) -> DecoderLayer:
        """One layer whose parameters carry an axis over all layers."""
        config, options = self.config, self.options

        def create(key: jax.Array) -> DecoderLayer:
            own = nnx.Rngs(params=key)
            return DecoderLayer(config, options, static_window=static_window, adapters=adapters, rngs=own)

        graphdef, single = nnx.split(nnx.eval_shape(create, jax.random.key(0)))
        axes = jax.tree.map(lambda leaf: min(options.param_scan_axis, leaf.ndim), single)
        keys = jax.random.split(rngs.params(), config.num_layers)
        return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(create(key)), out_axes=axes)(keys))

    def __call__(self, x: jax.Array, positions: jax.Array, context: StepContext, cache: KVCache | None) -> Carry:
        """Embedded tokens [B, T, D] to normalised hidden states, and the cache with the new tokens."""
        if self.config.position == "learned":
            x = x + self.position_embedder(positions)
        run = self._scanned if self.options.scan_layers else self._unrolled
        x, cache = run((x, cache), context)
        return self.decoder_norm(x), cache

    def _remat(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        if self.options.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=remat_policy(self.options.remat), prevent_cse=not self.options.scan_layers)

    def _scanned(self, carry: Carry, context: StepContext) -> Carry:
        graphdef, stacked = nnx.split(self.layers)
        axis = self.options.param_scan_axis
        leading = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, min(axis, leaf.ndim - 1), 0), stacked)

        def body(carry: Carry, scanned: tuple[nnx.State, LayerInput]) -> tuple[Carry, None]:
            state, layer = scanned
            return nnx.merge(graphdef, state)(carry, context, layer)

        return jax.lax.scan(self._remat(body), carry, (leading, layer_inputs(self.config)))[0]

    def _unrolled(self, carry: Carry, context: StepContext) -> Carry:
        for index, module in enumerate(self.layers):
            carry, _ = self._remat(module)(carry, context, layer_input(index))
        return carry
