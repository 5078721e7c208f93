"""Prompts, completions and judgements for tests, without an engine or a process."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data.prompts import PromptRow
from posttrain.rollouts import Judged
from posttrain.samplers.base import Completion, Prompt, Sampling
from rewards.base import Outcome, RewardInfo
from rewards.combination import combine

INFO = RewardInfo("points", 1.0, -5.0, 5.0)


def problem(number: int) -> PromptRow:
    """A prompt of three tokens."""
    return PromptRow(number, (number, 1, 2), f"<q{number}>", f"q{number}", str(number), {})


def completion(prompt_id: int, index: int, *, length: int = 3, finish: Any = "stop", version: int = 0) -> Completion:
    """Tokens that tell the prompt and the sample."""
    ids = 10 * prompt_id + index + np.arange(length, dtype=np.int32)
    return Completion(prompt_id, index, ids, -np.arange(1, length + 1, dtype=np.float32), finish, version)


def judge(problems: Sequence[PromptRow], completions: Sequence[Completion], points: Sequence[float | None]) -> Judged:
    """One reward; None is one that failed, which drops its group."""
    outcomes = [
        (Outcome("points", value, None, "") if value is not None else Outcome("points", None, "exception", "boom"),)
        for value in points
    ]
    group = len(completions) // len(problems)
    groups = [number // group for number in range(len(completions))]
    combined = combine(outcomes, [INFO], groups=groups, on_failure="drop_group")
    texts = [f"text {one.prompt_id}/{one.sample_index}" for one in completions]
    return Judged(list(problems), list(completions), texts, outcomes, combined)


class FakeSampler:
    """An engine whose answers are given."""

    def __init__(self, answers: Any, version: int = 0) -> None:
        self._answers, self.weight_version = answers, version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return self._answers(prompts, sampling)
