"""Optimizers by name, parameters that stay frozen, and clipping by global norm.

Clipping is a function of its own rather than a stage of the optimizer: the norm before clipping is a metric, and the
optimizer's state keeps the layout that checkpoints have (`0/{count, mu, nu}` and the schedule's count for adamw, a bare
`{count, mu, nu}` for adam_pax).
"""

import difflib
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from recipes.schema import ModelSection, OptimizerSection

logger = logging.getLogger(__name__)

Scalar: TypeAlias = float | jax.Array
Rate: TypeAlias = Scalar | Callable[[Any], Any]

# Name parts of parameters that Muon leaves to Adam: tables and vectors are not maps between two spaces.
_NOT_MUON = ("scale", "embedding", "logits_dense")

_SMALL_WEIGHT = 2.0**-9
"""Nine in ten weights of a trained model, whose spread is about 0.02, are larger than this."""
_RATE_BOUNDS_UPDATES = ("adamw", "adam_pax", "muon")
"""Rules whose updates of single weights are about the rate at most, whatever the gradients are."""


def make_optimizer(
    section: OptimizerSection, schedule: optax.Schedule, param_paths: Iterable[str]
) -> optax.GradientTransformation:
    """Builds the recipe's optimizer. Its updates are to be added to the parameters.

    Args:
        section: the recipe's `optimizer`. `clip_norm`, `memory` and `shard_over_data` are the train step's to obey.
        schedule: the rate of each step.
        param_paths: names of all parameters, joined by "/". Muon takes a mapping from them to the logical names of the
            parameter's axes, where "layers" marks the axis along which layers are stacked.

    Raises:
        ValueError: a pattern in `optimizer.trainable` matches no parameter.
    """
    axes = dict(param_paths) if isinstance(param_paths, Mapping) else dict.fromkeys(param_paths, None)
    tx = _RULES[section.name](section, schedule, axes)
    if not section.trainable:
        return tx
    return train_only(tx, trainable_paths(section.trainable, axes))


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, Float[Array, ""]]:
    """Scales all gradients down together so that their global norm is at most `max_norm`.

    Args:
        grads: pytree of gradients.
        max_norm: largest norm let through; 0 lets all through.

    Returns:
        The gradients in their own dtypes, and the float32 norm they had before.
    """
    squares = [jnp.sum(jnp.square(grad.astype(jnp.float32))) for grad in jax.tree.leaves(grads)]
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))
    if max_norm == 0:
        return grads, norm
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads), norm


def require_updates_survive(optimizer: OptimizerSection, model: ModelSection) -> None:
    """Refuses, or warns of, trained parameters whose dtype rounds updates away; adapters are float32 in any case.

    There is no second, finer copy of the parameters: an update that is at most half a unit in the last place leaves a
    weight as it was, however many follow. In bfloat16 half a unit is 2**-17, or 7.6e-6, for weights from 2**-9 on, and
    one in 512 to one in 256 of any weight.

    Raises:
        ValueError: updates are about the rate at most, and the rate is at most half a unit of `_SMALL_WEIGHT`.
    """
    if model.param_dtype == "float32":
        return
    half = float(jnp.finfo(model.param_dtype).eps) / 2
    where = f"model.param_dtype={model.param_dtype}: parameters are trained in it"
    remedy = "set model.param_dtype=float32, and leave model.compute_dtype as it is"
    if optimizer.name in _RATE_BOUNDS_UPDATES and optimizer.learning_rate <= half * _SMALL_WEIGHT:
        raise ValueError(
            f"{where}, and optimizer.learning_rate={optimizer.learning_rate:g} is at most half a unit in the last "
            f"place of nine weights in ten, which would never change; {remedy}"
        )
    logger.warning(
        "%s, and updates of less than a %dth of a weight are rounded away (optimizer.learning_rate=%g); %s",
        where,
        round(2 / half),
        optimizer.learning_rate,
        remedy,
    )


# --- frozen parameters ---


