"""Building the device mesh of a recipe."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from recipes.schema import MeshSection

MESH_AXES = ("data", "stage", "fsdp", "context", "tensor", "expert")
"""Outer axes first: those whose traffic may cross slower links."""


def mesh_shape(section: MeshSection, num_devices: int) -> dict[str, int]:
    """The size of each axis; one axis may be -1 and takes what is left.

    Raises:
        ValueError: if the sizes don't multiply to the number of devices.
    """
    sizes = {axis: getattr(section, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise ValueError(f"mesh: {' and '.join(free)} are -1: only one axis can take what is left; set the others")
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
        raise ValueError(
            f"mesh: {shape} does not fit {num_devices} devices: the product of the axes must be the number of "
            "devices; change an axis or set one to -1"
        )
    return sizes


def make_mesh(section: MeshSection, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a recipe over `devices` (all of them, or the first `mesh.num_devices`).

    Axes are Auto (the partitioner decides), since Tunix's code isn't written for Explicit ones.
    """
    chosen = list(jax.devices() if devices is None else devices)
    if section.num_devices is not None:
        if section.num_devices > len(chosen):
            raise ValueError(
                f"mesh.num_devices={section.num_devices}: only {len(chosen)} devices are visible; lower it"
            )
        chosen = chosen[: section.num_devices]
    shape = mesh_shape(section, len(chosen))
    return Mesh(np.array(chosen).reshape([shape[axis] for axis in MESH_AXES]), MESH_AXES)
