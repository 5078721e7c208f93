"""Which keys a query may see, as boolean arrays."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

FULL_WINDOW = 1 << 30
"""A window no sequence reaches: what a full layer carries where windows are traced."""


def causal_mask(
    segment_ids: Int[Array, "B T"],
    window: int | Int[Array, ""] | None,
    prefix_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T T"]:
    """Query i sees key j when j <= i, i - j < window, both lie in one segment, and that is not padding (0).

    Args:
        segment_ids: the document of each token, 0 for padding.
        window: tokens a query sees, itself included; None for all.
        prefix_ids: a second segment that each token sees, 0 for none: what its document has in common with others.
    """
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    if prefix_ids is not None:
        same |= prefix_ids[:, :, None] == segment_ids[:, None, :]
    return visible[None] & same & (segment_ids[:, None, :] != 0)
