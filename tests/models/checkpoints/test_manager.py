"""The steps of a run: whole or absent at every moment, never loaded when damaged, never deleted without a word."""

import errno
import logging
import os
import resource
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models.checkpoints import manager as manager_module
from models.checkpoints import manifest, store
from models.checkpoints.manager import CheckpointManager, SaveError, latest_verified, list_steps, load_step
from models.checkpoints.run_info import read_run_info
from tests.models.checkpoints.run_states import (
    OPTIONS,
    a_data_file,
    assert_holds,
    flip_bit,
    on_device,
    run_info,
    save_steps,
    state,
    temporaries,
)


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def gate(monkeypatch):
    """Holds every save just before its manifest is written, until the test opens the gate."""
    opened, reached = threading.Event(), threading.Event()
    real = manifest.write_manifest

    def held(step_dir, *, known):
        reached.set()
        assert opened.wait(300)
        real(step_dir, known=known)

    monkeypatch.setattr(manifest, "write_manifest", held)
    return opened, reached


@pytest.mark.parametrize("blocking", [True, False])
def test_a_step_holds_items_run_info_and_manifest_and_comes_back_exactly(root, blocking):
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        for step in (5, 10):
            outcome = manager.save(step, on_device(state(step)), run_info(step), blocking=blocking)
            assert outcome == ("written" if blocking else "writing")
        assert manager.latest_verified("full") == (10, [])
        assert manager.steps() == [5, 10]
        target = {"params": store.read_metadata(root / "10/items")["params"]}
        params, info = manager.restore(10, target, only=["params"], cast=False, mode="quick")
    assert np.array_equal(params["params"]["params"]["kernel"], state(10)["params"]["params"]["kernel"])
    assert info == read_run_info(root / "10") and info.model == {"family": "llama", "embed_dim": 8}
    assert sorted(os.listdir(root / "5")) == ["items", "manifest.json", "run.json"]
    assert sorted(os.listdir(root)) == [".lock", "10", "5"]
    assert_holds(root / "5", 5)
    assert_holds(root / "10", 10)


def test_maxtexts_kind_of_reader_finds_and_restores_our_steps(root):
    save_steps(root, 5, 10)
    reader = ocp.CheckpointManager(
        root,
        item_names=("items",),
        item_handlers={"items": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)},
    )
    assert reader.all_steps() == [5, 10] or sorted(reader.all_steps()) == [5, 10]
    restored = reader.restore(10, args=ocp.args.Composite(items=ocp.args.PyTreeRestore()))["items"]
    assert np.array_equal(restored["opt_state"]["0"]["mu"], state(10)["opt_state"]["0"]["mu"])
    assert restored["opt_state"]["1"] is None
    reader.close()


def test_an_empty_or_absent_folder_has_no_step(root):
    assert latest_verified(root, "full") == (None, [])
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        assert manager.latest_verified("full") == (None, [])


def test_an_asynchronous_save_is_invisible_until_it_is_complete_and_the_next_one_waits(root, gate):
    opened, reached = gate
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        assert manager.save(1, on_device(state(1)), run_info(1), blocking=False) == "writing"
        assert reached.wait(300)
        assert list_steps(root) == [] and latest_verified(root, "full") == (None, [])
        threading.Timer(0.3, opened.set).start()
        manager.save(2, on_device(state(2)), run_info(2), blocking=False)
        assert opened.is_set() and 1 in list_steps(root)
    assert list_steps(root) == [1, 2]


def test_values_may_be_donated_while_the_save_is_still_writing(root, gate):
    opened, _ = gate
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0)
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        items = on_device(state(3))
        manager.save(3, items, run_info(3), blocking=False)
        jax.block_until_ready(overwrite(overwrite(items)))
        opened.set()
    assert_holds(root / "3", 3)


def fill_the_disk(monkeypatch) -> None:
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("surface", ["blocking save", "wait", "close", "next save", "leaving the context"])
def test_a_full_disk_is_an_error_at_the_next_call_and_leaves_the_last_step_alone(root, monkeypatch, surface):
    save_steps(root, 1)
    manager = CheckpointManager(root, options=OPTIONS, keep=1)
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        with pytest.raises(
            SaveError, match=r"2: not saved: .*No space left.*the steps \[1\] are as they were"
        ) as error:
            manager.save(2, on_device(state(2)), run_info(2), blocking=surface == "blocking save")
            if surface == "wait":
                manager.wait()
            elif surface == "close":
                manager.close()
            elif surface == "next save":
                manager.save(3, on_device(state(3)), run_info(3), blocking=False)
            else:
                with manager:
                    pass
        assert error.value.errno == errno.ENOSPC and "free space or lower checkpoint.keep" in str(error.value)
    assert list_steps(root) == [1] and temporaries(root) == []
    assert_holds(root / "1", 1)
    manager.close()
    save_steps(root, 2)
    assert_holds(root / "2", 2)


def test_an_error_is_raised_once_and_the_manager_goes_on(root, monkeypatch):
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        with monkeypatch.context() as patch:
            fill_the_disk(patch)
            manager.save(1, on_device(state(1)), run_info(1), blocking=False)
            with pytest.raises(SaveError):
                manager.wait()
        manager.wait()
        assert manager.save(1, on_device(state(1)), run_info(1), blocking=True) == "written"
    assert_holds(root / "1", 1)


