"""The steps of a run: whole or absent at every moment, never loaded when damaged, never deleted without a word."""

import errno
import json
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models.checkpoints import manager as manager_module
from models.checkpoints import manifest, store
from models.checkpoints.manager import (
    CheckpointManager,
    SaveError,
    latest_verified,
    list_steps,
    load_step,
    step_problems,
)
from models.checkpoints.run_info import read_run_info

OPTIONS = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)


def state(step: int) -> dict:
    """A small training state whose every value depends on the step."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((8, 6)).astype(np.float32)
    return {
        "params": {"params": {"kernel": kernel, "bias": kernel[0] * 2}},
        "opt_state": {"0": {"count": np.int32(step), "mu": kernel * 3}, "1": None},
        "rng": {"key": rng.integers(0, 2**32, size=(2,), dtype=np.uint32)},
        "step": np.int32(step),
    }


def on_device(tree: dict) -> dict:
    return jax.tree.map(jnp.asarray, tree)


def run_info(step: int, **changes) -> dict:
    return {
        "format": "posttrain-1",
        "step": step,
        "model": {"family": "llama", "embed_dim": 8},
        "framework": "linen",
        "scan_layers": True,
        "param_scan_axis": 1,
        "recipe_hash": "abc",
        "wandb_run_id": None,
        "data_state": {"offset": step * 4},
        "rng": {"seed": 0, "step": step},
        "extra": {},
        **changes,
    }


def assert_holds(step_dir: Path, step: int) -> None:
    """The step loads, through full verification, as exactly the state that was saved under its number."""
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state(step))
    loaded, info = load_step(step_dir, target, only=None, cast=False, mode="full")
    assert info.step == step and info.data_state == {"offset": step * 4}
    expected, loaded = store.flatten(state(step)), store.flatten(loaded)
    assert expected.keys() == loaded.keys()
    for path, value in expected.items():
        assert (value is None and loaded[path] is None) or np.array_equal(value, loaded[path]), path


def save_steps(root: Path, *steps: int, keep: int | None = None, options: store.StoreOptions = OPTIONS) -> None:
    with CheckpointManager(root, options=options, keep=keep) as manager:
        for step in steps:
            assert manager.save(step, on_device(state(step)), run_info(step), blocking=True) == "written"


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def a_data_file(step_dir: Path) -> Path:
    return max(
        (path for path in (step_dir / "items").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def temporaries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith(".tmp-"))


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
        assert opened.wait(30)
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
        assert reached.wait(30)
        assert list_steps(root) == [] and latest_verified(root, "full") == (None, [])
        threading.Timer(0.3, opened.set).start()
        started = time.monotonic()
        manager.save(2, on_device(state(2)), run_info(2), blocking=False)
        assert time.monotonic() - started > 0.2 and 1 in list_steps(root)
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


def corrupt(root: Path, step: int, rng: np.random.Generator) -> set[str]:
    """Does one random kind of damage to a step; returns the names that must be reported (one of them is enough)."""
    step_dir = root / str(step)
    files = sorted(path for path in step_dir.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[rng.integers(len(files))]
    kind = rng.choice(["truncate", "flip", "delete", "swap", "half-written", "cut short"])
    if kind == "truncate":
        os.truncate(path, int(rng.integers(path.stat().st_size)))
    elif kind == "flip":
        flip_bit(path, int(rng.integers(path.stat().st_size * 8)))
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        others = [other for other in files if other.read_bytes() != path.read_bytes()]
        other = others[rng.integers(len(others))]
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs), other.write_bytes(ours)
        return {path.relative_to(step_dir).as_posix(), other.relative_to(step_dir).as_posix()}
    elif kind == "half-written":
        # What a writer without a commit marker would leave: the first files of a step, and no manifest.
        for late in files[int(rng.integers(len(files))) :]:
            late.unlink()
        (step_dir / "manifest.json").unlink(missing_ok=True)
        return {"manifest.json"}
    else:
        path.write_bytes(b"\0" * path.stat().st_size)
    return {path.relative_to(step_dir).as_posix()}


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory) -> Path:
    """Four steps, one of each storage combination."""
    root = tmp_path_factory.mktemp("sound") / "checkpoints"
    for step, (ocdbt, zarr3) in enumerate([(True, True), (True, False), (False, True), (False, False)], start=1):
        save_steps(root, step, options=store.StoreOptions(ocdbt=ocdbt, zarr3=zarr3, target_file_bytes=1 << 31))
    return root


def check_corruption(sound_run: Path, folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = folder / str(seed)
    shutil.copytree(sound_run, root)
    # Any of the steps may be hit, but one stays whole.
    damaged = rng.permutation([1, 2, 3, 4])[: rng.integers(1, 4)]
    names = {int(step): corrupt(root, int(step), rng) for step in damaged}
    sound = max({1, 2, 3, 4} - names.keys())
    step, skipped = latest_verified(root, "full")
    assert step == sound, (seed, names, skipped)
    assert [number for number, _ in skipped] == sorted((number for number in names if number > sound), reverse=True)
    for number, reasons in skipped:
        reported = {reason.split(":")[0] for reason in reasons}
        assert reported & names[number], (seed, number, names[number], reasons)
    assert_holds(root / str(step), step)
    for number in names:
        with pytest.raises(ValueError, match=f"{number}: is damaged and was not loaded"):
            load_step(root / str(number), state(number), only=None, cast=False, mode="full")
    shutil.rmtree(root)


def test_25_random_corruptions_never_load_and_are_named(sound_run, tmp_path):
    for seed in range(25):
        check_corruption(sound_run, tmp_path, seed)


@pytest.mark.soak
def test_500_random_corruptions_never_load_and_are_named(sound_run, tmp_path):
    for seed in range(1000, 1500):
        check_corruption(sound_run, tmp_path, seed)


def test_every_moment_of_sealing_replacing_and_deleting_leaves_the_newest_whole_step_loadable(
    root, tmp_path, monkeypatch
):
    """Copies the folder as it is before each call that changes it or forces it, and treats each copy as a crash."""
    save_steps(root, 1, 2, 3)
    flip_bit(a_data_file(root / "3"), 5)
    before = step_problems(root / "3", "full")
    # With keep=1 the save replaces 3 and deletes 2 and 1.
    copies: list[Path] = []

    def watched(real):
        def call(*args, **kwargs):
            copies.append(tmp_path / "crashes" / str(len(copies)))
            shutil.copytree(root, copies[-1])
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "fsync", "unlink", "rmdir"):
            patch.setattr(os, name, watched(getattr(os, name)))
        save_steps(root, 3, keep=1)
    assert list_steps(root) == [3] and len(copies) > 60

    found = []
    for copy in copies:
        step, _ = latest_verified(copy, "full")
        found.append(step)
        # Nothing half-written or half-deleted ever has a number: the only flaw is the bit flipped above.
        problems = {number: step_problems(copy / str(number), "full") for number in list_steps(copy)}
        assert all(lines in ([], before) for lines in problems.values()), (copy, problems)
    # The old newest step until the rename, the new one from then on.
    switch = found.index(3)
    assert found == [2] * switch + [3] * (len(found) - switch) and switch > 10
    for index in range(0, len(copies), 7):
        with CheckpointManager(copies[index], options=OPTIONS, keep=None) as manager:
            assert set(manager.steps()) <= {1, 2, 3} and temporaries(copies[index]) == []
        assert_holds(copies[index] / str(found[index]), found[index])


SAVE_FOR_EVER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_manager", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["test_manager"] = module
spec.loader.exec_module(module)
module.save_for_ever(Path(sys.argv[2]))
"""


