"""The memory of a device, reckoned from shapes: what a step holds, by role and by phase.

Arrays that the run keeps (parameters, gradients, optimizer, batch, cache of keys and values) are exact. What a compiler
decides (activations, gathered shards, chunks of logits) is an estimate from what the mathematics has to keep:

    of a token a layer keeps    4 D + 3 H N + 2 K N + 3 F numbers (RMS norms, a gate) where nothing is recomputed;
                                2 D + H N + 2 K N + 2 F with model.remat=minimal, and D with full
    one layer needs beside it   what it recomputes, and the gradients of its feed-forward block

Heads and feed-forward columns are divided by the tensor axis, tokens by the axes of the batch and of time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.functional import FunctionalModel
from models.inference.engine import SHORTEST_PREFILL, inference_model, inference_params
from models.inference.steps import init_slots
from models.parameters import flatten, is_spec
from models.sharding import partition_spec
from posttrain.bundle import activation_bytes, device_bytes
from pretrain.optimizers import trained_part
from pretrain.setup import ModelSetup
from recipes.schema import ModelSection, SamplerSection

ROLLOUT, SCORING, UPDATE = "rollout", "scoring", "update"


@dataclass(frozen=True)
class Entry:
    """Something that takes memory on each device."""

    what: str
    sizes: dict[str, int]
    """Bytes by phase; a phase that is left out holds none of it."""
    exact: bool
    """Whether the size follows from shapes; else it is an estimate."""


@dataclass(frozen=True)
class FrozenModel:
    """A reference or teacher, as shapes."""

    name: str
    model: FunctionalModel
    params: Any
    """A tree of jax.ShapeDtypeStruct, with shardings."""
    phases: tuple[str, ...]
    """During which its parameters are held."""


@dataclass(frozen=True)
class Rows:
    """The rows that are put through the model at a time, over all devices."""

    count: int
    """Rows of a micro-batch in the update."""
    microbatches: int
    scored: int
    """Rows at a time in scoring; 0 where nothing is scored."""
    length: int
    """Tokens of a row."""


def sharded_bytes(tree: Any) -> int:
    """Bytes that a device holds of a tree of jax.ShapeDtypeStruct with shardings."""
    return device_bytes(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def state_entries(setup: ModelSetup, phases: Sequence[str], *, microbatches: int, on_host: bool) -> list[Entry]:
    """Parameters, optimizer state and gradients of what is trained.

    Args:
        setup: of the run.
        phases: of the run.
        microbatches: of a step, whose gradients are summed.
        on_host: whether the optimizer's state rests in host memory between steps.
    """
    abstract, shardings = setup.abstract, setup.shardings
    parameters = device_bytes(abstract.params, shardings.state.params)
    moments = device_bytes(abstract.opt_state, shardings.opt_state_in_step)
    trained = trained_part(abstract.params, shardings.update)
    placed = trained_part(shardings.state.params, shardings.update)
    sums = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), trained
    )
    entries = [
        Entry("policy: parameters", dict.fromkeys(phases, parameters), True),
        Entry("policy: optimizer", dict.fromkeys([UPDATE] if on_host else phases, moments), True),
        Entry("policy: gradients, summed", {UPDATE: device_bytes(sums, placed)}, True),
    ]
    if microbatches > 1:
        entries.append(Entry("policy: gradients, a micro-batch", {UPDATE: device_bytes(trained, placed)}, True))
    return entries


def frozen_entries(roles: Sequence[FrozenModel]) -> list[Entry]:
    """Parameters of the models that are not trained; one that is in the policy's arrays holds none."""
    return [
        Entry(f"{role.name}: parameters", dict.fromkeys(role.phases, sharded_bytes(role.params)), True)
        for role in roles
        if role.phases
    ]


def native_engine_entries(
    setup: ModelSetup, section: SamplerSection, *, max_length: int, phases: Sequence[str]
) -> list[Entry]:
    """What the native engine keeps beside the trainer: its own weights, sharded alike, and the cache, whole."""
    model = setup.model
    weights = jax.eval_shape(partial(inference_params, model), setup.abstract.params)
    specs = inference_model(model).specs
    placed = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(
            setup.mesh, partition_spec(spec.axes, spec.shape, setup.mesh, setup.rules)
        ),
        specs,
        is_leaf=is_spec,
    )
    capacity = -(-max_length // SHORTEST_PREFILL) * SHORTEST_PREFILL
    slots = jax.eval_shape(partial(init_slots, model, num_slots=section.num_slots, capacity=capacity))
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(slots))
    return [
        Entry("sampler: weights", dict.fromkeys(phases, device_bytes(weights, placed)), True),
        Entry("sampler: keys and values", dict.fromkeys(phases, whole), True),
    ]


