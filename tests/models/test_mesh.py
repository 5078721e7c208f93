"""The mesh of a recipe: sizes, order, slices, and what does not fit."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from models.mesh import MESH_AXES, make_mesh, mesh_shape
from recipes import schema
from recipes.schema import MeshSection
from tests.models.devices import Device, hosts, mesh_of


def ids(section: MeshSection, devices: list[Any]) -> np.ndarray:
    """The devices' numbers, axes of one left out."""
    return np.vectorize(lambda device: device.id)(make_mesh(section, devices).devices).squeeze()


def test_axes_are_the_schemas() -> None:
    assert sorted(MESH_AXES) == sorted(schema.MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, {"fsdp": 8}),
        ({"fsdp": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
        ({"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": -1, "fsdp": 1}, {"data": 8}),
        ({"fsdp": 2, "context": 2, "expert": -1}, {"fsdp": 2, "context": 2, "expert": 2}),
        ({"data": 8}, {"data": 8}),
    ],
)
def test_one_axis_takes_what_is_left(axes: dict[str, int], expected: dict[str, int]) -> None:
    assert mesh_shape(MeshSection(**axes), 8) == {**dict.fromkeys(MESH_AXES, 1), **expected}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 3}, "mesh: fsdp=-1 x tensor=3 does not fit 8 devices: the product of the axes must be the number"),
        ({"fsdp": 4}, "mesh: fsdp=4 does not fit 8 devices"),
        ({"fsdp": 4, "data": 4}, "mesh: data=4 x fsdp=4 does not fit 8 devices"),
        ({"fsdp": 1}, "mesh: 1 does not fit 8 devices"),
        ({"fsdp": 4, "dcn_data": 2, "data": 2}, "does not fit 4 devices of each of the 2 slices"),
        ({"dcn_data": 3}, "mesh.dcn_data=3: 8 devices don't split into so many slices; set it to the number of slices"),
        ({"num_devices": 9}, "mesh.num_devices=9: only 8 devices are visible; lower it"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_of(**axes)


def test_inner_axes_join_neighbours() -> None:
    """tensor, whose traffic is heaviest, runs over neighbouring devices; data, the outermost, over the farthest."""
    np.testing.assert_array_equal(
        ids(MeshSection(data=2, fsdp=2, tensor=2), hosts(1, 8)), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    )


def test_the_first_devices_may_be_asked_for_if_every_host_keeps_one() -> None:
    np.testing.assert_array_equal(ids(MeshSection(num_devices=3), hosts(1, 8)), [0, 1, 2])
    np.testing.assert_array_equal(ids(MeshSection(num_devices=6), hosts(2, 4)), range(6))
    with pytest.raises(ValueError, match=r"mesh\.num_devices=4: the hosts \[1\] would have no device, and every host"):
        mesh_of(2, 4, num_devices=4)


def test_slices_are_the_outer_part_of_the_data_axis() -> None:
    """Devices of two slices in alternation: each slice is one half of the data axis, whatever the devices' order."""
    devices = [Device(index, slice_index=index % 2) for index in range(8)]
    section = MeshSection(dcn_data=2, tensor=2)
    assert make_mesh(section, devices).shape["data"] == 2
    np.testing.assert_array_equal(ids(section, devices), [[[0, 2], [4, 6]], [[1, 3], [5, 7]]])
    section = MeshSection(dcn_data=2, data=2, fsdp=2)
    assert dict(make_mesh(section, devices).shape) == {**dict.fromkeys(MESH_AXES, 1), "data": 4, "fsdp": 2}
    np.testing.assert_array_equal(ids(section, devices), [[0, 2], [4, 6], [1, 3], [5, 7]])


def test_a_host_is_a_slice_where_devices_name_none() -> None:
    np.testing.assert_array_equal(ids(MeshSection(dcn_data=2), hosts(2, 4)), [[0, 1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(ValueError, match=r"mesh\.dcn_data=4: Number of slices 2 .*; set it to the number of slices"):
        mesh_of(2, 4, dcn_data=4)


def test_axes_are_left_to_the_partitioner_and_all_devices_are_the_default() -> None:
    """Tunix's code isn't written for Explicit axes, which jax.make_mesh now makes."""
    mesh = make_mesh(MeshSection())
    assert mesh.axis_names == MESH_AXES and list(mesh.devices.flat) == jax.devices()
    assert set(mesh.axis_types) == {AxisType.Auto}
