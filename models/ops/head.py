"""The output head as a pure function of its own few parameters, so that a loss can apply it in chunks."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.ops.attention import soft_cap
from models.ops.matmul import matmul

HeadParams = dict[str, jax.Array]


def head_params(params: Mapping[str, Any]) -> HeadParams:
    """Carves the head out of a parameter tree: {"kernel": [D, V]}, or {"embedding": [V, D]} where it is tied."""
    decoder = params["decoder"]
    if "logits_dense" in decoder:
        return {"kernel": decoder["logits_dense"]["kernel"]}
    return {"embedding": params["token_embedder"]["embedding"]}


def output_logits(
    params: HeadParams, hidden: Float[Array, "*batch D"], *, softcap: float | None, dtype: Any
) -> Float[Array, "*batch V"]:
    """Logits of normalised hidden states.

    Args:
        params: as `head_params` gives them; cast to hidden's dtype for the product.
        hidden: the last norm's output.
        softcap: Gemma 2's bound on logits, or None.
        dtype: of the logits.
    """
    kernel = params["kernel"] if "kernel" in params else params["embedding"].T
    logits = matmul(hidden, kernel.astype(hidden.dtype))
    return soft_cap(logits.astype(jnp.dtype(dtype)), softcap)