def work_entries(setup: ModelSetup, rows: Rows, roles: Sequence[FrozenModel], *, logit_copies: int = 2) -> list[Entry]:
    """Activations, gathered parameters and logits: estimates.

    Args:
        setup: of the run.
        rows: that are put through at a time.
        roles: models that are run in scoring; without one, the policy is.
        logit_copies: float32 arrays of a chunk's logits that exist at a time: the logits and their gradient.
    """
    config, options = setup.config, setup.model.options
    scored = roles[0].model if roles else setup.model
    activations = {
        UPDATE: kept_activations(setup, rows) + layer_activations(config, options, setup, rows.count * rows.length)
    }
    gathered = {UPDATE: gathered_bytes(setup.model, setup, gradients=True)}
    chunk = -(-setup.chunk_size // token_shards(setup)) * vocabulary_columns(config, setup) * 4
    logits = {UPDATE: logit_copies * chunk}
    if rows.scored:
        tokens = rows.scored * rows.length
        activations[SCORING] = layer_activations(scored.config, scored.options, setup, tokens, backward=False)
        gathered[SCORING] = gathered_bytes(scored, setup, gradients=False)
        logits[SCORING] = chunk
    entries = [Entry("activations", activations, False), Entry("logits of a chunk", logits, False)]
    if any(gathered.values()):
        entries.insert(1, Entry("parameters, gathered", gathered, False))
    return entries


def token_shards(setup: ModelSetup) -> int:
    """Ways in which the tokens of a batch are divided."""
    axes = {axis for name in ("batch", "time") for axis in setup.rules.get(name, ())}
    return math.prod(setup.mesh.shape.get(axis, 1) for axis in axes)


def shards(setup: ModelSetup, name: str, size: int) -> int:
    """Ways in which a logical axis of a size is divided."""
    divided = partition_spec((name,), (size,), setup.mesh, setup.rules)
    axes = divided[0] if divided else None
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(setup.mesh.shape[axis] for axis in names)


def vocabulary_columns(config: TransformerConfig, setup: ModelSetup) -> int:
    """Columns of the head that a device multiplies."""
    return config.vocab_size // shards(setup, "activation_vocab", config.vocab_size)


@dataclass(frozen=True)
class Widths:
    """Numbers of a token in a layer that a device holds, by the array they stand in."""

    stream: int
    query: int
    key: int
    hidden: int
    """Of the feed-forward block."""


def whole_widths(config: TransformerConfig) -> Widths:
    """The widths of a layer."""
    query, key = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    return Widths(config.embed_dim, query, key, config.mlp_dim)


def widths(config: TransformerConfig, setup: ModelSetup) -> Widths:
    """The widths of a device's part of a layer."""
    heads = config.num_heads // shards(setup, "activation_heads", config.num_heads)
    kv_heads = config.num_kv_heads // shards(setup, "activation_heads", config.num_kv_heads)
    hidden = config.mlp_dim // shards(setup, "activation_mlp", config.mlp_dim)
    return Widths(config.embed_dim, heads * config.head_dim, kv_heads * config.head_dim, hidden)


def layer_numbers(config: TransformerConfig, width: Widths, remat: str) -> int:
    """Numbers of a token that a layer keeps on the device for its backward pass."""
    stream, hidden = width.stream, width.hidden
    projections = width.query + 2 * width.key
    if remat == "offload":
        return 0
    if remat == "full":
        return stream
    if remat == "save_qkv":
        return stream + projections
    branches = 2 if config.gated_mlp else 1
    if remat == "minimal":
        # Its input, and the outputs of the weight products that the rest is computed of.
        return (3 if config.sandwich_norms else 2) * stream + projections + branches * hidden
    # A norm before each of the two blocks keeps its input and output, a layer norm two arrays more.
    norms = (4 if config.norm == "rms" else 8) + (2 if config.sandwich_norms else 0)
    # What attention mixed is kept by attention, and by the projection behind it.
    heads = projections + 2 * width.query + (width.query + width.key if config.qk_norm else 0)
    # With a gate its two inputs and the product; else what gelu is made of.
    return norms * stream + heads + (3 if config.gated_mlp else 6) * hidden


def kept_activations(setup: ModelSetup, rows: Rows) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, as autodiff asks for them."""
    config, options = setup.config, setup.model.options
    local, length = setup.batch_sharding.shard_shape((rows.count, rows.length))
    whole = layer_numbers(config, whole_widths(config), options.remat)
    if whole == 0:
        # All is moved to the host but the stream before the first layer, and behind the last.
        return 2 * local * length * config.embed_dim * jnp.dtype(options.compute_dtype).itemsize
    part = layer_numbers(config, widths(config, setup), options.remat)
    # Autodiff knows of no tensor axis, which divides heads and feed-forward columns.
    return activation_bytes(setup.model, setup.trainable, local, length) * part // whole


def layer_activations(
    config: TransformerConfig, options: ModelSection, setup: ModelSetup, tokens: int, *, backward: bool = True
) -> int:
    """Bytes of one layer while it is computed, or computed again and differentiated."""
    width = widths(config, setup)
    inner = (3 if config.gated_mlp else 2) * width.hidden + width.stream
    # Forward alone keeps nothing: the larger block's arrays, beside the stream.
    numbers = layer_numbers(config, width, "none") + inner if backward else inner + width.stream
    return -(-tokens // token_shards(setup)) * numbers * jnp.dtype(options.compute_dtype).itemsize


def gathered_bytes(model: FunctionalModel, setup: ModelSetup, *, gradients: bool) -> int:
    """Bytes of the whole of what is split over the batch's axes, while it is used: one layer, and the head.

    Gathered in the compute dtype; gradients are as large again before they are scattered.
    """
    config, options = model.config, model.options
    if shards(setup, "embed", config.embed_dim) == 1:
        return 0
    layer, head = 0, 0
    for path, spec in flatten(model.specs):
        size = math.prod(spec.shape)
        kept = [name if name != "embed" else None for name in spec.axes]
        divided = partition_spec(tuple(kept), spec.shape, setup.mesh, setup.rules)
        ways = math.prod(
            setup.mesh.shape[axis]
            for entry in divided
            if entry is not None
            for axis in ((entry,) if isinstance(entry, str) else entry)
        )
        if any(part.startswith("layers") for part in path):
            layer += size // ways // config.num_layers
        elif path[-2:] == ("logits_dense", "kernel") or (config.tied_embeddings and path[0] == "token_embedder"):
            head = size // ways
    itemsize = jnp.dtype(options.compute_dtype).itemsize
    return max(layer * itemsize * (2 if gradients else 1), head * (itemsize + (4 if gradients else 0)))
