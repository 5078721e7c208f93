"""kill -9 at any moment, in and between saves, costs nothing: the resumed run is the straight run, bit for bit."""

import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.trainer import Result
from recipes.rundir import checkpoints_dir, metrics_path
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, losses, saved, train

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS = 150
SAVING = "checkpoint.interval=2"
"""Saves take longer than the two steps between them, so a random moment may well be in one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kill")
    runs.write_recipe(path)
    return path


@pytest.fixture(scope="module")
def straight(folder: Path) -> Result:
    return train(folder, "straight", f"train.steps={STEPS}")


def kill(folder: Path, name: str, rng: np.random.Generator, moment: str) -> bool:
    """Starts or resumes a run and kills it; returns whether a save was under way."""
    root = checkpoints_dir(folder / name)
    begun = max(losses(folder / name), default=0) if metrics_path(folder / name).exists() else 0
    child = runs.start(folder, name, f"train.steps={STEPS}", SAVING)
    try:
        if moment == "while it starts":
            time.sleep(float(rng.uniform(0.5, 6.0)))
        else:
            # Rows past the last checkpoint are dropped, and written again.
            runs.wait_for_row(child, folder / name, step=min(begun + 1, STEPS))
            time.sleep(float(rng.uniform(0.0, 2.0)))
        if moment == "in a save":
            deadline = time.monotonic() + 20
            while not list(root.glob(".tmp-*")) and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(float(rng.uniform(0.0, 0.03)))
    finally:
        runs.end(child)
    return bool(list(root.glob(".tmp-*")))


def resume_and_compare(folder: Path, name: str, straight: Result) -> None:
    # The interval of saves may change on the way; a large one makes the rest quick.
    resumed = train(folder, name, f"train.steps={STEPS}", "checkpoint.interval=50")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    assert_same_bits(saved(resumed.run_dir, STEPS), saved(straight.run_dir, STEPS))
    assert not list(checkpoints_dir(resumed.run_dir).glob(".tmp-*"))


def test_a_run_killed_at_a_random_moment_resumes_to_the_straight_run(folder: Path, straight: Result) -> None:
    kill(folder, "once", np.random.default_rng(), "at random")
    resume_and_compare(folder, "once", straight)


@pytest.mark.soak
def test_runs_killed_at_twenty_moments_resume_to_the_straight_run(folder: Path, straight: Result) -> None:
    """Every other run is killed a second time, in the attempt that resumes it."""
    rng = np.random.default_rng(0)
    in_saves = 0
    for index in range(20):
        name = f"killed-{index}"
        moment = ("while it starts", "at random", "in a save", "in a save", "at random")[index % 5]
        in_saves += kill(folder, name, rng, moment)
        if index % 2:
            in_saves += kill(folder, name, rng, "at random")
        resume_and_compare(folder, name, straight)
    # Half of the moments were aimed at saves; the aim is not perfect.
    assert in_saves >= 4, in_saves
