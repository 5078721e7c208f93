"""Normalisation with learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import TransformerConfig
from models.ops.norms import layer_norm, rms_norm
from models.parameters import SpecTree
from recipes.schema import ModelSection


class Norm(nnx.Module):
    """RMS norm, or layer norm where the specs list a bias."""

    def __init__(self, specs: SpecTree, config: TransformerConfig, *, options: ModelSection, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(options.param_dtype)
        self.scale = nnx.Param(specs["scale"].initialize(rngs.params(), dtype))
        self.bias = nnx.Param(specs["bias"].initialize(rngs.params(), dtype)) if "bias" in specs else None
        self.eps = config.norm_eps
        self.plus_one = config.norm_scale_plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises over the last axis."""
        if self.bias is None:
            return rms_norm(x, self.scale[...], eps=self.eps, plus_one=self.plus_one)
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps, plus_one=self.plus_one)
