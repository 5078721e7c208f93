"""A projection: the module owns the kernel and multiplies with it."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.ops.linear import project
from models.parameters import SpecTree
from models.quantize import dot_general_for
from recipes.schema import ModelSection


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
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(options.param_dtype)
        self.kernel = nnx.Param(specs["kernel"].initialize(rngs.params(), dtype))
        self.bias = nnx.Param(specs["bias"].initialize(rngs.params(), dtype)) if "bias" in specs else None
        self.name, self.num_contract, self.quantization = name, num_contract, quantization

    def __call__(self, x: jax.Array, noise_key: jax.Array | None) -> jax.Array:
        """Projects x; see `models.ops.linear.project`, and `models.quantize.dot_general_for` for the key."""
        return project(
            x,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            num_contract=self.num_contract,
            dot_general=dot_general_for(self.quantization, key=noise_key, name=self.name),
        )
