"""How many rows a step loads and trains on, and how a host's rows become one global array."""

import math
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.sharding import Rules

Batch = TypeVar("Batch")
"""A frozen pytree whose arrays have rows along their first axis."""


@dataclass(frozen=True)
class BatchPlan:
    """The rows of one step over all hosts."""

    microbatches: int
    """Micro-batches whose gradients are summed."""
    rows_loaded: int
    """Rows read a step: at least one a device and micro-batch, so that they can be sharded."""
    rows_trained: int
    """Rows the loss counts a micro-batch; the rest of what was loaded is cut off."""

    @property
    def rows_per_microbatch(self) -> int:
        """Rows loaded for one micro-batch."""
        return self.rows_loaded // self.microbatches


def plan_batch(*, num_devices: int, per_device: float, microbatches: int, where: str) -> BatchPlan:
    """Rows for `per_device` rows a device, which may be a fraction.

    Args:
        num_devices: devices of the mesh.
        per_device: rows a device and micro-batch.
        microbatches: micro-batches a step.
        where: the recipe's key of `per_device`, for errors.

    Raises:
        ValueError: if no row is left, or a number above one isn't whole.
    """
    # A product that is whole may fall just short of it in floating point, as 100 * 0.29 does.
    trained = math.floor(num_devices * per_device + 1e-6)
    if trained < 1:
        raise ValueError(
            f"{where}={per_device}: {num_devices} devices x {per_device} rows leaves 0 rows a step; use at least "
            f"{1 / num_devices:g}"
        )
    if per_device > 1 and per_device != int(per_device):
        raise ValueError(
            f"{where}={per_device}: a device holds whole rows, so only a number below 1 may be a fraction; use "
            f"{int(per_device)} or {int(per_device) + 1}"
        )
    loaded = num_devices * max(1, int(per_device))
    return BatchPlan(microbatches, loaded * microbatches, trained)


def check_divisible(plan: BatchPlan, mesh: Mesh, rules: Rules, *, sequence_length: int) -> None:
    """Refuses a batch that the mesh can't split.

    Raises:
        ValueError: naming the key to change.
    """
    axes = {name: rules.get(name, ()) for name in ("batch", "time")}
    ways = {name: math.prod(mesh.shape.get(axis, 1) for axis in axes[name]) for name in axes}
    if plan.rows_per_microbatch % ways["batch"]:
        raise ValueError(
            f"train.per_device_batch_size: {plan.rows_per_microbatch} rows a micro-batch don't split over the mesh's "
            f"{ways['batch']} batch shards; change train.per_device_batch_size or the mesh"
        )
    if sequence_length % ways["time"]:
        raise ValueError(
            f"data.sequence_length={sequence_length}: not divisible by mesh.context={ways['time']}; change one of them"
        )


@dataclass(frozen=True)
class HostShare:
    """Which part of a batch's rows a host reads: the `index`-th of `count` equal parts."""

    index: int
    count: int


def host_share(sharding: NamedSharding, rows: int, sequence_length: int) -> HostShare:
    """This host's part of [rows, sequence_length] arrays.

    Hosts whose devices hold the same rows (a tensor or context axis runs across them) have the same part, and read the
    same documents.

    Raises:
        ValueError: if parts overlap without being equal, so that hosts could not each read their own.
    """
    held: dict[int, set[tuple[int, int, int]]] = {}
    for device, (row_slice, _) in sharding.devices_indices_map((rows, sequence_length)).items():
        held.setdefault(device.process_index, set()).add(row_slice.indices(rows))  # type: ignore[attr-defined]
    parts = sorted({tuple(sorted(slices)) for slices in held.values()})
    if sum(stop - start for part in parts for start, stop, _ in part) != rows:
        raise ValueError(
            f"mesh: {dict(sharding.mesh.shape)} over {len(held)} hosts: hosts share some of their rows but not all, so "
            "none can read its own; let mesh.tensor and mesh.context fit within a host, or span whole hosts"
        )
    return HostShare(parts.index(tuple(sorted(held[jax.process_index()]))), len(parts))


def place(batch: Batch, sharding: NamedSharding, share: HostShare) -> Batch:
    """Makes global arrays of a host's rows.

    Args:
        batch: a pytree of numpy arrays [rows / share.count, ..., T]; one axis alone is that of rows.
        sharding: of [rows, T] arrays; axes between the two are whole on every device.
        share: this host's part of the rows.
    """

    def globally(own: np.ndarray) -> jax.Array:
        placed = field_sharding(sharding, own.ndim)
        if jax.process_count() == 1:
            return jax.device_put(own, placed)
        shape = (own.shape[0] * share.count, *own.shape[1:])
        return jax.make_array_from_process_local_data(placed, own, shape)

    return jax.tree.map(globally, batch)


def field_sharding(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """The sharding of a batch's field with `ndim` axes, given that of [rows, T] arrays."""
    if ndim == 2:
        return sharding
    rows, time = (*sharding.spec, None, None)[:2]
    if ndim == 1:
        return NamedSharding(sharding.mesh, PartitionSpec(rows))
    return NamedSharding(sharding.mesh, PartitionSpec(rows, *[None] * (ndim - 2), time))


def split_microbatches(batch: Batch, plan: BatchPlan) -> Batch:
    """[B, ...] arrays to [G, rows trained, ...]: micro-batch i holds rows i, i + G, ..., so each device keeps its own.

    Rows beyond `plan.rows_trained` of each micro-batch are cut off.
    """

    def split(rows: jax.Array) -> jax.Array:
        grouped = rows.reshape(plan.rows_per_microbatch, plan.microbatches, *rows.shape[1:])
        return grouped.swapaxes(0, 1)[:, : plan.rows_trained]

    return jax.tree.map(split, batch)


def join_microbatches(rows: Batch) -> Batch:
    """[G, rows, ...] arrays back to [B, ...]: the inverse of `split_microbatches` where every row is trained."""
    return jax.tree.map(lambda micro: micro.swapaxes(0, 1).reshape(-1, *micro.shape[2:]), rows)
