"""The three programs of the native engine as pure functions: prefill a prompt, insert it in a slot, decode all slots.

Shapes are fixed by the number of slots, the cache's capacity and a handful of prompt lengths. Everything that differs
between requests is data, so mixed requests share one compiled program, and what a slot computes does not depend on what
the others hold.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.functional import FunctionalModel, Params
from models.inference.cache import KVCache, init_cache, insert
from models.inference.sampling import sample_tokens
from models.ops.head import output_logits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the engine holds of each request in progress; a slot that isn't active holds rubbish."""

    cache: KVCache
    logits: Float[Array, "B V"]
    """Of the next token, float32, unscaled."""
    active: Bool[Array, " B"]
    counts: Int[Array, " B"]
    """Tokens sampled so far."""
    max_tokens: Int[Array, " B"]
    seeds: Int[Array, " B"]
    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Emitted:
    """What one call of `decode` sampled: slot b made `counts[b]` tokens, which stand first in its rows."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    counts: Int[Array, " B"]
    active: Bool[Array, " B"]
    """Whether the slot's request goes on."""


def init_slots(model: FunctionalModel, *, num_slots: int, capacity: int) -> Slots:
    """Slots without requests."""
    dtype = jnp.dtype(model.options.compute_dtype)
    integers, floats = jnp.zeros((num_slots,), jnp.int32), jnp.ones((num_slots,), jnp.float32)
    return Slots(
        cache=init_cache(model.config, num_slots=num_slots, capacity=capacity, dtype=dtype),
        logits=jnp.zeros((num_slots, model.config.vocab_size), jnp.float32),
        active=jnp.zeros((num_slots,), bool),
        counts=integers,
        max_tokens=integers,
        seeds=integers,
        temperature=floats,
        top_k=integers + 1,
        top_p=floats,
    )


def forward(
    model: FunctionalModel, params: Params, cache: KVCache, tokens: Int[Array, "B T"], last: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Puts T tokens of each slot through the model; the float32 logits are those after the token at index `last`."""
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    # Padding may stand past the last position of a learned table, and must not make a NaN.
    positions = jnp.minimum(positions, model.config.max_position - 1)
    hidden, grown = model.hidden_states(params, tokens, positions, cache)
    assert grown is not None
    chosen = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    logits = output_logits(
        model.head(params),
        chosen,
        softcap=model.config.logits_softcap,
        dtype=jnp.dtype(model.options.logits_dtype),
    )
    return logits[:, 0].astype(jnp.float32), grown


def prefill(
    model: FunctionalModel,
    params: Params,
    prefix: KVCache | None,
    tokens: Int[Array, "1 T"],
    last: Int[Array, " 1"],
    *,
    capacity: int,
) -> tuple[Float[Array, "1 V"], KVCache]:
    """Puts one prompt, or the next chunk of a long one, into a cache of its own.

    Args:
        model: the policy.
        params: its parameters.
        prefix: what earlier chunks made; None for the first.
        tokens: the prompt or chunk, padded on the right.
        last: index of its last real token.
        capacity: of the new cache, in tokens.

    Returns:
        The logits after the last token, and the cache. Its entries behind the prompt are those of padding.
    """
    if prefix is None:
        dtype = jnp.dtype(model.options.compute_dtype)
        prefix = init_cache(model.config, num_slots=1, capacity=capacity, dtype=dtype)
    return forward(model, params, prefix, tokens, last)


def insert_request(
    slots: Slots, prefix: KVCache, logits: Float[Array, "1 V"], integers: Int[Array, " 5"], floats: Float[Array, " 2"]
) -> Slots:
    """Starts a request in a slot.

    Args:
        slots: all slots.
        prefix: the prompt's cache.
        logits: after the prompt's last token.
        integers: slot, length of the prompt, max_tokens, seed, top_k.
        floats: temperature, top_p.
    """
    slot, length, max_tokens, seed, top_k = integers
    return Slots(
        cache=insert(slots.cache, prefix, slot, length),
        logits=jax.lax.dynamic_update_slice(slots.logits, logits, (slot, 0)),
        active=slots.active.at[slot].set(True),
        counts=slots.counts.at[slot].set(0),
        max_tokens=slots.max_tokens.at[slot].set(max_tokens),
        seeds=slots.seeds.at[slot].set(seed),
        temperature=slots.temperature.at[slot].set(floats[0]),
        top_k=slots.top_k.at[slot].set(top_k),
        top_p=slots.top_p.at[slot].set(floats[1]),
    )


def decode(
    model: FunctionalModel,
    params: Params,
    slots: Slots,
    stop_ids: Int[Array, " n"],
    yield_on_finish: Bool[Array, ""],
    limit: Int[Array, ""],
    *,
    num_steps: int,
) -> tuple[Slots, Emitted]:
    """Samples up to `limit` tokens of every active slot without going back to the host.

    Args:
        model: the policy.
        params: its parameters.
        slots: all slots.
        stop_ids: a request ends with the first of these; filled up with -1.
        yield_on_finish: return as soon as a request ends, because others wait for its slot.
        limit: bound on the tokens of a slot in this call.
        num_steps: bound on `limit`.
    """
    B = slots.active.shape[0]
    emitted = Emitted(
        tokens=jnp.zeros((B, num_steps), jnp.int32),
        logprobs=jnp.zeros((B, num_steps), jnp.float32),
        counts=jnp.zeros((B,), jnp.int32),
        active=slots.active,
    )

    def goes_on(carry: tuple[Any, Slots, Emitted]) -> jax.Array:
        step, now, _ = carry
        finished = (slots.active & ~now.active).any()
        return (step < jnp.minimum(limit, num_steps)) & now.active.any() & ~(yield_on_finish & finished)

    def one_step(carry: tuple[Any, Slots, Emitted]) -> tuple[Any, Slots, Emitted]:
        step, now, made = carry
        tokens, logprobs = sample_tokens(
            now.logits,
            seeds=now.seeds,
            counts=now.counts,
            temperature=now.temperature,
            # What a slot at rest was asked for must not make the others pay for a truncation.
            top_k=jnp.where(now.active, now.top_k, model.config.vocab_size),
            top_p=jnp.where(now.active, now.top_p, 1.0),
        )
        counts = now.counts + now.active
        stopped = (tokens[:, None] == stop_ids).any(-1) | (counts >= now.max_tokens)
        made = Emitted(
            tokens=made.tokens.at[:, step].set(tokens),
            logprobs=made.logprobs.at[:, step].set(logprobs),
            counts=made.counts + now.active,
            active=now.active & ~stopped,
        )
        logits, cache = forward(model, params, now.cache, tokens[:, None], jnp.zeros((B,), jnp.int32))
        # A slot at rest stays at its beginning, where it costs least; what it writes there is never read.
        lengths = jnp.where(made.active, cache.lengths, 0)
        cache = replace(cache, lengths=lengths)
        return step + 1, replace(now, cache=cache, logits=logits, active=made.active, counts=counts), made

    _, slots, emitted = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), slots, emitted))
    return slots, emitted
