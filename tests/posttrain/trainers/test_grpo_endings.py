"""What ends a run of reinforcement learning before its last step, and what is kept of it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.manager import list_steps
from posttrain.doctor import HopelessRun
from posttrain.ledger import completions_path, recorded_steps
from posttrain.rollouts import NoSignal, RewardStop, Rollout
from posttrain.samplers.base import SamplerError
from posttrain.samplers.native import NativeSampler
from posttrain.trainers import grpo
from pretrain.guard import Interrupted
from pretrain.session import Result
from recipes.metrics import read_metrics
from recipes.rundir import checkpoints_dir, metrics_path
from tests.posttrain.trainers.runs import train
from tests.pretrain.runs import assert_same_bits, losses

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Random weights solve no sum: each group's rewards are all 0.
EXACT = ("rewards.functions={gsm8k_exact: 1.0}", "rewards.options={}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("endings")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Result:
    """Four steps that nothing ends."""
    return train("grpo", folder, "straight")


def kept(run_dir: Path) -> list[int]:
    return list_steps(checkpoints_dir(run_dir))


def assert_same_run(found: Result, straight: Result) -> None:
    """State, losses and completions."""
    assert_same_bits(found.state, straight.state)
    assert losses(found.run_dir) == losses(straight.run_dir)
    for step in range(1, 5):
        left, right = (completions_path(one.run_dir, step).read_bytes() for one in (found, straight))
        assert left == right, step


@pytest.mark.parametrize(
    "end",
    [
        lambda rollout: NoSignal("no group has a signal", rollout.judged),
        lambda rollout: RewardStop("reward length: no value", rollout.judged),
        lambda rollout: SamplerError("the engine did not answer"),
    ],
    ids=["no signal", "reward stop", "sampler error"],
)
def test_what_ends_a_rollout_keeps_the_steps_before_it_and_its_prompts_keep_their_turn(
    folder: Path,
    straight: Result,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    end: Callable[[Rollout], Exception],
) -> None:
    name, collect, rollouts = request.node.callspec.id, grpo.collect, 0

    def ends(*args: Any) -> Rollout:
        nonlocal rollouts
        rollouts += 1
        rollout = collect(*args)
        if rollouts == 3:
            raise end(rollout)
        return rollout

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "collect", ends)
        with pytest.raises((NoSignal, RewardStop, SamplerError)) as raised:
            train("grpo", folder, name)
    assert str(raised.value).endswith(f"; the state after 2 steps is saved in {checkpoints_dir(folder / name)}/2")
    assert kept(folder / name) == [2]
    assert_same_run(train("grpo", folder, name), straight)


def test_a_hopeless_run_is_kept_and_patience_outlives_its_attempts(folder: Path) -> None:
    """Two steps, then one, of a patience of three; then the run goes on where it is told to."""
    patient = (*EXACT, "doctor.action=stop", "doctor.patience=3")
    train("grpo", folder, "hopeless", *patient, "train.steps=2")
    said = r"^step 3: doctor\.patience=3: no group has any difference in reward, for 3 steps: .* saved in \S+/3$"
    with pytest.raises(HopelessRun, match=said):
        train("grpo", folder, "hopeless", *patient, "train.steps=4")
    assert kept(folder / "hopeless") == [2, 3] and recorded_steps(folder / "hopeless") == [1, 2, 3]
    with pytest.raises(HopelessRun, match=r"^step 4: doctor\.patience=3: "):
        train("grpo", folder, "hopeless", *patient, "train.steps=6")
    found = train("grpo", folder, "hopeless", *EXACT, "doctor.action=warn", "train.steps=6")
    assert found.completed_steps == 6 and list(losses(found.run_dir)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("moment", "done"), [("at_start", 0), ("at_end", 4)])
def test_a_signal_in_an_evaluation_ends_the_run_before_the_next_half(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str, done: int
) -> None:
    other = {"at_start": "at_end", "at_end": "at_start"}[moment]
    held_out = (f"data.eval_path={folder / 'examples.jsonl'}", "data.num_eval_problems=2", "eval.num_samples=2")
    section = (*held_out, f"eval.{other}=false")
    generate, counts = NativeSampler.generate, list[int]()

    def signalled(sampler: NativeSampler, prompts: Any, sampling: Any, **more: Any) -> Any:
        if sampling.temperature == 0.0:
            os.kill(os.getpid(), signal.SIGTERM)
        counts.append(sampling.num_samples)
        return generate(sampler, prompts, sampling, **more)

    with monkeypatch.context() as patch:
        patch.setattr(NativeSampler, "generate", signalled)
        with pytest.raises(Interrupted, match=rf"^SIGTERM: stopped after {done} steps") as raised:
            train("grpo", folder, moment, *section)
    # The greedy half alone, and no step after it.
    assert counts == [4] * done + [1]
    assert ("and saved; go on with run.dir=" in str(raised.value)) == (done > 0)
    assert kept(folder / moment) == ([done] if done else [])
    resumed = train("grpo", folder, moment, *section)
    assert [row["step"] for row in read_metrics(metrics_path(resumed.run_dir)) if "evaluation/greedy" in row] == [done]
    assert list(losses(resumed.run_dir)) == [1, 2, 3, 4]
