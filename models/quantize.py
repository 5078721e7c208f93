"""Quantised matmuls for training, behind the signature of `jax.lax.dot_general`.

Every decoder layer's projections multiply with what `dot_general_for` gives them. Both modes quantise dynamically, from
the very values at hand, and keep nothing between steps: parameters stay in full precision, there is no collection to
save, and a resumed run needs nothing of them.

int8 is AQT's, with one scale for each contraction (a token's activations, an output channel's weights, a token's or a
channel's gradients): s = max|x| / 127 and q = round(x / s), then s8 x s8 -> s32 and two factors. Gradients are rounded
stochastically, so that a quantised gradient is right on average; all else is rounded to nearest, gradients too where no
key is given.

fp8 is e4m3 for activations and weights and e5m2 for gradients (Micikevicius et al. 2022), with one scale for each
tensor: s = max|x| / (largest number of the format), saturated, products summed in float32. Scaling is current where the
usual recipe delays it: a history of maxima would be state beside the parameters, to be saved, restored and kept from
the optimizer, and one step's outlier would overflow the scale of the steps before it.
"""

import functools
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from aqt.jax.v2 import aqt_dot_general, stochastic_rounding, utils
from aqt.jax.v2.numerics.utils import get_numerics
from jaxtyping import Array, Float, PRNGKeyArray

from models.ops.linear import DotGeneral
from models.parameters import param_key

Dims = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
"""`jax.lax.dot_general`'s dimension numbers."""

MAX_INT8_SUM = (2**31 - 1) // 127**2
"""The most products of two int8 numbers whose sum always fits an int32."""


def dot_general_for(quantization: str, *, key: PRNGKeyArray | None, name: str) -> DotGeneral:
    """The `dot_general` of a projection under the recipe's `model.quantization`.

    Args:
        quantization: none, int8 or fp8.
        key: the layer's key for the stochastic rounding of int8's gradients; None rounds them to nearest.
        name: of the projection, so that those of one layer draw different noise.

    Returns:
        A function of lhs, rhs and dimension numbers that contract lhs's last axes with rhs's first, without batch axes.
    """
    if quantization == "none":
        return jax.lax.dot_general
    if quantization == "fp8":
        return functools.partial(_dot_general, _fp8)
    assert quantization == "int8", quantization
    noise_key = None if key is None else param_key(key, (name,))
    return functools.partial(_dot_general, functools.partial(_int8, noise_key))


