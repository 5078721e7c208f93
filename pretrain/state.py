"""The training state, and where its arrays live."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.functional import FunctionalModel, Params
from models.parameters import flatten, is_spec, unflatten
from models.sharding import Rules, partition_spec
from recipes.schema import OptimizerSection


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes; keys and data positions are derived from `step` and the recipe's seeds."""

    step: Any
    """Completed steps, int32 scalar."""
    params: Params
    """Parameters in Linen's naming."""
    opt_state: Any
    """The optimizer's state, as optax made it."""


@dataclass(frozen=True)
class StateShardings:
    """Where the state lives between steps, and where gradients meet the optimizer."""

    state: TrainState
    """A NamedSharding for every leaf of a TrainState."""
    opt_state_in_step: Any
    """The optimizer's shardings in device memory, where the update runs."""
    update: Params
    """Where gradients, and parameters during the update, live: finer than `state.params` under ZeRO-1. A parameter that
    is not trained has none: `optax.MaskedNode` stands in its place."""


def abstract_state(model: FunctionalModel, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state; allocates nothing."""

    def build() -> TrainState:
        params = model.init(jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return jax.eval_shape(build)


def state_shardings(
    model: FunctionalModel,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
    rules: Rules,
    section: OptimizerSection,
    trainable: frozenset[str] | None = None,
) -> StateShardings:
    """Shards parameters by their logical axes and moments like their parameters.

    With `optimizer.shard_over_data` moments are split over the data axis too (ZeRO-1, Rajbhandari et al. 2020); with
    `optimizer.memory=pinned_host` they rest in host memory between steps. Only `trainable` parameters, by name, have
    gradients; None is all.
    """
    finer = dict(rules)
    if section.shard_over_data:
        finer["embed"] = (*rules.get("embed", ()), "data")

    def shard(chosen: Rules) -> Params:
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, partition_spec(spec.axes, spec.shape, mesh, chosen)),
            model.specs,
            is_leaf=is_spec,
        )

    params, update = shard(rules), shard(finer)
    whole = NamedSharding(mesh, PartitionSpec())

    def like_parameter(leaf: Any, sharding: NamedSharding, param: jax.ShapeDtypeStruct) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        # Factored moments (Adafactor) have other shapes than their parameter and stay whole.
        return sharding if leaf.shape == param.shape else whole

    moments = optax.tree.map_params(
        tx,
        like_parameter,
        abstract.opt_state,
        update,
        abstract.params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    resting = moments
    if section.memory == "pinned_host":
        # Scalars (counts) stay on the device: only arrays with a size are worth moving.
        resting = jax.tree.map(
            lambda sharding, leaf: sharding.with_memory_kind("pinned_host") if leaf.ndim else sharding,
            moments,
            abstract.opt_state,
        )
    if trainable is not None:
        named = {path: leaf if "/".join(path) in trainable else optax.MaskedNode() for path, leaf in flatten(update)}
        update = unflatten(named)
    return StateShardings(TrainState(whole, params, resting), moments, update)


def init_state(
    model: FunctionalModel,
    tx: optax.GradientTransformation,
    shardings: StateShardings,
    params: Params | None,
    *,
    seed: int,
) -> TrainState:
    """The state before the first step: `params`, drawn from the seed if None, and the optimizer's first state."""
    if params is None:
        init = jax.jit(model.init, out_shardings=shardings.state.params)
        params = init(jax.random.fold_in(jax.random.key(seed), 0))
    opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state_in_step)(params)
    return TrainState(
        jax.device_put(jnp.zeros((), jnp.int32), shardings.state.step),
        params,
        jax.device_put(opt_state, shardings.state.opt_state),
    )