def trainable_paths(patterns: Sequence[str], paths: Iterable[str]) -> frozenset[str]:
    """Names of the parameters in which at least one of the regular expressions is found (`re.search`).

    Raises:
        ValueError: a pattern is found in none.
    """
    paths = tuple(paths)
    chosen: set[str] = set()
    for pattern in patterns:
        found = [path for path in paths if re.search(pattern, path)]
        if not found:
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0) or ["none"]
            raise ValueError(
                f"optimizer.trainable: {pattern!r}: it is found in none of the {len(paths)} parameters' names, so it "
                f"would train nothing; the nearest name is {near[0]}"
            )
        chosen.update(found)
    return frozenset(chosen)


def stop_frozen_gradients(params: Any, trainable: frozenset[str]) -> Any:
    """The same parameters, of which only the trainable ones are differentiated.

    Applied at the head of a loss, it spares the backward pass the frozen gradients, and keeps them out of the norm.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _name(path) in trainable else jax.lax.stop_gradient(leaf), params
    )


def is_frozen(node: Any) -> bool:
    """Whether a node stands in a frozen parameter's place."""
    return isinstance(node, optax.MaskedNode)


def trained_part(tree: Any, like: Any) -> Any:
    """The leaves of a tree that `like` holds too; `optax.MaskedNode` elsewhere, where `like` has it."""
    return jax.tree.map(lambda kept, leaf: kept if is_frozen(kept) else leaf, like, tree, is_leaf=is_frozen)


def with_frozen(trained: Any, tree: Any) -> Any:
    """The inverse of `trained_part`: what `trained` leaves out is taken from `tree`."""
    return jax.tree.map(lambda leaf, whole: whole if is_frozen(leaf) else leaf, trained, tree, is_leaf=is_frozen)


def train_only(tx: optax.GradientTransformation, trainable: frozenset[str]) -> optax.GradientTransformation:
    """Restricts an optimizer to some parameters: all others get zero updates and have no state.

    Unlike `optax.masked`, which passes the others' gradients on, and adds a level to the state.

    Args:
        tx: the optimizer; it sees `optax.MaskedNode`, which has no leaves, in place of a frozen parameter.
        trainable: names of the parameters to train.
    """
    tx = optax.with_extra_args_support(tx)

    def drop_frozen(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if _name(path) in trainable else optax.MaskedNode(), tree
        )

    def init(params: Any) -> optax.OptState:
        return tx.init(drop_frozen(params))

    def update(grads: Any, state: optax.OptState, params: Any = None, **extra: Any) -> tuple[Any, optax.OptState]:
        params = None if params is None else drop_frozen(params)
        updates, state = tx.update(drop_frozen(grads), state, params, **extra)
        filled = jax.tree.map(
            lambda update, grad: jnp.zeros_like(grad) if is_frozen(update) and not is_frozen(grad) else update,
            updates,
            grads,
            is_leaf=is_frozen,
        )
        return filled, state

    return optax.GradientTransformationExtraArgs(init, update)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- rules ---


