"""Projections, activations and dropout."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from models.ops.matmul import matmul

DotGeneral = Callable[..., jax.Array]
PROJECTED = "projected"
"""The name of every weight matmul's output, for policies of rematerialisation: they don't see inside `matmul`."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def project(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    *,
    num_contract: int,
    dot_general: DotGeneral,
) -> Float[Array, "..."]:
    """Contracts the last `num_contract` axes of x with the first of the kernel, and adds the bias.

    Args:
        x: [..., *inputs] in the compute dtype.
        kernel: [*inputs, *outputs]; cast to x's dtype.
        bias: [*outputs] or None; cast likewise.
        num_contract: number of input axes.
        dot_general: `jax.lax.dot_general` or a quantised one of the same signature.

    Returns:
        [..., *outputs] in x's dtype.
    """
    kernel = kernel.astype(x.dtype)
    if dot_general is jax.lax.dot_general:
        outputs = kernel.shape[num_contract:]
        flat = x.reshape(*x.shape[: x.ndim - num_contract], -1)
        out = matmul(flat, kernel.reshape(flat.shape[-1], -1)).reshape(*flat.shape[:-1], *outputs)
    else:
        contract = tuple(range(x.ndim - num_contract, x.ndim)), tuple(range(num_contract))
        out = dot_general(x, kernel, (contract, ((), ()))).astype(x.dtype)
    out = checkpoint_name(out, PROJECTED)
    return out if bias is None else out + bias.astype(x.dtype)


def low_rank(
    x: Float[Array, "..."],
    lora_a: Float[Array, "... R"],
    lora_b: Float[Array, "R ..."],
    *,
    num_contract: int,
    scale: float,
) -> Float[Array, "..."]:
    """scale * (x A) B, the change that a low-rank adapter makes (Hu et al. 2021, equation 3).

    Args:
        x: [..., *inputs] in the compute dtype.
        lora_a: [*inputs, R]; cast to x's dtype.
        lora_b: [R, *outputs]; cast likewise.
        num_contract: number of input axes.
        scale: alpha / R.

    Returns:
        [..., *outputs] in x's dtype.
    """
    rank, outputs = lora_b.shape[0], lora_b.shape[1:]
    flat = x.reshape(*x.shape[: x.ndim - num_contract], -1)
    inner = matmul(flat, lora_a.astype(x.dtype).reshape(-1, rank)) * scale
    return matmul(inner, lora_b.astype(x.dtype).reshape(rank, -1)).reshape(*flat.shape[:-1], *outputs)


@functools.partial(jax.checkpoint, static_argnums=0)
def gated(activation: str, gate: Float[Array, "..."], linear: Float[Array, "..."]) -> Float[Array, "..."]:
    """activation(gate) * linear (Shazeer 2020), of which the backward pass keeps the inputs and nothing between.

    What is between is two to three times as large as the layer's output, and cheap to compute again.

    Args:
        activation: of ACTIVATIONS.
        gate: any shape.
        linear: as gate.
    """
    return ACTIVATIONS[activation](gate) * linear


def dropout(
    x: Float[Array, "B T D"], key: PRNGKeyArray | None, *, rate: float, broadcast_time: bool
) -> Float[Array, "B T D"]:
    """Inverted dropout (Srivastava et al. 2014): zero with probability `rate`, else divide by 1 - rate.

    Args:
        x: activations.
        key: decides the mask; None switches dropout off.
        rate: in [0, 1).
        broadcast_time: draw one mask for all tokens of a row.
    """
    if key is None or rate == 0.0:
        return x
    shape = (x.shape[0], 1, x.shape[2]) if broadcast_time else x.shape
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