def test_a_file_that_the_system_refuses_to_write_fails_the_save_from_inside_orbax(root):
    save_steps(root, 1)
    noise = {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointManager(root, options=OPTIONS, keep=1) as manager:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            manager.save(2, noise, run_info(2), blocking=False)
            with pytest.raises(SaveError, match="2: not saved") as error:
                manager.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.value.errno == errno.EFBIG
        assert list_steps(root) == [1]
    assert_holds(root / "1", 1)


def test_a_tree_that_cannot_be_stored_leaves_nothing_behind(root):
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        with pytest.raises(ValueError, match="cannot be stored"):
            manager.save(1, {"a.b": jnp.ones(1)}, run_info(1), blocking=False)
        with pytest.raises(ValueError, match="run_info of step 1: step=2: both count completed steps"):
            manager.save(1, on_device(state(1)), run_info(2), blocking=False)
        with pytest.raises(ValueError, match="recipe_hash"):
            manager.save(1, on_device(state(1)), {"format": "posttrain-1"}, blocking=False)
    assert list_steps(root) == [] and temporaries(root) == []


def test_the_newest_sound_steps_are_kept_and_each_deletion_is_logged(root, caplog):
    caplog.set_level(logging.INFO, logger=manager_module.__name__)
    save_steps(root, 1, 2, 3, 4, keep=2)
    assert list_steps(root) == [3, 4] and temporaries(root) == []
    deleted = [record.getMessage() for record in caplog.records if "deleting" in record.getMessage()]
    assert deleted == [f"{root}/1: deleting (checkpoint.keep=2)", f"{root}/2: deleting (checkpoint.keep=2)"]
    with pytest.raises(ValueError, match=r"checkpoint\.keep=0: at least the newest step is kept"):
        CheckpointManager(root, options=OPTIONS, keep=0)


def test_damaged_steps_do_not_count_as_kept_and_are_left_to_look_at(root, caplog):
    save_steps(root, 1, 2, 3)
    a_data_file(root / "2").unlink()
    (root / "3/manifest.json").unlink()
    save_steps(root, 4, keep=2)
    # Of the sound steps 4 and 1, both are among the newest two; 2 and 3 are damaged.
    assert list_steps(root) == [1, 2, 3, 4]
    assert "3: is damaged (manifest.json: missing" in caplog.text and "2: is damaged (items" in caplog.text
    save_steps(root, 5, keep=2)
    assert list_steps(root) == [2, 3, 4, 5]


def test_the_step_just_written_outlives_newer_steps_of_an_earlier_attempt(root):
    save_steps(root, 10, 20, 30)
    # Bits flip in 20 and 30 without changing a size, so only their own hashes could tell.
    flip_bit(a_data_file(root / "20"), 99), flip_bit(a_data_file(root / "30"), 99)
    save_steps(root, 15, keep=1)
    assert latest_verified(root, "full")[0] == 15
    assert_holds(root / "15", 15)


def test_saving_a_step_again_keeps_it_and_says_so(root, caplog):
    caplog.set_level(logging.INFO, logger=manager_module.__name__)
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        manager.save(5, on_device(state(5)), run_info(5), blocking=False)
        assert manager.save(5, on_device(state(5)), run_info(5), blocking=True) == "kept"
    before = manifest.read_manifest(root / "5")
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        assert manager.save(5, on_device(state(5)), run_info(5), blocking=True) == "kept"
        with pytest.raises(ValueError, match=r"5: is a sound step with another run\.json: .*another run directory"):
            manager.save(5, on_device(state(5)), run_info(5, recipe_hash="other"), blocking=True)
    assert manifest.read_manifest(root / "5") == before
    assert "was just saved; kept" in caplog.text and "already there, sound and the same; kept" in caplog.text


def test_saving_over_a_damaged_step_replaces_it_and_names_it(root, caplog):
    save_steps(root, 5)
    flip_bit(a_data_file(root / "5"), 77)
    save_steps(root, 5)
    assert "5: is damaged and will be replaced: items/" in caplog.text and "changed: SHA-256" in caplog.text
    assert "5: the damaged step was deleted and written anew" in caplog.text
    assert temporaries(root) == []
    assert_holds(root / "5", 5)


def test_what_an_interrupted_writer_left_is_removed_and_named_at_the_start(root, caplog):
    save_steps(root, 1)
    (root / ".tmp-2-0123abcd-1/items.orbax-checkpoint-tmp").mkdir(parents=True)
    (root / ".tmp-deleted-0-0123abcd").mkdir()
    # Reading alone clears nothing: the writer may be alive.
    assert latest_verified(root, "full") == (1, []) and len(temporaries(root)) == 2
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        assert manager.removed == [".tmp-2-0123abcd-1", ".tmp-deleted-0-0123abcd"]
    assert temporaries(root) == []
    for name in manager.removed:
        assert f"{root}/{name}: removing" in caplog.text


def test_a_second_writer_is_refused_until_the_first_has_closed(root):
    with (
        CheckpointManager(root, options=OPTIONS, keep=None) as manager,
        pytest.raises(ValueError, match="another manager is writing here: two writers would delete"),
    ):
        CheckpointManager(root, options=OPTIONS, keep=None)
    manager.close()
    CheckpointManager(root, options=OPTIONS, keep=None).close()


def test_steps_that_are_not_ours_or_were_renamed_are_passed_over_with_the_reason(root, shared_dir):
    save_steps(root, 1, 2)
    (root / "2").rename(root / "20")
    shutil.copytree(shared_dir / "fixtures/maxtext/llama-tiny", root / "30")
    step, skipped = latest_verified(root, "full")
    assert step == 1 and [number for number, _ in skipped] == [30, 20]
    assert skipped[0][1] == ["manifest.json: missing: the step was not completed"]
    assert "step=2: the folder is named 20" in skipped[1][1][0]
    # Sealed by someone, but without our marker.
    manifest.write_manifest(root / "30", known={})
    assert "not ours" in latest_verified(root, "full")[1][0][1][0]
    with pytest.raises(ValueError, match=r"30: is damaged and was not loaded.*\n.*not ours"):
        load_step(root / "30", {}, only=None, cast=False, mode="full")
