"""A checksum of parameters, computed where they lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from models.functional import Params
from models.parameters import flatten


def checksum(params: Params) -> int:
    """A 32-bit checksum over the bits of all parameters, their places included; the same on every mesh."""
    return int(_checksum({"/".join(path): leaf for path, leaf in flatten(params)}))


@jax.jit
def _checksum(leaves: dict[str, jax.Array]) -> UInt32[Array, ""]:
    total = jnp.uint32(2166136261)
    for name in sorted(leaves):
        leaf = leaves[name]
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        # An odd factor for each place, so that swapped values and swapped layers change the sum.
        place = jnp.uint32(1)
        for axis in range(leaf.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(31) + index * jnp.uint32(2654435761)
        total = total * jnp.uint32(16777619) + (bits * (place * 2 + 1)).sum(dtype=jnp.uint32)
    return total