def adam_pax(
    learning_rate: Rate,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    weight_decay: Scalar,
) -> optax.GradientTransformation:
    """AdamW as Pax computes it: moments that are kept bias-corrected, by decays that grow with the step.

    At step t = count + 1, with beta_t = beta * (1 - beta**(t - 1)) / (1 - beta**t) for either moment:

        m = beta1_t * m + (1 - beta1_t) * g
        v = beta2_t * v + (1 - beta2_t) * g**2
        update = -rate(count) * (m / (sqrt(v + eps_root) + eps) + weight_decay * p)

    m and v equal optax.adamw's moments divided by (1 - beta**t), so both take the same steps.

    Args:
        learning_rate: a function of count, or a number; under `optax.inject_hyperparams` all numbers are arrays.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        eps_root: added to the second moment under the root.
        weight_decay: share of the parameter, times the rate, taken away each step.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu=zeros(params), nu=zeros(params))

    def decay(beta: Scalar, count: jax.Array) -> jax.Array:
        t = count.astype(jnp.float32) + 1
        return beta * (1 - jnp.power(beta, t - 1)) / (1 - jnp.power(beta, t))

    def mix(beta: jax.Array, moment: jax.Array, value: jax.Array) -> jax.Array:
        beta = beta.astype(value.dtype)
        return (beta * moment + (1 - beta) * value).astype(moment.dtype)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        beta1, beta2 = decay(b1, state.count), decay(b2, state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        mu = jax.tree.map(lambda m, g: mix(beta1, m, g), state.mu, grads)
        nu = jax.tree.map(lambda v, g: mix(beta2, v, jnp.square(g)), state.nu, grads)

        def step(m: jax.Array, v: jax.Array, p: jax.Array) -> jax.Array:
            direction = m / (jnp.sqrt(v + eps_root) + eps) + weight_decay * p
            return (-rate * direction).astype(p.dtype)

        return jax.tree.map(step, mu, nu, params), optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


Axes = Mapping[str, Sequence[str | None] | None]


def _adamw(section: OptimizerSection, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        eps_root=section.eps_root,
        weight_decay=section.weight_decay,
        mu_dtype=section.moment_dtype,
    )


def _adam_pax(section: OptimizerSection, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    return adam_pax(
        schedule,
        b1=section.b1,
        b2=section.b2,
        eps=section.eps,
        eps_root=section.eps_root,
        weight_decay=section.weight_decay,
    )


def _sgd(section: OptimizerSection, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    return optax.sgd(schedule, momentum=section.momentum, accumulator_dtype=section.moment_dtype)


def _adafactor(section: OptimizerSection, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    # The rate is relative to a parameter's own size (arXiv:1804.04235, section 8). optax adds the decay after the rate,
    # unscaled; everywhere else here the decay is scaled by the rate.
    return optax.adafactor(
        schedule,
        momentum=section.momentum,
        dtype_momentum=section.moment_dtype,
        weight_decay_rate=lambda count: section.weight_decay * schedule(count),
    )


def _muon(section: OptimizerSection, schedule: optax.Schedule, axes: Axes) -> optax.GradientTransformation:
    """Muon for matrices, optax's Adam with Nesterov momentum for the rest; the decay and the rate are shared."""
    missing = [path for path, names in axes.items() if names is None]
    assert not missing, f"muon needs the axes of its parameters; none are given for {missing[:3]}"

    def dimension_numbers(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: muon_dimension_numbers(_name(path), axes[_name(path)] or ()), params
        )

    return optax.contrib.muon(
        schedule,
        beta=section.muon_beta,
        eps=section.eps,
        weight_decay=section.weight_decay,
        mu_dtype=section.moment_dtype,
        adam_b1=section.b1,
        adam_b2=section.b2,
        adam_eps_root=section.eps_root,
        adam_weight_decay=section.weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
    )


def muon_dimension_numbers(path: str, axes: Sequence[str | None]) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are the inputs and outputs of the matrix that Muon orthogonalises.

    Every other axis is a batch of matrices: stacked layers, and whatever stands between the first and last axis of a
    kernel of no known name.

    Args:
        path: the parameter's name.
        axes: logical names of its axes.

    Returns:
        None for parameters that Muon leaves to Adam: tables, the output head, norms and biases.
    """
    names = path.split("/")
    own = [i for i, name in enumerate(axes) if name != "layers"]
    if len(own) < 2 or "bias" in names or any(part in name for part in _NOT_MUON for name in names):
        return None
    if names[-1] == "lora_a":
        return optax.contrib.MuonDimensionNumbers(tuple(own[:-1]), (own[-1],))
    if names[-1] == "lora_b":
        return optax.contrib.MuonDimensionNumbers((own[0],), tuple(own[1:]))
    owner = names[-2] if "self_attention" in names else ""
    if owner == "out":
        return optax.contrib.MuonDimensionNumbers((own[0], own[-2]), (own[-1],))
    if owner in ("query", "key", "value"):
        return optax.contrib.MuonDimensionNumbers((own[0],), (own[-2], own[-1]))
    return optax.contrib.MuonDimensionNumbers((own[0],), (own[-1],))


_RULES: dict[str, Callable[[OptimizerSection, optax.Schedule, Axes], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adam_pax": _adam_pax,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "muon": _muon,
}
