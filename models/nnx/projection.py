"""A projection: the module owns the kernel and multiplies with it."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.lora import adapted_project
from models.parameters import SpecTree
from models.quantize import dot_general_for
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class Projection(nnx.Module):
    """Contracts the last `num_contract` axes of its input with the kernel."""

    def __init__(
        self,
        specs: SpecTree,
        *,
        name: str,
        num_contract: int,
        quantization: str,
        options: ModelSection,
        adapters: LoraSection | None,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(options.param_dtype)
        for leaf, spec in specs.items():
            setattr(self, leaf, nnx.Param(spec.initialize(rngs.params(), dtype)))
        self.leaves, self.adapters = tuple(specs), adapters
        self.name, self.num_contract, self.quantization = name, num_contract, quantization

    def __call__(self, x: jax.Array, noise_key: jax.Array | None) -> jax.Array:
        """Projects x; see `models.lora.adapted_project`, and `models.quantize.dot_general_for` for the key."""
        return adapted_project(
            x,
            {leaf: getattr(self, leaf)[...] for leaf in self.leaves},
            num_contract=self.num_contract,
            dot_general=dot_general_for(self.quantization, key=noise_key, name=self.name),
            adapters=self.adapters,
        )
