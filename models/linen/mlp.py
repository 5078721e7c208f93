"""The feed-forward block."""

import jax
from flax import linen as nn

from models.config import TransformerConfig
from models.context import named_key
from models.linen.norm import Norm
from models.linen.projection import Projection
from models.lora import adapted_specs
from models.ops.linear import ACTIVATIONS, dropout, gated
from models.parameters import mlp_names, mlp_specs
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class MLP(nn.Module):
    """act(x W_0) * (x W_1) W_o, or act(x W) W_o without a gate (Shazeer 2020)."""

    config: TransformerConfig
    options: ModelSection
    adapters: LoraSection | None = None

    @nn.compact
    def __call__(self, x: jax.Array, noise_key: jax.Array | None) -> jax.Array:
        """x [B, T, D] to [B, T, D]."""
        specs = adapted_specs(mlp_specs(self.config), self.adapters, "mlp")

        def projection(name: str) -> Projection:
            return Projection(specs[name], 1, self.options.quantization, self.options, self.adapters, name=name)

        if "mlp_layer_norm" in specs:
            norm = specs["mlp_layer_norm"]
            x = Norm(norm["scale"], norm.get("bias"), self.config, self.options, name="mlp_layer_norm")(x)
        gate, *linear = [projection(name)(x, noise_key) for name in mlp_names(self.config)]
        activation = self.config.activation
        hidden = gated(activation, gate, *linear) if linear else ACTIVATIONS[activation](gate)
        hidden = constrain(hidden, "batch", "time", "activation_mlp")
        hidden_key = named_key(noise_key, "hidden_dropout")
        hidden = dropout(hidden, hidden_key, rate=self.options.dropout_rate, broadcast_time=True)
        return projection("wo")(hidden, noise_key)
