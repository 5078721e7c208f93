"""What a forward pass hands to its layers, as frozen pytrees shared by Linen and NNX."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from models.config import TransformerConfig
from models.ops.masks import FULL_WINDOW
from models.ops.rotary import inverse_frequencies, rotary_tables, scale_llama31
from models.parameters import param_key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepContext:
    """The same for every layer of one forward pass."""

    cos: Float[Array, "B T half"] | None
    sin: Float[Array, "B T half"] | None
    segment_ids: Int[Array, "B T"]
    prefix_ids: Int[Array, "B T"] | None
    """A second segment that each token sees, 0 for none; None where no token has one."""
    attention_mask: Bool[Array, "B T S"] | None
    """Replaces causality, segments and windows where the caller brings a mask of its own."""
    noise_key: PRNGKeyArray | None
    """Of all that the pass draws, dropout masks and the rounding of quantised gradients; None draws nothing."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInput:
    """What differs from layer to layer; stacked along a leading [L] axis where layers are scanned."""

    index: Int[Array, ""]
    window: Int[Array, ""] | None
    """Tokens a query sees; None where all layers share one static window."""


def rotary_frequencies(config: TransformerConfig) -> Float[np.ndarray, " half"]:
    """Radians a token for each pair of a head, with Llama 3.1's scaling where configured; shape [N/2]."""
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    if config.rope_scaling is not None:
        frequencies = scale_llama31(frequencies, **config.rope_scaling.model_dump())
    return frequencies


def step_context(
    config: TransformerConfig,
    positions: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None,
    attention_mask: Bool[Array, "B T S"] | None,
    noise_key: PRNGKeyArray | None,
    prefix_ids: Int[Array, "B T"] | None = None,
) -> StepContext:
    """Gathers what the layers share; without segment ids every token belongs to one document."""
    cos = sin = None
    if config.position == "rope":
        cos, sin = rotary_tables(positions, rotary_frequencies(config))
    return StepContext(
        cos=cos,
        sin=sin,
        segment_ids=jnp.ones_like(positions) if segment_ids is None else segment_ids,
        prefix_ids=prefix_ids,
        attention_mask=attention_mask,
        noise_key=noise_key,
    )


def layer_noise_key(context: StepContext, layer: LayerInput) -> PRNGKeyArray | None:
    """The key of one layer, from which `named_key` derives those of its draws; None draws nothing."""
    return None if context.noise_key is None else jax.random.fold_in(context.noise_key, layer.index)


def named_key(noise_key: PRNGKeyArray | None, name: str) -> PRNGKeyArray | None:
    """The key of the one draw of a layer that has this name; None stays None."""
    return None if noise_key is None else param_key(noise_key, (name,))


def window_choices(config: TransformerConfig) -> tuple[int | None, ...]:
    """The distinct windows of the model, in order of first use."""
    return tuple(dict.fromkeys(config.layer_windows()))


def layer_inputs(config: TransformerConfig) -> LayerInput:
    """The stacked inputs of all layers, each leaf with a leading [L] axis."""
    windows = config.layer_windows()
    traced = None
    if len(set(windows)) > 1:
        traced = jnp.array([FULL_WINDOW if window is None else window for window in windows], jnp.int32)
    return LayerInput(index=jnp.arange(config.num_layers), window=traced)


def layer_input(index: int) -> LayerInput:
    """The inputs of layer `index` where layers are unrolled; windows are static there."""
    return LayerInput(index=jnp.asarray(index), window=None)
