"""Rematerialisation: which activations of a decoder layer the backward pass keeps, and which it computes again."""

from collections.abc import Callable
from typing import Any

import jax

from models.ops.linear import PROJECTED

SAVED_PROJECTIONS = ("query_proj", "key_proj", "value_proj")
"""Names that attention gives its projections through `checkpoint_name`."""
LAYER_INPUT = "decoder_layer_input"

Policy = Callable[..., Any] | None


def remat_policy(name: str) -> Policy:
    """The `jax.checkpoint` policy of a recipe's `model.remat`.

    Args:
        name: "full" keeps nothing but the layer's input; "minimal" keeps every weight matmul's output; "save_qkv" keeps
            the three attention projections; "offload" moves those and the layer's input to host memory.
    """
    policies = jax.checkpoint_policies
    if name == "full":
        return None
    if name == "minimal":
        return policies.save_only_these_names(PROJECTED)
    if name == "save_qkv":
        return policies.save_only_these_names(*SAVED_PROJECTIONS)
    if name == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT, *SAVED_PROJECTIONS],
            offload_src="device",
            offload_dst="pinned_host",
        )
    raise ValueError(f"model.remat={name}: unknown policy; choose none, full, minimal, save_qkv or offload")