def _dot_general(
    product: DotGeneral,
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: Dims,
    precision: None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Checks what callers of `jax.lax.dot_general` may ask for, and converts the result as they ask."""
    (lhs_axes, rhs_axes), batch_axes = dimension_numbers
    count = len(lhs_axes)
    assert precision is None, precision
    assert lhs.dtype == rhs.dtype, (lhs.dtype, rhs.dtype)
    assert tuple(map(tuple, batch_axes)) == ((), ()), batch_axes
    assert tuple(lhs_axes) == tuple(range(lhs.ndim - count, lhs.ndim)), (lhs.shape, lhs_axes)
    assert tuple(rhs_axes) == tuple(range(count)), (rhs.shape, rhs_axes)
    out = product(lhs, rhs, count)
    return out if preferred_element_type is None else out.astype(preferred_element_type)


def _forward_dims(lhs: jax.Array, count: int) -> Dims:
    return (tuple(range(lhs.ndim - count, lhs.ndim)), tuple(range(count))), ((), ())


def _dlhs_dims(grad: jax.Array, rhs: jax.Array, count: int) -> Dims:
    """Of grad times rhs: the output's axes are contracted, and what is left is in lhs's order."""
    outputs = rhs.ndim - count
    return (tuple(range(grad.ndim - outputs, grad.ndim)), tuple(range(count, rhs.ndim))), ((), ())


def _drhs_dims(lhs: jax.Array, count: int) -> Dims:
    """Of lhs times grad: the axes before lhs's contracted ones are contracted, and what is left is in rhs's order."""
    tokens = tuple(range(lhs.ndim - count))
    return (tokens, tokens), ((), ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _int8(key: PRNGKeyArray | None, lhs: jax.Array, rhs: jax.Array, count: int) -> jax.Array:
    return _int8_forward(key, lhs, rhs, count)[0]


_Int8Residuals = tuple[PRNGKeyArray | None, jax.Array, jax.Array]


def _int8_forward(
    key: PRNGKeyArray | None, lhs: jax.Array, rhs: jax.Array, count: int
) -> tuple[jax.Array, _Int8Residuals]:
    out = int8_product(lhs, rhs, _forward_dims(lhs, count), blocks=1, lhs_key=None, rhs_key=None)
    return out.astype(lhs.dtype), (key, lhs, rhs)


def _int8_backward(count: int, residuals: _Int8Residuals, grad: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    key, lhs, rhs = residuals
    dlhs_key, drhs_key = (None, None) if key is None else tuple(jax.random.split(key))
    dlhs = int8_product(grad, rhs, _dlhs_dims(grad, rhs, count), blocks=1, lhs_key=dlhs_key, rhs_key=None)
    blocks = token_blocks(lhs.shape[: lhs.ndim - count])
    drhs = int8_product(lhs, grad, _drhs_dims(lhs, count), blocks=blocks, lhs_key=None, rhs_key=drhs_key)
    return None, dlhs.astype(lhs.dtype), drhs.astype(rhs.dtype)


_int8.defvjp(_int8_forward, _int8_backward)


def token_blocks(tokens: tuple[int, ...]) -> int:
    """How many blocks of rows a weight gradient is summed in: as few as keep an int32 from overflowing.

    Blocks have scales of their own, so their number could follow the number of devices; following the shape alone it
    leaves the numbers the same on any mesh.

    Args:
        tokens: the axes that the weight gradient contracts, rows first.

    Raises:
        ValueError: if one row alone can overflow.
    """
    rows, length = tokens[0], prod(tokens[1:])
    if length > MAX_INT8_SUM:
        raise ValueError(
            f"model.quantization=int8: a row has {length} tokens: a weight gradient sums over them, and an int32 holds "
            f"{MAX_INT8_SUM} products of int8; lower data.sequence_length or use fp8"
        )
    return next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count * length <= MAX_INT8_SUM)


def int8_product(
    lhs: Float[Array, "..."],
    rhs: Float[Array, "..."],
    dimension_numbers: Dims,
    *,
    blocks: int,
    lhs_key: PRNGKeyArray | None,
    rhs_key: PRNGKeyArray | None,
) -> Float[Array, "..."]:
    """The product of two arrays rounded to int8, with a scale for each contraction; has no gradient of its own.

    Args:
        lhs: any float array.
        rhs: any float array.
        dimension_numbers: what to contract; no batch axes.
        blocks: parts of the first contracted axis that are quantised and multiplied each for itself.
        lhs_key: rounds lhs stochastically; None rounds to nearest.
        rhs_key: the same for rhs.

    Returns:
        The dequantised product in float32.
    """
    local = None if blocks == 1 else aqt_dot_general.LocalAqt(contraction_axis_shard_count=blocks)
    product = aqt_dot_general.dot_general_raw_make(8, 8, local_aqt=local)
    for quantizer, key in ((product.dg_quantizer.lhs, lhs_key), (product.dg_quantizer.rhs, rhs_key)):
        # The largest magnitude becomes 127, where AQT's default makes it 127.5 and so bends integers.
        quantizer.numerics = get_numerics(8, preserve_max_val=True)
        if key is not None:
            quantizer.numerics.noise_fn = stochastic_rounding.JaxUniform()
        quantizer.context = utils.Context(key=key, train_step=None)
    # In bfloat16 the numbers from 64 to 127 have no more than halves between them, too coarse for the noise to act on.
    lhs, rhs = jnp.asarray(lhs, jnp.float32), jnp.asarray(rhs, jnp.float32)
    out, _ = product(lhs, rhs, None, None, dimension_numbers)
    return out


class Scaled(NamedTuple):
    """A tensor as fp8 numbers times one scale."""

    values: jax.Array
    scale: Float[Array, ""]


def to_fp8(x: Float[Array, "..."], dtype: jax.typing.DTypeLike) -> Scaled:
    """Scales x so that its largest magnitude is the format's largest number, and rounds.

    A tensor of zeros, or of numbers too small to divide by, has the scale 1. Where x isn't finite nothing that comes of
    it is, so that a guard downstream still sees it.

    Args:
        x: any float array.
        dtype: of fp8.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x)) / _largest(dtype)
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    return Scaled(saturate(x / scale, dtype), scale)


def saturate(x: Float[Array, "..."], dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """Casts to fp8 with what lies beyond the largest number clipped to it; e4m3 has no infinity and would give NaN."""
    return jnp.clip(x, -_largest(dtype), _largest(dtype)).astype(dtype)


def _largest(dtype: jax.typing.DTypeLike) -> float:
    return float(jnp.finfo(dtype).max)


def _fp8_product(lhs: Scaled, rhs: Scaled, dimension_numbers: Dims) -> jax.Array:
    out = jax.lax.dot_general(lhs.values, rhs.values, dimension_numbers, preferred_element_type=jnp.float32)
    return out * (lhs.scale * rhs.scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fp8(lhs: jax.Array, rhs: jax.Array, count: int) -> jax.Array:
    return _fp8_forward(lhs, rhs, count)[0]


def _fp8_forward(lhs: jax.Array, rhs: jax.Array, count: int) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    # One scale serves every contraction of a tensor, so the backward pass keeps the fp8 numbers, not the inputs.
    quantized = to_fp8(lhs, jnp.float8_e4m3fn), to_fp8(rhs, jnp.float8_e4m3fn)
    return _fp8_product(*quantized, _forward_dims(lhs, count)).astype(lhs.dtype), quantized


def _fp8_backward(count: int, residuals: tuple[Scaled, Scaled], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    lhs, rhs = residuals
    scaled = to_fp8(grad, jnp.float8_e5m2)
    dlhs = _fp8_product(scaled, rhs, _dlhs_dims(grad, rhs.values, count))
    drhs = _fp8_product(lhs, scaled, _drhs_dims(lhs.values, count))
    return dlhs.astype(grad.dtype), drhs.astype(grad.dtype)


_fp8.defvjp(_fp8_forward, _fp8_backward)
