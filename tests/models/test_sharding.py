"""Rules from logical axes to mesh axes: what is split, what stays whole, and that pinning changes no number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.config import load_preset
from models.mesh import make_mesh
from models.parameters import flatten
from models.sharding import (
    DEFAULT_RULES,
    activation_mesh,
    batch_sharding,
    constrain,
    param_shardings,
    partition_spec,
)
from recipes.schema import MeshSection
from tests.models.devices import mesh_of

P = PartitionSpec


@pytest.mark.parametrize(
    ("axes", "shape", "mesh", "expected"),
    [
        # Each logical axis goes to its mesh axes, trailing Nones dropped, axes of size one left out.
        (("embed", "heads", "head_dim"), (64, 4, 16), {"fsdp": 4, "tensor": 2}, P("fsdp", "tensor")),
        (("mlp", "embed"), (128, 64), {"fsdp": 4, "tensor": 2}, P("tensor", "fsdp")),
        (("vocab", "embed"), (512, 64), {"fsdp": 8}, P(None, "fsdp")),
        (("norm",), (64,), {"fsdp": 8}, P()),
        (("batch", "time"), None, {"data": 2, "fsdp": 2, "context": 2}, P(("data", "fsdp"), "context")),
        # The rule's axes join on one dimension as far as they divide it.
        (("embed",), (64,), {"fsdp": 4, "context": 2}, P(("fsdp", "context"))),
        (("embed",), (4,), {"fsdp": 4, "context": 2}, P("fsdp")),
        # What does not divide stays whole, and its mesh axis is free for a later dimension.
        (("embed",), (6,), {"fsdp": 4, "tensor": 2}, P()),
        (("kv_heads",), (1,), {"fsdp": 4, "tensor": 2}, P()),
        (("heads", "mlp"), (3, 8), {"fsdp": 4, "tensor": 2}, P(None, "tensor")),
        (("embed",), (2,), {"fsdp": 4, "context": 2}, P("context")),
        # A mesh axis serves the first dimension that asks for it.
        (("heads", "mlp"), (4, 8), {"fsdp": 4, "tensor": 2}, P("tensor")),
        # Unnamed and unknown axes are never split.
        ((None, "nothing", "embed"), (8, 8, 8), {"fsdp": 8}, P(None, None, "fsdp")),
    ],
)
def test_axes_map_by_the_rules(
    axes: tuple[str | None, ...], shape: tuple[int, ...] | None, mesh: dict[str, int], expected: PartitionSpec
) -> None:
    assert partition_spec(axes, shape, mesh_of(**mesh), DEFAULT_RULES) == expected


def test_a_rule_of_the_recipe_replaces_ours() -> None:
    mesh = mesh_of(data=2, fsdp=4)
    rules = {**DEFAULT_RULES, "embed": ("data",), "mlp": ("fsdp",)}
    assert partition_spec(("embed", "mlp"), (64, 128), mesh, rules) == P("data", "fsdp")


def test_rules_name_mesh_axes_only() -> None:
    assert {axis for axes in DEFAULT_RULES.values() for axis in axes} <= set(mesh_of().axis_names)


@pytest.mark.parametrize("preset", ["llama3.1-8b", "gemma2-9b", "qwen3-8b"])
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_every_large_parameter_of_a_real_model_is_split_over_all_devices(preset: str, axes: dict[str, int]) -> None:
    from models.parameters import param_specs

    config, mesh = load_preset(preset), mesh_of(**axes)
    specs = dict(flatten(param_specs(config, scan_layers=True, param_scan_axis=1)))
    shardings = dict(flatten(param_shardings(config, mesh, DEFAULT_RULES, scan_layers=True, param_scan_axis=1)))
    assert shardings.keys() == specs.keys()
    for path, spec in specs.items():
        size, ways = int(np.prod(spec.shape)), 1
        for entry in shardings[path].spec:
            for axis in (entry,) if isinstance(entry, str) else entry or ():
                ways *= mesh.shape[axis]
        assert ways == (8 if size > 2**20 else ways), (path, spec.shape, shardings[path].spec)
        assert (path[-1] in ("scale", "bias")) == (ways == 1), path


def test_constrain_is_the_identity_without_a_mesh_and_on_a_mesh_of_one() -> None:
    x = jnp.ones((2, 3, 4))
    assert constrain(x, "batch", "time", "activation_embed") is x
    one = make_mesh(MeshSection(num_devices=1))
    with activation_mesh(one, DEFAULT_RULES):
        assert constrain(x, "batch", "time", "activation_embed") is x
    assert batch_sharding(one, DEFAULT_RULES) == NamedSharding(one, P())


def test_the_active_mesh_is_left_again_even_by_an_error() -> None:
    x = jnp.ones((8, 3))
    with pytest.raises(RuntimeError), activation_mesh(mesh_of(), DEFAULT_RULES):
        raise RuntimeError
    assert constrain(x, "batch", "time") is x


def on_eight_devices() -> None:
    """Runs in a process of its own."""
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    rules = {**DEFAULT_RULES, "activation_mlp": ("tensor",)}
    x = jnp.arange(4 * 3 * 6, dtype=jnp.float32).reshape(4, 3, 6)

    @jax.jit
    def double(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return constrain(x * 2, "batch", "time", "activation_mlp"), constrain(x[:3] * 2, "batch", "time", None)

    with activation_mesh(mesh, rules):
        whole, odd = double(x)
    np.testing.assert_array_equal(whole, x * 2)
    assert whole.sharding.spec == P(("data", "fsdp"), None, "tensor"), whole.sharding
    assert whole.addressable_shards[0].data.shape == (1, 3, 3)
    # Three rows don't split over four devices: they stay whole rather than fail.
    np.testing.assert_array_equal(odd, x[:3] * 2)
    assert odd.sharding.is_fully_replicated, odd.sharding
    print("pinned")


@pytest.mark.multidevice
def test_constrain_pins_to_the_active_mesh_and_changes_no_number(run_on_devices: Any) -> None:
    assert "pinned" in run_on_devices(8, on_eight_devices)
