"""kill -9 at any moment of fine-tuning costs nothing: the resumed run is the straight run, bit for bit."""

import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.session import Result
from recipes.rundir import checkpoints_dir
from tests.posttrain.trainers.runs import start, train
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, losses, saved

STEPS = 80
SAVING = "checkpoint.interval=2"
"""Saves take longer than the two steps between them, so a random moment may well be in one."""
KINDS = {"sft": ("sft",), "dpo": ("dpo", "dpo.reference=cached")}
"""The cached reference, so that a kill may also fall into the writing of its table."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Result]:
    return {
        name: train(kind, folder, f"{name} straight", f"train.steps={STEPS}", "checkpoint.asynchronous=false", *more)
        for name, (kind, *more) in KINDS.items()
    }


def kill(folder: Path, case: str, name: str, rng: np.random.Generator, moment: str) -> bool:
    """Starts or resumes a run and kills it; returns whether a save was under way."""
    kind, *more = KINDS[case]
    root = checkpoints_dir(folder / name)
    begun = max(losses(folder / name), default=0) if root.is_dir() else 0
    child = start(kind, folder, name, f"train.steps={STEPS}", SAVING, *more)
    try:
        if moment == "while it starts":
            time.sleep(float(rng.uniform(0.5, 8.0)))
        else:
            # Rows past the last checkpoint are dropped, and written again.
            runs.wait_for_row(child, folder / name, step=min(begun + 1, STEPS))
            time.sleep(float(rng.uniform(0.0, 1.5)))
        if moment == "in a save":
            deadline = time.monotonic() + 20
            while not list(root.glob(".tmp-*")) and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(float(rng.uniform(0.0, 0.03)))
    finally:
        runs.end(child)
    return bool(list(root.glob(".tmp-*")))


def resume_and_compare(folder: Path, case: str, name: str, straight: Result) -> None:
    # The interval of saves may change on the way; none but the last makes the rest quick.
    kind, *more = KINDS[case]
    resumed = train(kind, folder, name, f"train.steps={STEPS}", "checkpoint.asynchronous=false", *more)
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    assert_same_bits(saved(resumed.run_dir, STEPS), saved(straight.run_dir, STEPS))
    for root in (resumed.run_dir, checkpoints_dir(resumed.run_dir)):
        assert not list(root.glob(".tmp-*"))


@pytest.mark.parametrize("case", KINDS)
def test_a_run_killed_at_a_random_moment_resumes_to_the_straight_run(
    folder: Path, straight: dict[str, Result], case: str
) -> None:
    kill(folder, case, f"{case} once", np.random.default_rng(), "at random")
    resume_and_compare(folder, case, f"{case} once", straight[case])


@pytest.mark.soak
@pytest.mark.parametrize("case", KINDS)
def test_runs_killed_at_twenty_moments_resume_to_the_straight_run(
    folder: Path, straight: dict[str, Result], case: str
) -> None:
    """Every other run is killed a second time, in the attempt that resumes it."""
    rng = np.random.default_rng(0)
    in_saves = 0
    for index in range(20):
        name = f"{case} killed {index}"
        moment = ("while it starts", "at random", "in a save", "in a save", "at random")[index % 5]
        in_saves += kill(folder, case, name, rng, moment)
        if index % 2:
            in_saves += kill(folder, case, name, rng, "at random")
        resume_and_compare(folder, case, name, straight[case])
    # Half of the moments were aimed at saves; the aim is not perfect.
    assert in_saves >= 4, in_saves
