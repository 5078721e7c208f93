"""Decoder layers, and their stack: scanned or unrolled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.attend import NewEntries
from models.config import TransformerConfig
from models.context import LayerInput, StepContext, layer_input, layer_inputs, layer_noise_key, named_key
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


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP with residual sums; Gemma 2 normalises both outputs as well."""

    def __init__(
        self, config: TransformerConfig, options: ModelSection, *, static_window: int | None, rngs: nnx.Rngs
    ) -> None:
        self.config, self.options = config, options
        names = layer_norm_names(config)
        for name in (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp):
            if name is not None:
                setattr(self, name, Norm(norm_specs(config), config, options=options, rngs=rngs))
        self.self_attention = Attention(config, options, static_window=static_window, rngs=rngs)
        self.mlp = MLP(config, options, rngs=rngs)

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        return x if name is None else getattr(self, name)(x)

    def __call__(self, x: jax.Array, context: StepContext, layer: LayerInput) -> tuple[jax.Array, NewEntries]:
        """x [B, T, D] to [B, T, D], and what the cache is to take up."""
        names = layer_norm_names(self.config)
        x = checkpoint_name(constrain(x, "batch", "time", "activation_embed"), LAYER_INPUT)
        noise_key = layer_noise_key(context, layer)
        mixed, cached = self.self_attention(self._norm(names.before_attention, x), context, layer)
        x = x + self._norm(names.after_attention, mixed)
        x = x + self._norm(names.after_mlp, self.mlp(self._norm(names.before_mlp, x), noise_key))
        output_key = named_key(noise_key, "output_dropout")
        return dropout(x, output_key, rate=self.options.dropout_rate, broadcast_time=True), cached


class Decoder(nnx.Module):
    """Positions, layers, the last norm, and the untied output head."""

    def __init__(self, config: TransformerConfig, options: ModelSection, *, rngs: nnx.Rngs) -> None:
        self.config, self.options = config, options
        if config.position == "learned":
            self.position_embedder = Embedding(position_specs(config), options=options, rngs=rngs)
        windows = config.layer_windows()
        if options.scan_layers:
            self.layers = self._stacked_layer(windows[0], rngs)
        else:
            self.layers = nnx.List(
                [DecoderLayer(config, options, static_window=window, rngs=rngs) for window in windows]
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
                rngs=rngs,
            )

    def _stacked_layer(self, static_window: int | None, rngs: nnx.Rngs) -> DecoderLayer:
        """One layer whose parameters carry an axis over all layers."""
        config, options = self.config, self.options

        def create(key: jax.Array) -> DecoderLayer:
            return DecoderLayer(config, options, static_window=static_window, rngs=nnx.Rngs(params=key))

        graphdef, single = nnx.split(nnx.eval_shape(create, jax.random.key(0)))
        axes = jax.tree.map(lambda leaf: min(options.param_scan_axis, leaf.ndim), single)
        keys = jax.random.split(rngs.params(), config.num_layers)
        return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(create(key)), out_axes=axes)(keys))

    def __call__(
        self, x: jax.Array, positions: jax.Array, context: StepContext
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Embedded tokens [B, T, D] to normalised hidden states, and the new keys and values [L, B, T, K, N]."""
        if self.config.position == "learned":
            x = x + self.position_embedder(positions)
        x, cached = self._scanned(x, context) if self.options.scan_layers else self._unrolled(x, context)
        return self.decoder_norm(x), cached

    def _remat(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        if self.options.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=remat_policy(self.options.remat), prevent_cse=not self.options.scan_layers)

    def _scanned(self, x: jax.Array, context: StepContext) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        graphdef, stacked = nnx.split(self.layers)
        axis = self.options.param_scan_axis
        leading = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, min(axis, leaf.ndim - 1), 0), stacked)

        def body(x: jax.Array, scanned: tuple[nnx.State, LayerInput]) -> tuple[jax.Array, NewEntries]:
            state, layer = scanned
            return nnx.merge(graphdef, state)(x, context, layer)

        return jax.lax.scan(self._remat(body), x, (leading, layer_inputs(self.config)))

    def _unrolled(self, x: jax.Array, context: StepContext) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        caches = []
        for index, module in enumerate(self.layers):
            x, cached = self._remat(module)(x, context, layer_input(index))
            caches.append(cached)
        return x, None if context.cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
