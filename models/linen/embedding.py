"""Token and position tables."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.parameters import ParamSpec
from recipes.schema import ModelSection


class Embedding(nn.Module):
    """A table looked up by integer."""

    spec: ParamSpec
    options: ModelSection

    def setup(self) -> None:
        """Declares the table."""
        self.embedding = self.param("embedding", self.spec.initialize, jnp.dtype(self.options.param_dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of the table in the compute dtype, [*ids.shape, D]."""
        return self.embedding[ids].astype(jnp.dtype(self.options.compute_dtype))
