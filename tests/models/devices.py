"""Devices that exist only by name, for tests of where things would go."""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from models.mesh import make_mesh
from recipes.schema import MeshSection


@dataclass(frozen=True)
class Device:
    """What a mesh reads of a device."""

    id: int
    process_index: int = 0
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"


def hosts(num_hosts: int, per_host: int) -> list[Any]:
    """The devices of some hosts, in JAX's order."""
    return [Device(index, process_index=index // per_host) for index in range(num_hosts * per_host)]


def mesh_of(num_hosts: int = 1, per_host: int = 8, **axes: int) -> Mesh:
    """A mesh over such devices."""
    return make_mesh(MeshSection(**axes), hosts(num_hosts, per_host))
