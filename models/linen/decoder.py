"""Decoder layers, and their stack: scanned or unrolled."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from models.config import TransformerConfig
from models.context import LayerInput, StepContext, layer_input, layer_inputs, layer_noise_key, named_key
from models.inference.cache import KVCache
from models.linen.attention import Attention
from models.linen.embedding import Embedding
from models.linen.mlp import MLP
from models.linen.norm import Norm
from models.ops.linear import dropout
from models.parameters import head_specs, layer_norm_names, norm_specs, position_specs
from models.remat import LAYER_INPUT, remat_policy
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection

Carry = tuple[jax.Array, KVCache | None]
"""Activations [B, T, D] and the cache of all layers, which each layer writes its part of."""


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residual sums; Gemma 2 normalises both outputs as well."""

    config: TransformerConfig
    options: ModelSection
    static_window: int | None
    adapters: LoraSection | None = None

    def _norm(self, name: str | None, x: jax.Array) -> jax.Array:
        if name is None:
            return x
        specs = norm_specs(self.config)
        return Norm(specs["scale"], specs.get("bias"), self.config, self.options, name=name)(x)

    @nn.compact
    def __call__(self, carry: Carry, context: StepContext, layer: LayerInput) -> tuple[Carry, None]:
        """x [B, T, D] to [B, T, D], and the cache with x in this layer."""
        x, cache = carry
        names = layer_norm_names(self.config)
        x = checkpoint_name(constrain(x, "batch", "time", "activation_embed"), LAYER_INPUT)
        noise_key = layer_noise_key(context, layer)
        attention = Attention(self.config, self.options, self.static_window, self.adapters, name="self_attention")
        mixed, cache = attention(self._norm(names.before_attention, x), context, layer, cache)
        x = x + self._norm(names.after_attention, mixed)
        mlp = MLP(self.config, self.options, self.adapters, name="mlp")
        x = x + self._norm(names.after_mlp, mlp(self._norm(names.before_mlp, x), noise_key))
        output_key = named_key(noise_key, "output_dropout")
        x = dropout(x, output_key, rate=self.options.dropout_rate, broadcast_time=True)
        return (x, cache), None


class Decoder(nn.Module):
    """Positions, layers, the last norm, and the untied output head."""

    config: TransformerConfig
    options: ModelSection
    adapters: LoraSection | None = None

    def setup(self) -> None:
        """Declares the submodules."""
        config, options = self.config, self.options
        if config.position == "learned":
            self.position_embedder = Embedding(position_specs(config)["embedding"], options)
        layer_class = DecoderLayer
        if options.remat != "none":
            layer_class = nn.remat(
                DecoderLayer, policy=remat_policy(options.remat), prevent_cse=not options.scan_layers
            )
        windows = config.layer_windows()
        if options.scan_layers:
            scanned = nn.scan(
                layer_class,
                variable_axes={"params": options.param_scan_axis},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=config.num_layers,
            )
            self.layers = scanned(config, options, windows[0], self.adapters)
        else:
            # A list attribute named `layers` gives the children the names layers_0, layers_1, ...
            self.layers = [layer_class(config, options, window, self.adapters) for window in windows]
        specs = norm_specs(config)
        self.decoder_norm = Norm(specs["scale"], specs.get("bias"), config, options)
        if not config.tied_embeddings:
            self.logits_dense = Head(config, options)

    def __call__(self, x: jax.Array, positions: jax.Array, context: StepContext, cache: KVCache | None) -> Carry:
        """Embedded tokens [B, T, D] to normalised hidden states, and the cache with the new tokens."""
        if self.config.position == "learned":
            x = x + self.position_embedder(positions)
        if self.options.scan_layers:
            (x, cache), _ = self.layers((x, cache), context, layer_inputs(self.config))
        else:
            for index, module in enumerate(self.layers):
                (x, cache), _ = module((x, cache), context, layer_input(index))
        return self.decoder_norm(x), cache


class Head(nn.Module):
    """Owns the untied output head's kernel [D, V]; `Transformer.logits` multiplies with it."""

    config: TransformerConfig
    options: ModelSection

    def setup(self) -> None:
        """Declares the kernel."""
        spec = head_specs(self.config)["kernel"]
        self.kernel = self.param("kernel", spec.initialize, jnp.dtype(self.options.param_dtype))