def save_for_ever(root: Path) -> None:
    """The killed process: saves step after step, in turn blocking and not, keeps two, and reports what is complete."""
    with CheckpointManager(root, options=OPTIONS, keep=2) as manager:
        step = 0
        while True:
            step += 1
            blocking = step % 3 == 0
            manager.save(step, on_device(state(step)), run_info(step), blocking=blocking)
            # Returning from a save means that the one before it, at least, is complete.
            print(step if blocking else step - 1, flush=True)


def kill_and_check(folder: Path, rng: np.random.Generator, count: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(manager_module.__file__).parents[2])}
    killed = []
    for index in range(count):
        root = folder / f"killed-{index}" / "checkpoints"
        command = [sys.executable, "-c", SAVE_FOR_EVER, __file__, str(root)]
        # Their own group, so that nothing else can be hit.
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        killed.append((root, child))
    for root, child in killed:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 3:
                break
        time.sleep(float(rng.uniform(0.0, 0.4)))
        child.kill()
        reported = [int(line), *map(int, child.stdout.read().split())]
        assert child.wait(30) == -9
        step, skipped = latest_verified(root, "full")
        assert skipped == [] and step is not None and step >= max(reported), (step, reported)
        assert_holds(root / str(step), step)
        # The next writer clears up and goes on from there.
        save_steps(root, step + 1, keep=2)
        assert temporaries(root) == []
        assert_holds(root / str(step + 1), step + 1)


