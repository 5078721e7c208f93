"""A projection: the module owns the kernel and multiplies with it."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from models.ops.linear import project
from models.parameters import ParamSpec
from models.quantize import dot_general_for
from recipes.schema import ModelSection


class Projection(nn.Module):
    """Contracts the last `num_contract` axes of its input with the kernel."""

    kernel_spec: ParamSpec
    bias_spec: ParamSpec | None
    num_contract: int
    quantization: str
    options: ModelSection

    @nn.compact
    def __call__(self, x: jax.Array, noise_key: jax.Array | None) -> jax.Array:
        """Projects x; see `models.ops.linear.project`, and `models.quantize.dot_general_for` for the key."""
        dtype = jnp.dtype(self.options.param_dtype)
        return project(
            x,
            self.param("kernel", self.kernel_spec.initialize, dtype),
            None if self.bias_spec is None else self.param("bias", self.bias_spec.initialize, dtype),
            num_contract=self.num_contract,
            dot_general=dot_general_for(self.quantization, key=noise_key, name=self.name),
        )
