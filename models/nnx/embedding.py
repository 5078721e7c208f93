"""Token and position tables."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.parameters import SpecTree
from recipes.schema import ModelSection


class Embedding(nnx.Module):
    """A table looked up by integer."""

    def __init__(self, specs: SpecTree, *, options: ModelSection, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(specs["embedding"].initialize(rngs.params(), jnp.dtype(options.param_dtype)))
        self.compute_dtype = jnp.dtype(options.compute_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of the table in the compute dtype, [*ids.shape, D]."""
        return self.embedding[...][ids].astype(self.compute_dtype)
