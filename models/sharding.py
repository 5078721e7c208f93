"""Logical axes to mesh axes: where parameters and activations live on a mesh."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.config import TransformerConfig
from models.parameters import is_spec, param_specs

Rules = Mapping[str, tuple[str, ...]]

DEFAULT_RULES: Rules = {
    # Parameters.
    "embed": ("fsdp", "context", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "layers": ("stage",),
    # Activations.
    "batch": ("data", "fsdp", "expert"),
    "time": ("context",),
    "activation_embed": (),
    "activation_heads": ("tensor",),
    "activation_mlp": ("tensor",),
    "activation_vocab": ("tensor",),
}
"""A logical axis is split over the mesh axes listed; one that isn't listed is not split."""

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("activation_mesh", default=None)


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...] | None, mesh: Mesh, rules: Rules
) -> PartitionSpec:
    """Maps logical axes to a partition of `mesh`.

    A mesh axis serves one dimension only, the first that asks; an axis of size 1 is left out; so is one that doesn't
    divide the dimension (with `shape` given), since a parameter then stays whole rather than padded.
    """
    taken: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for position, name in enumerate(axes):
        chosen: list[str] = []
        size = 1
        for axis in rules.get(name, ()) if name is not None else ():
            extent = mesh.shape.get(axis, 1)
            if extent == 1 or axis in taken:
                continue
            if shape is not None and shape[position] % (size * extent):
                continue
            chosen.append(axis)
            taken.add(axis)
            size *= extent
        entries.append(tuple(chosen) or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*[entry[0] if entry is not None and len(entry) == 1 else entry for entry in entries])


def param_shardings(
    config: TransformerConfig, mesh: Mesh, rules: Rules, *, scan_layers: bool, param_scan_axis: int
) -> dict[str, Any]:
    """A NamedSharding for each parameter, in Linen's naming."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, partition_spec(spec.axes, spec.shape, mesh, rules)),
        param_specs(config, scan_layers=scan_layers, param_scan_axis=param_scan_axis),
        is_leaf=is_spec,
    )


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """The sharding of [B, T] arrays."""
    return NamedSharding(mesh, partition_spec(("batch", "time"), None, mesh, rules))


@contextlib.contextmanager
def activation_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Within it, `constrain` pins activations to `mesh`; enter it around the function that jit traces."""
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to the active mesh by its logical axes; the identity outside `activation_mesh`."""
    active = _ACTIVE.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, rules)))
