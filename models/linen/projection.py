"""A projection: the module owns the kernel and multiplies with it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.lora import adapted_project
from models.parameters import ParamSpec
from models.quantize import dot_general_for
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class Projection(nn.Module):
    """Contracts the last `num_contract` axes of its input with the kernel."""

    specs: Mapping[str, ParamSpec]
    num_contract: int
    quantization: str
    options: ModelSection
    adapters: LoraSection | None

    @nn.compact
    def __call__(self, x: jax.Array, noise_key: jax.Array | None) -> jax.Array:
        """Projects x; see `models.lora.adapted_project`, and `models.quantize.dot_general_for` for the key."""
        dtype = jnp.dtype(self.options.param_dtype)
        return adapted_project(
            x,
            {leaf: self.param(leaf, spec.initialize, dtype) for leaf, spec in self.specs.items()},
            num_contract=self.num_contract,
            dot_general=dot_general_for(self.quantization, key=noise_key, name=self.name),
            adapters=self.adapters,
        )
