"""What can happen to a run's checkpoints from outside: damaged files, a kill at any moment, many processes at once."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints import store
from models.checkpoints.manager import CheckpointManager, latest_verified, list_steps, load_step, step_problems
from tests.models.checkpoints import run_states
from tests.models.checkpoints.run_states import (
    OPTIONS,
    a_data_file,
    assert_holds,
    flip_bit,
    save_steps,
    state,
    temporaries,
)
from tests.pretrain.runs import free_port

# Started processes find the packages from wherever the tests run.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


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


def test_every_moment_of_sealing_replacing_and_deleting_leaves_the_newest_whole_step_loadable(tmp_path, monkeypatch):
    """Copies the folder as it is before each call that changes it or forces it, and treats each copy as a crash."""
    root = tmp_path / "checkpoints"
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


def kill_and_check(folder: Path, rng: np.random.Generator, count: int) -> None:
    killed = []
    for index in range(count):
        root = folder / f"killed-{index}" / "checkpoints"
        command = [sys.executable, run_states.__file__, "save for ever", str(root)]
        # Their own group, so that nothing else can be hit.
        child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True)
        killed.append((root, child))
    for root, child in killed:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= 3:
                break
        time.sleep(float(rng.uniform(0.0, 0.4)))
        child.kill()
        reported = [int(line), *map(int, child.stdout.read().split())]
        assert child.wait(120) == -9
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


@pytest.mark.multidevice
def test_two_processes_save_verify_restore_and_fail_together(tmp_path):
    address = f"localhost:{free_port()}"
    environment = {**ENVIRONMENT, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    root = tmp_path / "checkpoints"
    children = [
        subprocess.Popen(
            [sys.executable, run_states.__file__, "save together", str(root), address, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [child.communicate(timeout=400)[0] for child in children]
    assert all("as expected" in output for output in outputs), "\n".join(output[-3000:] for output in outputs)
    assert (root / "2/items/ocdbt.process_1").is_dir()
    assert json.loads((root / "2/manifest.json").read_text())["version"] == 1
