"""kill -9 at any moment of post-training costs nothing: the resumed run is the straight run, bit for bit."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.ledger import completions_dir, completions_path, read_step, recorded_steps
from pretrain.session import Result
from recipes.rundir import checkpoints_dir
from tests.posttrain.trainers.phases import PHASES
from tests.posttrain.trainers.runs import start, train
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, losses, saved

pytestmark = pytest.mark.usefixtures("quick_compiles")

SAVING = "checkpoint.interval=2"
"""Saves take longer than the two steps between them, so a random moment may well be in one."""
SYNCHRONOUS = "checkpoint.asynchronous=false"
MOMENTS = ("while it starts", "at random", "in a save", "in a save", "at random")
MOMENTS_OF_A_STEP = ("while it starts", "rollout", "reward", "update", "in a save", "in a save", "reward", "update")


@dataclass(frozen=True)
class Case:
    """A run that is killed, and when."""

    kind: str
    steps: int
    overrides: tuple[str, ...] = ()
    moments: tuple[str, ...] = MOMENTS
    kills: int = 20
    saves: int = 4
    """Kills that fall into a save, at least; more are aimed at saves, but the aim is not perfect."""


CASES = {
    "sft": Case("sft", 80),
    # The cached reference, so that a kill may also fall into the writing of its table.
    "dpo": Case("dpo", 80, ("dpo.reference=cached",)),
    "grpo": Case("grpo", 16, moments=MOMENTS_OF_A_STEP, kills=10, saves=1),
    "grpo, two updates": Case(
        "grpo", 16, ("rl.num_iterations=2", "rl.beta=0.05"), moments=MOMENTS_OF_A_STEP, kills=10, saves=1
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Any:
    """The run that is never stopped, by case, each made once."""
    made: dict[str, Result] = {}

    def run(name: str) -> Result:
        if name not in made:
            made[name] = whole(folder, name, f"{name} straight")
        return made[name]

    return run


def whole(folder: Path, case: str, name: str) -> Result:
    """Runs a case, or goes on with it, to its end. The interval of saves may change; none but the last is quick."""
    one = CASES[case]
    return train(one.kind, folder, name, f"train.steps={one.steps}", SYNCHRONOUS, *one.overrides)


def kill(folder: Path, case: str, name: str, rng: np.random.Generator, moment: str) -> tuple[bool, str]:
    """Starts or resumes a run and kills it; returns whether a save was under way, and the part of a step it was in."""
    one, root, phase = CASES[case], checkpoints_dir(folder / name), folder / f"{name} phase"
    begun = max(losses(folder / name), default=0) if root.is_dir() else 0
    env = {"PHASES": phase} if one.kind == "grpo" else {}
    phase.unlink(missing_ok=True)
    child = start(one.kind, folder, name, f"train.steps={one.steps}", SAVING, *one.overrides, **env)
    try:
        if moment == "while it starts":
            time.sleep(float(rng.uniform(0.5, 8.0)))
        else:
            # Rows past the last checkpoint are dropped, and written again.
            later = 1 if one.kind != "grpo" else int(rng.integers(1, 4))
            runs.wait_for_row(child, folder / name, step=min(begun + later, one.steps - 1))
        if moment == "at random":
            time.sleep(float(rng.uniform(0.0, 1.5)))
        if moment == "in a save":
            wait(child, lambda: bool(list(root.glob(".tmp-*"))))
            time.sleep(float(rng.uniform(0.0, 0.03)))
        if moment in PHASES:
            wait(child, lambda: phase.read_text() == moment)
            time.sleep(float(rng.uniform(0.0, 0.1)))
    finally:
        runs.end(child)
    return bool(list(root.glob(".tmp-*"))), phase.read_text() if phase.is_file() else ""


def wait(child: Any, holds: Any) -> None:
    """Waits until something holds, the process has ended, or 20 s are over."""
    deadline = time.monotonic() + 20
    while not holds() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def resume_and_compare(folder: Path, case: str, name: str, straight: Result) -> None:
    resumed, steps = whole(folder, case, name), CASES[case].steps
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    assert_same_bits(saved(resumed.run_dir, steps), saved(straight.run_dir, steps))
    for root in (resumed.run_dir, checkpoints_dir(resumed.run_dir)):
        assert not list(root.glob(".tmp-*"))
    if CASES[case].kind == "grpo":
        compare_ledgers(resumed.run_dir, straight.run_dir, steps)


def compare_ledgers(resumed: Path, straight: Path, steps: int) -> None:
    """Every completion of the straight run and no other; each prompt once, in a group of four."""
    assert recorded_steps(resumed) == list(range(1, steps + 1))
    assert not list(completions_dir(resumed).glob(".tmp-*"))
    for step in range(1, steps + 1):
        one, other = (completions_path(run, step).read_bytes() for run in (resumed, straight))
        assert one == other, step
    prompts = Counter(row["prompt_id"] for step in range(1, steps + 1) for row in read_step(resumed, step))
    # Two prompts a step of 60 in all: no epoch ends.
    assert len(prompts) == 2 * steps and set(prompts.values()) == {4}


# The loop and its checkpoints are those of pretraining, whose own test of a kill is always run.
@pytest.mark.parametrize("case", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "dpo")), "grpo"])
def test_a_run_killed_at_a_random_moment_resumes_to_the_straight_run(folder: Path, straight: Any, case: str) -> None:
    kill(folder, case, f"{case} once", np.random.default_rng(), "at random")
    resume_and_compare(folder, case, f"{case} once", straight(case))


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES)
def test_runs_killed_at_many_moments_resume_to_the_straight_run(folder: Path, straight: Any, case: str) -> None:
    """Every other run is killed a second time, in the attempt that resumes it."""
    rng, one = np.random.default_rng(0), CASES[case]
    in_saves, phases = 0, Counter[str]()
    for index in range(one.kills):
        name = f"{case} killed {index}"
        moments = [one.moments[index % len(one.moments)], *(["at random"] if index % 2 else [])]
        for moment in moments:
            in_save, phase = kill(folder, case, name, rng, moment)
            in_saves += in_save
            phases[phase] += 1
        resume_and_compare(folder, case, name, straight(case))
    print(f"{case}: {phases.total()} kills, {in_saves} in saves, {dict(phases)}")
    assert in_saves >= one.saves, in_saves
    assert one.kind != "grpo" or set(PHASES) <= set(phases), phases