def test_kill_9_at_three_random_moments_leaves_the_newest_complete_step(tmp_path):
    kill_and_check(tmp_path, np.random.default_rng(0), count=3)


@pytest.mark.soak
def test_kill_9_at_sixty_random_moments_leaves_the_newest_complete_step(tmp_path):
    for seed in range(20):
        kill_and_check(tmp_path / str(seed), np.random.default_rng(100 + seed), count=3)


TWO_PROCESSES = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_manager", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["test_manager"] = module
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
spec.loader.exec_module(module)
module.save_together(sys.argv[4])
"""


def save_together(folder: str) -> None:
    """One of two processes with two devices each: save, damage, find, restore elsewhere, fail together."""
    from jax.experimental import multihost_utils

    root, values = Path(folder), np.arange(64, dtype=np.float32).reshape(8, 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    first = jax.process_index() == 0
    assert jax.device_count() == 4 and jax.process_count() == 2

    def placed(array, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def items(step):
        return {"params": {"w": placed(values * step, "a", "b"), "copy": placed(values + step)}, "none": None}

    manager = CheckpointManager(root, options=OPTIONS, keep=2)
    for step in (1, 2, 3):
        manager.save(step, items(step), run_info(step), blocking=False)
    assert manager.latest_verified("full") == (3, []) and manager.steps() == [2, 3]
    multihost_utils.sync_global_devices("looked")
    if first:
        # Each process wrote a part; damage that of the other.
        flip_bit(max((root / "3/items/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size), 8)
    multihost_utils.sync_global_devices("damaged")
    step, skipped = manager.latest_verified("full")
    assert step == 2 and [number for number, _ in skipped] == [3] and "ocdbt.process_1" in skipped[0][1][0]
    struct = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=placed(values, ("b", "a")).sharding)
    target = {"params": {"w": struct, "copy": struct}, "none": None}
    restored, info = manager.restore(2, target, only=None, cast=False, mode="quick")
    assert info.step == 2
    for shard in restored["params"]["w"].addressable_shards:
        assert np.array_equal(shard.data, (values * 2)[shard.index])

    # Process 0 cannot seal: both processes must hear of it, and nothing may be left under the number.
    if first:
        manifest.write_manifest = lambda step_dir, *, known: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    manager.save(4, items(4), run_info(4), blocking=False)
    try:
        manager.wait()
    except SaveError as error:
        assert error.errno == (errno.ENOSPC if first else errno.EIO), error
    else:
        raise AssertionError("the failure went unheard")
    assert not (root / "4").exists()
    multihost_utils.sync_global_devices("failed")
    manager.close()
    print("as expected")


@pytest.mark.multidevice
def test_two_processes_save_verify_restore_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(manager_module.__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, __file__, address, str(index), str(tmp_path / "checkpoints")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert all("as expected" in output for output in outputs), "\n".join(output[-3000:] for output in outputs)
    assert (tmp_path / "checkpoints/2/items/ocdbt.process_1").is_dir()
    assert json.loads((tmp_path / "checkpoints/2/manifest.json").read_text())["version"] == 1
