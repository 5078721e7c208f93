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
        place = jnp.uint32(1)
        for axis in range(leaf.ndim):
            place = _mixed(place + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis))
        # Mixed with its place before it is summed, and not merely weighed by it: a weighted sum does not see the sign
        # bits of an even number of values, nor values that swap places on a diagonal.
        total = total * jnp.uint32(16777619) + _mixed(bits ^ place).sum(dtype=jnp.uint32)
    return total


def _mixed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32 bits in which each bit of the result depends on all (the finish of xxHash32)."""
    x = (x ^ (x >> 15)) * jnp.uint32(2246822519)
    x = (x ^ (x >> 13)) * jnp.uint32(3266489917)
    return x ^ (x >> 16)
