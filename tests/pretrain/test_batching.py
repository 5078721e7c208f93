"""Rows a step, rows a host, and what the mesh cannot split."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.mesh import make_mesh
from models.sharding import DEFAULT_RULES, batch_sharding
from pretrain.batching import (
    BatchPlan,
    HostShare,
    check_divisible,
    host_share,
    place,
    plan_batch,
    split_microbatches,
)
from pretrain.data.batch import FIELD_NAMES, TokenBatch
from recipes.schema import MeshSection
from tests.models.devices import mesh_of


def planned(num_devices: int, per_device: float, microbatches: int = 1) -> BatchPlan:
    return plan_batch(num_devices=num_devices, per_device=per_device, microbatches=microbatches, where="key")


@pytest.mark.parametrize(
    ("devices", "per_device", "microbatches", "loaded", "trained"),
    [
        (8, 1.0, 1, 8, 8),
        (8, 4.0, 2, 64, 32),
        # FEATURES B4: int(devices * p) rows are trained, and a row a device is loaded so that they can be sharded.
        (8, 0.5, 1, 8, 4),
        (8, 0.5, 2, 16, 4),
        (8, 0.3, 1, 8, 2),
        (8, 0.125, 1, 8, 1),
        (1, 3.0, 1, 3, 3),
        # Products that floating point leaves just short of 29 and of 57.
        (100, 0.29, 1, 100, 29),
        (100, 0.57, 1, 100, 57),
    ],
)
def test_rows_follow_from_devices(
    devices: int, per_device: float, microbatches: int, loaded: int, trained: int
) -> None:
    plan = planned(devices, per_device, microbatches)
    assert plan == BatchPlan(microbatches, loaded, trained)
    assert plan.rows_per_microbatch == loaded // microbatches


@pytest.mark.parametrize(
    ("devices", "per_device", "message"),
    [
        (8, 0.1, "key=0.1: 8 devices x 0.1 rows leaves 0 rows a step; use at least 0.125"),
        (8, 1.5, "key=1.5: a device holds whole rows, so only a number below 1 may be a fraction; use 1 or 2"),
        (8, 2.05, "key=2.05: a device holds whole rows"),
    ],
)
def test_rows_that_cannot_be_are_refused(devices: int, per_device: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        planned(devices, per_device)


@pytest.mark.parametrize(
    ("axes", "rows", "length", "message"),
    [
        ({"fsdp": 8}, 8, 30, None),
        ({"data": 2, "fsdp": 2, "expert": 2}, 8, 30, None),
        ({"fsdp": 2, "context": 4}, 4, 32, None),
        ({"fsdp": 8}, 12, 30, "train.per_device_batch_size: 12 rows a micro-batch don't split over the mesh's 8 batch"),
        ({"fsdp": 2, "context": 4}, 8, 30, "data.sequence_length=30: not divisible by mesh.context=4"),
    ],
)
def test_a_batch_that_the_mesh_cannot_split_is_refused(
    axes: dict[str, int], rows: int, length: int, message: str | None
) -> None:
    plan = BatchPlan(2, 2 * rows, rows)
    if message is None:
        check_divisible(plan, mesh_of(**axes), DEFAULT_RULES, sequence_length=length)
        return
    with pytest.raises(ValueError, match=message):
        check_divisible(plan, mesh_of(**axes), DEFAULT_RULES, sequence_length=length)


def numbered(rows: int, length: int = 3) -> TokenBatch:
    """Row r holds r everywhere, field f adds 100 f."""
    block = np.repeat(np.arange(rows, dtype=np.int32)[:, None], length, axis=1)
    return TokenBatch(**{name: block + 100 * index for index, name in enumerate(FIELD_NAMES)})


def test_micro_batch_i_holds_every_gth_row_from_the_ith_and_loses_the_rows_that_are_not_trained() -> None:
    micros = split_microbatches(jax.tree.map(jnp.asarray, numbered(8)), BatchPlan(2, 8, 3))
    assert micros.inputs.shape == (2, 3, 3)
    np.testing.assert_array_equal(micros.inputs[:, :, 0], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(micros.targets_segmentation[:, :, 1], np.array([[0, 2, 4], [1, 3, 5]]) + 500)


# --- several hosts, by devices that exist in name only ---


def shares(monkeypatch: pytest.MonkeyPatch, num_hosts: int, per_host: int, **axes: int) -> list[HostShare]:
    """The share of every host."""
    sharding = batch_sharding(mesh_of(num_hosts, per_host, **axes), DEFAULT_RULES)
    found = []
    for host in range(num_hosts):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        found.append(host_share(sharding, 48, 32))
    return found


def test_hosts_read_rows_of_their_own_where_rows_are_split_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for axes in ({}, {"data": 2}, {"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}, {"context": 4}):
        assert shares(monkeypatch, 2, 4, **axes) == [HostShare(0, 2), HostShare(1, 2)], axes
    assert shares(monkeypatch, 4, 2) == [HostShare(index, 4) for index in range(4)]


def test_hosts_that_hold_the_same_rows_read_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for axes in ({"tensor": 8}, {"context": 8}, {"fsdp": 1, "tensor": 2, "context": 4}):
        assert shares(monkeypatch, 2, 4, **axes) == [HostShare(0, 1), HostShare(0, 1)], axes
    # Tensor over two hosts each: hosts 0 and 1 are one reader, 2 and 3 another.
    expected = [HostShare(0, 2), HostShare(0, 2), HostShare(1, 2), HostShare(1, 2)]
    assert shares(monkeypatch, 4, 2, tensor=4) == expected


@pytest.mark.parametrize("axes", [{"fsdp": 6, "tensor": 2}, {"fsdp": 3, "tensor": 4}], ids=str)
def test_hosts_that_share_some_of_their_rows_are_refused(monkeypatch: pytest.MonkeyPatch, axes: dict[str, int]) -> None:
    """Four hosts of three devices: pairs or fours of devices that hold the same rows straddle two hosts."""
    with pytest.raises(ValueError, match=r"^mesh: .* over 4 hosts: hosts share some of their rows but not all"):
        shares(monkeypatch, 4, 3, **axes)


def test_a_single_host_reads_all_rows_and_places_them_as_they_are() -> None:
    mesh = make_mesh(MeshSection(num_devices=1))
    sharding = batch_sharding(mesh, DEFAULT_RULES)
    share = host_share(sharding, 4, 3)
    assert share == HostShare(0, 1)
    placed = place(numbered(4), sharding, share)
    for name in FIELD_NAMES:
        field = getattr(placed, name)
        assert isinstance(field, jax.Array) and field.sharding == sharding and field.dtype == jnp.int32
        np.testing.assert_array_equal(field, getattr(numbered(4), name))


def test_a_host_hands_in_its_part_and_names_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        jax,
        "make_array_from_process_local_data",
        lambda *args: calls.append(args) or jnp.zeros(1),  # type: ignore[func-returns-value]
    )
    sharding = batch_sharding(mesh_of(2, 4), DEFAULT_RULES)
    place(numbered(4), sharding, HostShare(1, 2))
    assert [(args[0], args[1].shape, args[2]) for args in calls] == [(sharding, (4, 3), (8, 3))] * 6


def on_eight_devices() -> None:
    """Runs in a process of its own: each device keeps its own rows through the split into micro-batches."""
    mesh = make_mesh(MeshSection(data=2, fsdp=4))
    sharding = batch_sharding(mesh, DEFAULT_RULES)
    placed = place(numbered(32), sharding, HostShare(0, 1))
    split = jax.jit(lambda batch: split_microbatches(batch, BatchPlan(2, 32, 16)))(placed)
    held = {shard.device: set(np.asarray(shard.data)[:, 0].tolist()) for shard in placed.inputs.addressable_shards}
    kept = {
        shard.device: set(np.asarray(shard.data)[..., 0].ravel().tolist()) for shard in split.inputs.addressable_shards
    }
    assert held == kept and all(len(rows) == 4 for rows in held.values()), (held, kept)
    assert host_share(sharding, 32, 3) == HostShare(0, 1)
    print("kept")


@pytest.mark.multidevice
def test_a_split_into_micro_batches_moves_no_row_to_another_device(run_on_devices: Any) -> None:
    assert "kept" in run_on_devices(8, on_eight_devices)
