"""Kernels that rest in 4 or 8 bits and are made whole where they are multiplied with (QLoRA, arXiv:2305.14314).

Qwix's numbers: nf4 is the table of the paper's appendix E, int8 the integers; either way a tile of inputs shares one
scale for each output, its largest magnitude over the format's. What is stored are plain arrays, so that sharding,
checksums and checkpoints treat them as any parameter:

    kernel_values   int8 in the kernel's shape; nf4 as uint8, two neighbours along the last input axis in each byte
    kernel_scales   float32 [inputs / tile, *outputs], the input axes taken as one
"""

from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float, Int, UInt8

from models.parameters import ParamSpec

Format = Literal["nf4", "int8"]
VALUES, SCALES = "kernel_values", "kernel_scales"


def quantized_specs(
    kernel: ParamSpec, *, num_inputs: int, quantization: Format, tile: int, name: str
) -> dict[str, ParamSpec]:
    """What stands in a layer's tree in place of its kernel.

    Args:
        kernel: [*inputs, *outputs] of one layer.
        num_inputs: number of input axes.
        quantization: the format.
        tile: inputs that share a scale.
        name: of the kernel, for errors.

    Raises:
        ValueError: the tile doesn't divide the inputs, or nf4 cannot pair them.
    """
    inputs = prod(kernel.shape[:num_inputs])
    if inputs % tile:
        raise ValueError(
            f"lora.quantization_tile={tile}: {name} has {inputs} inputs: the tile divides them; choose a divisor"
        )
    last = num_inputs - 1
    shape = list(kernel.shape)
    if quantization == "nf4":
        if shape[last] % 2:
            raise ValueError(
                f"lora.base_quantization=nf4: {name} has {shape[last]} inputs on its last axis of inputs: two "
                "share a byte, so their number is even; use int8"
            )
        shape[last] //= 2
    scales = (inputs // tile, *kernel.shape[num_inputs:])
    dtype = "uint8" if quantization == "nf4" else "int8"
    return {
        VALUES: ParamSpec(tuple(shape), kernel.axes, stddev=0.0, dtype=dtype),
        SCALES: ParamSpec(scales, (kernel.axes[0], *kernel.axes[num_inputs:]), stddev=0.0, fill=1.0, dtype="float32"),
    }


def quantize_kernel(
    kernel: Float[Array, "..."], *, num_inputs: int, quantization: Format, tile: int
) -> dict[str, jax.Array]:
    """A kernel [*inputs, *outputs] of one layer as values and scales; rounds to nearest, in float32."""
    outputs = kernel.shape[num_inputs:]
    matrix = kernel.astype(jnp.float32).reshape(-1, *outputs)
    rounded = qwix.quantize(
        matrix,
        "nf4" if quantization == "nf4" else jnp.int8,
        channelwise_axes=tuple(range(1, matrix.ndim)),
        tiled_axes={0: tile},
    )
    values = rounded.qvalue.reshape(kernel.shape)
    if quantization == "nf4":
        values = _packed(values.astype(jnp.uint8), num_inputs - 1)
    return {VALUES: values, SCALES: rounded.scale}


def dequantize_kernel(
    values: Int[Array, "..."] | UInt8[Array, "..."], scales: Float[Array, "..."], *, num_inputs: int
) -> Float[Array, "..."]:
    """The kernel [*inputs, *outputs] in float32; the values' dtype says which format they have."""
    outputs = values.shape[num_inputs:]
    four_bits = values.dtype == jnp.uint8
    if four_bits:
        values = _unpacked(values, num_inputs - 1)
    matrix = values.reshape(-1, *outputs)
    whole = qwix.dequantize(qwix.QArray(matrix, scales, None, "nf4" if four_bits else jnp.int8))
    return whole.reshape(values.shape)


def _packed(codes: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """Two codes of 4 bits in each byte, the first of a pair in the lower bits."""
    pairs = codes.reshape(*codes.shape[:axis], -1, 2, *codes.shape[axis + 1 :])
    low, high = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def _unpacked(packed: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """The inverse of `_packed`."""
    pairs = jnp.stack([packed & 15, packed >> 4], axis + 1)
    return pairs.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])
