"""Rewards that hang, crash, lie or kill, in real runs: training goes on or ends as the recipe says, and it is recorded.

What is guaranteed of a reward that kills the trainer: nothing can stop it, as it has the user's own rights; so the run
is lost up to its last save, its workers end with it, and what resumes is the run that was never killed.
"""

import math
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.ledger import completions_path, read_step, recorded_steps
from posttrain.rollouts import RewardStop
from posttrain.trainers import grpo
from recipes.metrics import read_metrics
from recipes.rundir import metrics_path
from tests.posttrain.trainers.runs import load, start
from tests.pretrain.runs import assert_same_bits, end, losses

# What is done to every completion of a problem lies in the problem's number, with which its text begins.
HOSTILE = """
import ctypes, os, sys, time
from pathlib import Path

HERE = Path(__file__).parent
DEEDS = ("none", "raise", "nan", "crash", "hang", "print", "write", "text")
RANGES = {"hostile": (0, 10)}

def reward_hostile(completion, question):
    deed = DEEDS[int(question.partition(":")[0]) % len(DEEDS)]
    if deed == "hang": time.sleep(3600)
    if deed == "crash": ctypes.string_at(0)
    if deed == "raise": raise RuntimeError("no luck")
    if deed == "nan": return float("nan")
    if deed == "text": return "5"
    if deed == "print": print("a reward speaks")
    if deed == "write": (HERE / "written").write_text("by a reward"); os.write(2, b"noise")
    return len(completion.encode()) % 7
"""
DEEDS = ("none", "raise", "nan", "crash", "hang", "print", "write", "text")
FAILURES = {
    "raise": "exception: RuntimeError: no luck",
    "nan": "not_finite: returned nan",
    "crash": "died: signal 11",
    "hang": "timeout: no answer within 2.5 s",
    "text": "not_a_number: returned str",
}
SHORT = ("rewards.timeout_seconds=2.5", "rl.num_generations=2", "rl.prompts_per_step=8", "data.shuffle=false")
"""Problems in their order, so that a step of eight holds each deed once."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    (path / "hostile.py").write_text(HOSTILE)
    return path


def train(folder: Path, name: str, *overrides: str) -> Any:
    return grpo.run(load("grpo", folder, name, *SHORT, *overrides), ["test"], reward_file=folder / "hostile.py")


def deed(row: dict[str, Any]) -> str:
    return DEEDS[row["prompt_id"] % len(DEEDS)]


@pytest.mark.parametrize("rule", ["zero", pytest.param("drop_group", marks=pytest.mark.slow)])
def test_training_goes_on_past_rewards_that_fail_and_the_ledger_names_each(
    folder: Path, capfd: pytest.CaptureFixture[str], rule: str
) -> None:
    result = train(folder, rule, "train.steps=2", f"rewards.on_failure={rule}")
    assert result.completed_steps == 2
    rows = {row["step"]: row for row in read_metrics(metrics_path(result.run_dir))}
    for step in (1, 2):
        ledger = read_step(result.run_dir, step)
        assert sorted(map(deed, ledger)) == sorted(DEEDS * 2)
        for one in ledger:
            failed, parts = dict(one["reward_failures"]), dict(one["reward_parts"])
            wanted = FAILURES.get(deed(one))
            if wanted is None:
                assert not failed and parts["hostile"] == len(one["completion"].encode()) % 7
                assert one["counted"] and one["reward"] == parts["hostile"] + parts["length"]
                continue
            assert failed["hostile"].startswith(wanted), failed
            assert parts["hostile"] is None and one["counted"] == (rule == "zero")
            # The other reward stands.
            assert one["reward"] == parts["length"] and math.isfinite(one["advantage"])
        assert rows[step]["rewards/hostile/failures"] == 10.0
        assert rows[step]["rewards/dropped"] == (0.0 if rule == "zero" else 10.0)
        assert math.isfinite(rows[step]["learning/loss"])
        # Two completions hang, 2.5 s each, and four workers start anew; generous, for a busy machine.
        assert 5.0 < rows[step]["perf/reward_seconds"] < 300
    assert (folder / "written").read_text() == "by a reward"
    said = "".join(capfd.readouterr())
    assert "a reward speaks\n" not in said and "noise\n" not in said


def test_training_stops_at_the_first_failure_where_the_recipe_says_so(folder: Path) -> None:
    with pytest.raises(RewardStop, match=r"reward hostile: completion 2: exception \(RuntimeError: no luck\): 10 rew"):
        train(folder, "stop", "rewards.on_failure=stop", "checkpoint.interval=1")
    # The completions are there to be looked at, though no step was made of them.
    assert recorded_steps(folder / "stop") == [1] and not losses(folder / "stop")
    ledger = read_step(folder / "stop", 1)
    assert {deed(one) for one in ledger if one["reward_failures"]} == set(FAILURES)
    assert not any(one["counted"] for one in ledger)


KILLER = """
import os, signal
from pathlib import Path

RANGES = {"killer": (0, 10)}
DONE = Path(__file__).parent / "killed"

def reward_killer(completion, question):
    if question.startswith("5:") and not DONE.exists():
        DONE.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
    return len(completion.encode()) % 7
"""


@pytest.mark.slow
def test_a_run_whose_trainer_a_reward_has_killed_resumes_to_the_run_that_was_not(folder: Path) -> None:
    file, done = folder / "killer.py", folder / "killed"
    file.write_text(KILLER)
    settings = ("checkpoint.interval=1", "data.shuffle=false")
    child = start("grpo", folder, "killed run", *settings, REWARD_FILE=file)
    try:
        child.communicate(timeout=400)
    finally:
        end(child)
    assert child.returncode == -9
    # Problem 5 is in the third step; two were made, though the second's save may have been cut off.
    assert recorded_steps(folder / "killed run") == [1, 2]
    worker = Path("/proc") / done.read_text()
    deadline = time.monotonic() + 120
    while worker.exists() and "rewards.worker" in _command(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "rewards.worker" not in _command(worker), "the worker outlives the trainer"
    runs = [
        grpo.run(load("grpo", folder, name, *settings), ["test"], reward_file=file)
        for name in ("killed run", "never killed")
    ]
    assert losses(runs[0].run_dir) == losses(runs[1].run_dir) and len(losses(runs[0].run_dir)) == 4
    assert_same_bits(runs[0].state, runs[1].state)
    for step in (1, 2, 3, 4):
        one, other = (completions_path(run.run_dir, step).read_bytes() for run in runs)
        assert one == other, step


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""
