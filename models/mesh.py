"""Building the device mesh of a recipe."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from recipes.schema import MeshSection

MESH_AXES = ("data", "stage", "fsdp", "context", "tensor", "expert")
"""Outer axes first: those whose traffic may cross slower links."""


def mesh_shape(section: MeshSection, num_devices: int) -> dict[str, int]:
    """The size of each axis; one axis may be -1 and takes what is left.

    Raises:
        ValueError: if the sizes don't multiply to the number of devices (of one slice).
    """
    sizes = {axis: getattr(section, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif fixed != num_devices:
        shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1"
        where = "" if section.dcn_data == 1 else f" of each of the {section.dcn_data} slices (mesh.dcn_data)"
        raise ValueError(
            f"mesh: {shape} does not fit {num_devices} devices{where}: the product of the axes must be the number of "
            "devices; change an axis or set one to -1"
        )
    return sizes


def make_mesh(section: MeshSection, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a recipe over `devices` (all of them, or the first `mesh.num_devices`).

    Neighbours on an axis are neighbours in the machine, as far as JAX knows its topology. With `mesh.dcn_data` the data
    axis is that many times as long, and crosses from slice to slice. Axes are Auto (the partitioner decides), since
    Tunix's code isn't written for Explicit ones.

    Raises:
        ValueError: if the devices don't fit the section.
    """
    chosen = list(jax.devices() if devices is None else devices)
    if section.num_devices is not None:
        chosen = _first_devices(chosen, section.num_devices)
    slices = section.dcn_data
    if len(chosen) % slices:
        raise ValueError(
            f"mesh.dcn_data={slices}: {len(chosen)} devices don't split into so many slices; set it to the number of "
            "slices, or to 1"
        )
    shape = list(mesh_shape(section, len(chosen) // slices).values())
    if section.num_devices is not None and slices == 1:
        # A part of a machine has no topology that JAX knows.
        arranged = np.array(chosen).reshape(shape)
    elif slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
    else:
        across = [slices if axis == "data" else 1 for axis in MESH_AXES]
        known = len({getattr(device, "slice_index", None) for device in chosen}) > 1
        try:
            # Where the devices don't say which slice they are of, a host is one.
            arranged = mesh_utils.create_hybrid_device_mesh(
                shape, across, chosen, process_is_granule=not known, allow_split_physical_axes=True
            )
        except ValueError as error:
            raise ValueError(f"mesh.dcn_data={slices}: {error}; set it to the number of slices") from None
    return Mesh(arranged, MESH_AXES)


def _first_devices(devices: list[jax.Device], count: int) -> list[jax.Device]:
    if count > len(devices):
        raise ValueError(f"mesh.num_devices={count}: only {len(devices)} devices are visible; lower it")
    left_out = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
    if left_out:
        raise ValueError(
            f"mesh.num_devices={count}: the hosts {sorted(left_out)} would have no device, and every host takes part; "
            "raise it, or start fewer hosts"
        )
    return devices[:count]
