"""Where the training state lives: split moments, moments on the host, and what a shape without arrays tells."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.config import load_preset
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, param_specs
from models.sharding import DEFAULT_RULES, param_shardings
from pretrain.optimizers import make_optimizer
from pretrain.state import StateShardings, TrainState, abstract_state, init_state, state_shardings
from recipes.schema import MeshSection, ModelSection, OptimizerSection
from tests.models.devices import mesh_of

CONFIG = load_preset("tiny-llama")
MODEL = FunctionalModel(CONFIG, ModelSection(preset="tiny-llama"))
P = PartitionSpec


def optimizer(**section: Any) -> tuple[OptimizerSection, optax.GradientTransformation]:
    given = OptimizerSection(**section)
    axes = {
        "/".join(path): spec.axes for path, spec in flatten(param_specs(CONFIG, scan_layers=True, param_scan_axis=1))
    }
    return given, make_optimizer(given, lambda count: 1e-3, axes)


def planned(mesh: Any, **section: Any) -> tuple[TrainState, StateShardings]:
    given, tx = optimizer(**section)
    abstract = abstract_state(MODEL, tx)
    return abstract, state_shardings(MODEL, tx, abstract, mesh, DEFAULT_RULES, given)


def specs(tree: Any) -> dict[str, PartitionSpec]:
    return {"/".join(path): sharding.spec for path, sharding in flatten(tree)}


OPTIMIZERS = [
    {},
    {"name": "adam_pax"},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adafactor"},
    {"name": "muon"},
    {"trainable": ("mlp/wo",)},
]


@pytest.mark.parametrize("section", OPTIMIZERS, ids=str)
def test_every_leaf_has_a_place_that_fits_its_shape(section: dict[str, Any]) -> None:
    abstract, shardings = planned(mesh_of(fsdp=4, tensor=2), **section)
    assert jax.tree.structure(shardings.state) == jax.tree.structure(abstract)
    assert jax.tree.structure(shardings.opt_state_in_step) == jax.tree.structure(abstract.opt_state)
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings.state), strict=True):
        sharding.shard_shape(leaf.shape)


@pytest.mark.parametrize("section", [{}, {"name": "adam_pax"}, {"name": "sgd", "momentum": 0.9}], ids=str)
def test_moments_lie_with_their_parameters(section: dict[str, Any]) -> None:
    mesh = mesh_of(fsdp=4, tensor=2)
    _, shardings = planned(mesh, **section)
    expected = param_shardings(CONFIG, mesh, DEFAULT_RULES, scan_layers=True, param_scan_axis=1)
    assert shardings.state.params == shardings.update == expected
    trees = [optax.tree.get(shardings.state.opt_state, name, None) for name in ("mu", "nu", "trace")]
    found = [tree for tree in trees if tree is not None]
    assert found and all(tree == expected for tree in found)
    assert expected["decoder"]["layers"]["mlp"]["wi_0"]["kernel"].spec == P("fsdp", None, "tensor")


def test_zero_1_splits_moments_over_data_and_leaves_parameters_whole() -> None:
    """On 8 replicas each device holds an eighth of every moment with a model axis (Rajbhandari et al. 2020)."""
    abstract, shardings = planned(mesh_of(data=8, fsdp=1), shard_over_data=True)
    assert set(specs(shardings.state.params).values()) == {P()}
    for name in ("mu", "nu"):
        moments = optax.tree.get(shardings.state.opt_state, name)
        whole = held = 0
        for (path, leaf), (_, sharding) in zip(flatten(abstract.params), flatten(moments), strict=True):
            size, part = leaf.size, int(np.prod(sharding.shard_shape(leaf.shape)))
            assert size == part * (1 if path[-1] == "scale" else 8), path
            whole, held = whole + size, held + part
        # Only the norms, 320 of 139,584 parameters, are on every device: 12.7 % where an eighth is 12.5 %.
        assert held / whole == pytest.approx(1 / 8, rel=0.02)
    assert shardings.update == optax.tree.get(shardings.state.opt_state, "mu")


def test_zero_1_joins_the_splits_over_fsdp() -> None:
    _, shardings = planned(mesh_of(data=2, fsdp=4), shard_over_data=True)
    kernel = shardings.update["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.spec == P(("fsdp", "data"))
    assert shardings.state.params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"].spec == P("fsdp")


@pytest.mark.parametrize("section", [{}, {"name": "adafactor"}, {"name": "muon"}], ids=str)
def test_on_the_host_rest_moments_alone(section: dict[str, Any]) -> None:
    abstract, shardings = planned(make_mesh(MeshSection(num_devices=1)), memory="pinned_host", **section)
    leaves = zip(
        jax.tree.leaves(abstract.opt_state),
        jax.tree.leaves(shardings.state.opt_state),
        jax.tree.leaves(shardings.opt_state_in_step),
        strict=True,
    )
    for leaf, resting, in_step in leaves:
        assert resting.memory_kind == ("pinned_host" if leaf.ndim else in_step.memory_kind), leaf
        assert in_step.memory_kind != "pinned_host" and in_step.spec == resting.spec
    others = jax.tree.leaves((shardings.state.params, shardings.state.step, shardings.update))
    assert all(sharding.memory_kind != "pinned_host" for sharding in others)


def test_frozen_parameters_have_no_place_for_moments() -> None:
    abstract, shardings = planned(mesh_of(), trainable=("mlp/wo",))
    assert len(jax.tree.leaves(optax.tree.get(shardings.state.opt_state, "mu"))) == 1
    assert len(jax.tree.leaves(abstract.opt_state)) == 4, "two moments and two counts"


def test_factored_moments_stay_whole_where_they_have_another_shape() -> None:
    abstract, shardings = planned(mesh_of(), name="adafactor")
    rows, factors = optax.tree.get(abstract.opt_state, "v_row"), optax.tree.get(shardings.state.opt_state, "v_row")
    assert all(leaf.shape == (1,) for leaf in jax.tree.leaves(rows))
    assert {sharding.spec for sharding in jax.tree.leaves(factors)} == {P()}


def test_the_first_state_is_the_models_weights_and_zeros_at_step_zero() -> None:
    mesh = make_mesh(MeshSection(num_devices=1))
    _, tx = optimizer()
    abstract, shardings = planned(mesh)
    state = init_state(MODEL, tx, shardings, None, seed=5)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    again, other = (init_state(MODEL, tx, shardings, None, seed=seed) for seed in (5, 6))
    table = "token_embedder"
    np.testing.assert_array_equal(state.params[table]["embedding"], again.params[table]["embedding"])
    assert (state.params[table]["embedding"] != other.params[table]["embedding"]).all()
    given = init_state(MODEL, tx, shardings, other.params, seed=5)
    assert given.params is other.params


def on_eight_devices() -> None:
    """Runs in a process of its own: real arrays lie where the plan says."""
    mesh = make_mesh(MeshSection(data=8, fsdp=1))
    usual = mesh.devices.flat[0].default_memory().kind
    for memory, split in (("device", True), ("pinned_host", False), ("pinned_host", True)):
        given, tx = optimizer(memory=memory, shard_over_data=split)
        abstract = abstract_state(MODEL, tx)
        shardings = state_shardings(MODEL, tx, abstract, mesh, DEFAULT_RULES, given)
        state = init_state(MODEL, tx, shardings, None, seed=0)
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(shardings.state), strict=True):
            assert leaf.sharding == expected, (leaf.sharding, expected)
        mu = optax.tree.get(state.opt_state, "mu")["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        held = {shard.device: shard.data.nbytes for shard in mu.addressable_shards}
        assert len(held) == 8 and set(held.values()) == {mu.nbytes // (8 if split else 1)}, held
        assert mu.sharding.memory_kind == (usual if memory == "device" else memory)
        print("placed")


@pytest.mark.multidevice
def test_arrays_lie_where_the_plan_says(run_on_devices: Any) -> None:
    assert run_on_devices(8, on_eight_devices).count("placed") == 3


def test_a_state_is_a_pytree_of_shardings_as_well_as_of_arrays() -> None:
    state = TrainState(1, {"a": 2}, {"b": 3})
    assert jax.tree.map(lambda leaf: leaf + 1, state) == TrainState(2, {"a": 3}, {"b": 4})
    whole = NamedSharding(mesh_of(), P())
    assert jax.tree.map(lambda _: whole, state).params == {"a": whole}
