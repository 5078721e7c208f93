"""Normalisation with learned scale."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.config import TransformerConfig
from models.ops.norms import layer_norm, rms_norm
from models.parameters import ParamSpec
from recipes.schema import ModelSection


class Norm(nn.Module):
    """RMS norm, or layer norm where a bias is specified."""

    scale_spec: ParamSpec
    bias_spec: ParamSpec | None
    config: TransformerConfig
    options: ModelSection

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises over the last axis."""
        dtype = jnp.dtype(self.options.param_dtype)
        eps, plus_one = self.config.norm_eps, self.config.norm_scale_plus_one
        scale = self.param("scale", self.scale_spec.initialize, dtype)
        if self.bias_spec is None:
            return rms_norm(x, scale, eps=eps, plus_one=plus_one)
        bias = self.param("bias", self.bias_spec.initialize, dtype)
        return layer_norm(x, scale, bias, eps=eps, plus_one=plus_one)
