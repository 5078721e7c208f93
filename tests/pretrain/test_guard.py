"""Signals that are noted, votes on them, and the batch that is kept for a look."""

import signal
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.mesh import make_mesh
from pretrain.data.batch import FIELD_NAMES, TokenBatch
from pretrain.guard import DataEnded, StopRequest, StopVote, save_batch
from recipes.schema import MeshSection


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_acts_as_before(number: signal.Signals) -> None:
    before = []
    original = signal.signal(number, lambda *_: before.append("as before"))
    try:
        with StopRequest() as stop:
            assert stop.name is None
            signal.raise_signal(number)
            assert stop.name == number.name and before == []
            signal.raise_signal(number)
            assert before == ["as before"]
        signal.raise_signal(number)
        assert before == ["as before"] * 2, "what was there is put back"
    finally:
        signal.signal(number, original)


def test_handlers_are_put_back_where_no_signal_came_and_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), StopRequest():
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    """Python lets only the main thread set handlers; a run in another thread still runs."""
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend([stop.name, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]


def test_a_host_that_is_alone_hears_its_own_signal_at_once() -> None:
    with StopRequest() as stop:
        vote = StopVote(stop)
        assert not vote()
        signal.raise_signal(signal.SIGTERM)
        assert vote()


def test_several_hosts_read_the_sum_of_their_flags_one_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process stands for a host of two, so that its flag makes the sum; real hosts are in test_distributed.py."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with StopRequest() as stop:
        vote = StopVote(stop)
        assert [vote(), vote()] == [False, False]
        signal.raise_signal(signal.SIGTERM)
        assert [vote(), vote()] == [False, True]


def batch(rows: int = 8, length: int = 6) -> TokenBatch:
    block = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    return TokenBatch(**{name: block + 1000 * index for index, name in enumerate(FIELD_NAMES)})


def test_a_kept_batch_is_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "new" / "batch.npz"
    save_batch(jax.tree.map(jax.numpy.asarray, batch()), path)
    with np.load(path) as kept:
        assert set(kept.files) == set(FIELD_NAMES)
        for name in FIELD_NAMES:
            assert kept[name].dtype == np.int32
            np.testing.assert_array_equal(kept[name], getattr(batch(), name))


def on_eight_devices(folder: str) -> None:
    """Runs in a process of its own: rows split, columns split, and the same cells on several devices."""
    mesh = make_mesh(MeshSection(data=2, fsdp=2, context=2))
    specs = {
        "rows": PartitionSpec(("data", "fsdp"), "context"),
        "swapped": PartitionSpec(("fsdp", "data")),
        "columns": PartitionSpec(None, "context"),
        "whole": PartitionSpec(),
    }
    for name, spec in specs.items():
        placed = jax.device_put(batch(), NamedSharding(mesh, spec))
        path = Path(folder) / f"{name}.npz"
        save_batch(placed, path)
        with np.load(path) as kept:
            for field in FIELD_NAMES:
                np.testing.assert_array_equal(kept[field], getattr(batch(), field), err_msg=f"{name}: {field}")
        print("same")


@pytest.mark.multidevice
def test_a_sharded_batch_is_pieced_together(tmp_path: Path, run_on_devices: Any) -> None:
    assert run_on_devices(8, on_eight_devices, str(tmp_path)).count("same") == 4


def test_the_end_of_data_is_a_users_error() -> None:
    assert issubclass(DataEnded, ValueError)
