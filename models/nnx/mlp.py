"""The feed-forward block."""

import jax
from flax import nnx

from models.config import TransformerConfig
from models.context import named_key
from models.lora import adapted_specs
from models.nnx.norm import Norm
from models.nnx.projection import Projection
from models.ops.linear import ACTIVATIONS, dropout, gated
from models.parameters import mlp_names, mlp_specs
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class MLP(nnx.Module):
    """act(x W_0) * (x W_1) W_o, or act(x W) W_o without a gate (Shazeer 2020)."""

    def __init__(
        self, config: TransformerConfig, options: ModelSection, *, adapters: LoraSection | None, rngs: nnx.Rngs
    ) -> None:
        self.config, self.options = config, options
        specs = adapted_specs(mlp_specs(config), adapters, "mlp")
        if "mlp_layer_norm" in specs:
            self.mlp_layer_norm = Norm(specs["mlp_layer_norm"], config, options=options, rngs=rngs)
        for name in (*mlp_names(config), "wo"):
            projection = Projection(
                specs[name],
                name=name,
                num_contract=1,
                quantization=options.quantization,
                options=options,
                adapters=adapters,
                rngs=rngs,
            )
            setattr(self, name, projection)

    def __call__(self, x: jax.Array, noise_key: jax.Array | None) -> jax.Array:
        """x [B, T, D] to [B, T, D]."""
        if self.config.family == "gpt3":
            x = self.mlp_layer_norm(x)
        gate, *linear = [getattr(self, name)(x, noise_key) for name in mlp_names(self.config)]
        activation = self.config.activation
        hidden = gated(activation, gate, *linear) if linear else ACTIVATIONS[activation](gate)
        hidden = constrain(hidden, "batch", "time", "activation_mlp")
        hidden_key = named_key(noise_key, "hidden_dropout")
        hidden = dropout(hidden, hidden_key, rate=self.options.dropout_rate, broadcast_time=True)
        return self.wo(hidden, noise_key)
