"""Steps that end a run before they are made leave their completions in the ledger; no engine, no training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.ledger import read_step, recorded_steps
from posttrain.rollouts import NoSignal
from posttrain.samplers.base import Completion
from posttrain.trainers.grpo import GRPO
from tests.posttrain.rollout_parts import FakeSampler, completion, judge, problem
from tests.posttrain.trainers.runs import load


class Counted:
    """Prompts by number."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int, *, exclude: Any) -> list[Any]:
        self.taken += count
        return [problem(number) for number in range(self.taken - count, self.taken)]

    def get_state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def attempt(folder: Path, points: Callable[[Completion], float | None], finish: Any, *overrides: str) -> GRPO:
    """A run after four steps, whose completions have those rewards and end that way."""
    recipe: Any = load("grpo", folder, "run", *overrides).recipe
    made: Any = GRPO.__new__(GRPO)
    made.recipe, made.attempt = recipe, SimpleNamespace(dir=folder / "run")
    made.session = SimpleNamespace(done=4, writer=SimpleNamespace(write_table=lambda *_: None))
    made.tokenizer = SimpleNamespace(stop_ids={0})
    made.setup = SimpleNamespace(plan=None)
    made.prompts = SimpleNamespace(train=Counted())
    made.sampler = FakeSampler(
        lambda prompts, sampling: [
            replace(completion(one.prompt_id, index), finish_reason=finish) for one in prompts for index in range(4)
        ]
    )
    made.judge = lambda problems, completions, tokenizer: judge(problems, completions, [*map(points, completions)])
    made.seconds = {}
    return made


def test_a_step_whose_rewards_all_failed_is_in_the_ledger(tmp_path: Path) -> None:
    run = attempt(tmp_path, lambda one: None, "stop")
    with pytest.raises(ValueError, match="step 5: none of 8 completions may be learnt from"):
        run.update(run.collect())
    assert recorded_steps(tmp_path / "run") == [5]
    # The step was not made, so its prompts keep their turn.
    assert run.prompts.train.taken == 0  # type: ignore[attr-defined]
    rows = read_step(tmp_path / "run", 5)
    assert [(one["prompt_id"], one["counted"]) for one in rows] == [(0, False)] * 4 + [(1, False)] * 4
    assert all(one["reward_failures"] == [("points", "exception: boom")] for one in rows)


def test_a_step_whose_completions_were_all_truncated_is_in_the_ledger(tmp_path: Path) -> None:
    run = attempt(tmp_path, lambda one: float(one.sample_index), "length", "rl.mask_truncated=true")
    with pytest.raises(ValueError, match="step 5: none of 8 completions may be learnt from"):
        run.update(run.collect())
    rows = read_step(tmp_path / "run", 5)
    assert [one["finish_reason"] for one in rows] == ["length"] * 8 and not any(one["counted"] for one in rows)


def test_a_step_that_found_no_signal_is_in_the_ledger_with_every_round(tmp_path: Path) -> None:
    run = attempt(tmp_path, lambda one: 1.0, "stop", "rl.max_resamples=2")
    with pytest.raises(NoSignal, match=r"rl\.max_resamples=2: 2 of 2 groups"):
        run.collect()
    assert sorted({one["prompt_id"] for one in read_step(tmp_path / "run", 5)}) == list(range(6))
    assert run.prompts.train.taken == 0  # type: ignore[attr-defined]
