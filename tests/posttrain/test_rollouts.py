"""From sampling to advantages: whose completions they are, groups that teach nothing, and what the log says."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from posttrain.data.prompts import PromptRow
from posttrain.rollouts import Judged, NoSignal, Rollout, collect, rollout_metrics, sample, weigh
from posttrain.samplers.base import Completion, SamplerError, Sampling
from recipes.schema import RLSection
from tests.posttrain.rollout_parts import FakeSampler, completion, judge, problem

SAMPLING = Sampling(max_tokens=4, temperature=1.0, num_samples=2)


def right(prompts: Any, sampling: Sampling) -> list[Completion]:
    return [completion(one.prompt_id, index) for one in prompts for index in range(sampling.num_samples)]


# --- sampling ---


def test_completions_are_those_of_the_prompts_in_their_order() -> None:
    seen: list[Any] = []
    sampler: Any = FakeSampler(lambda prompts, sampling: seen.extend(prompts) or right(prompts, sampling))
    found = sample(sampler, [problem(7), problem(3)], SAMPLING)
    assert [(one.prompt_id, one.sample_index) for one in found] == [(7, 0), (7, 1), (3, 0), (3, 1)]
    assert [(one.token_ids, one.prompt_id) for one in seen] == [((7, 1, 2), 7), ((3, 1, 2), 3)]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda prompts, sampling: right(prompts, sampling)[::-1], "another order"),
        (lambda prompts, sampling: right(prompts, sampling)[:-1], "another order"),
        (lambda prompts, sampling: [*right(prompts, sampling)[:-1], completion(9, 1)], "another order"),
        (
            lambda prompts, sampling: [*right(prompts, sampling)[:-1], completion(3, 1, version=1)],
            r"weight versions \[0, 1\] in one step",
        ),
        (lambda prompts, sampling: [completion(p, i, version=1) for p in (7, 3) for i in (0, 1)], r"versions \[1\]"),
    ],
)
def test_an_engine_that_mixes_up_completions_or_weights_is_an_error(answers: Any, message: str) -> None:
    sampler: Any = FakeSampler(answers)
    with pytest.raises(SamplerError, match=message):
        sample(sampler, [problem(7), problem(3)], SAMPLING)


# --- weighing ---


def test_advantages_are_relative_to_the_group_and_go_to_their_own_sequences() -> None:
    """Dr. GRPO's, which are plain differences: rewards (1, 3) have mean 2, and (0, 4) have mean 2."""
    problems = [problem(7), problem(3)]
    completions = [completion(p, i, length=p - i) for p in (7, 3) for i in (0, 1)]
    advantages, sequences = weigh(judge(problems, completions, [1, 3, 0, 4]), RLSection(advantage="dr_grpo"))
    np.testing.assert_allclose(advantages, [[-1, 1], [-2, 2]])
    for one, made, advantage in zip(sequences, completions, [-1, 1, -2, 2], strict=True):
        assert one.prompt == (made.prompt_id, 1, 2) and one.counts and one.advantage == advantage
        np.testing.assert_array_equal(one.completion, made.token_ids)
        np.testing.assert_array_equal(one.sampler_logps, made.logprobs)


def test_a_failed_reward_leaves_its_group_out_and_a_truncated_completion_itself() -> None:
    problems = [problem(1), problem(2)]
    completions = [completion(1, 0), completion(1, 1), completion(1, 2, finish="length")]
    completions += [completion(2, index) for index in range(3)]
    judged = judge(problems, completions, [1, 3, 100, 0, None, 4])
    advantages, sequences = weigh(judged, RLSection(advantage="dr_grpo", mask_truncated=True, num_generations=3))
    assert [one.counts for one in sequences] == [True, True, False, False, False, False]
    # The mean is of what is kept: the truncated completion's 100 points move nothing.
    np.testing.assert_allclose(advantages, [[-1, 1, 0], [0, 0, 0]])
    _, sequences = weigh(judged, RLSection(advantage="dr_grpo", num_generations=3))
    assert [one.counts for one in sequences] == [True, True, True, False, False, False]


# --- collecting ---


class Stream:
    """Prompts 0, 1, 2, ..., and what was asked of them."""

    def __init__(self) -> None:
        self.next, self.calls = 0, list[tuple[int, set[int]]]()

    def __call__(self, count: int, seen: set[int]) -> list[PromptRow]:
        self.calls.append((count, set(seen)))
        self.next += count
        return [problem(number) for number in range(self.next - count, self.next)]


def gather(stream: Stream, flat: Sequence[int], **settings: Any) -> Rollout:
    """Collects where the groups of the prompts in `flat` teach nothing."""

    def complete(problems: list[PromptRow]) -> list[Completion]:
        return right(problems, SAMPLING)

    def judge_all(problems: list[PromptRow], completions: list[Completion]) -> Judged:
        points = [0.0 if one.prompt_id in flat else float(one.sample_index) for one in completions]
        return judge(problems, completions, points)

    return collect(stream, complete, judge_all, RLSection(prompts_per_step=4, num_generations=2, **settings))


def prompts_of(rollout: Rollout) -> list[int]:
    assert [one.prompt_id for one in rollout.judged.completions] == [
        one.prompt_id for one in rollout.judged.problems for _ in range(2)
    ]
    assert len(rollout.sequences) == rollout.advantages.size == len(rollout.judged.completions)
    return [one.prompt_id for one in rollout.judged.problems]


def test_without_resampling_every_group_is_taken_as_it_is() -> None:
    stream = Stream()
    rollout = gather(stream, [1, 2])
    assert prompts_of(rollout) == [0, 1, 2, 3] and rollout.resampled == 0
    assert stream.calls == [(4, set())]
    assert rollout_metrics(rollout, RLSection())["groups/without_signal"] == 0.5


def test_groups_that_teach_nothing_are_replaced_by_other_prompts() -> None:
    """Of 0 to 3 the flat 1 and 2 are replaced by 4 and 5, of which 5 is flat too, and that by 6."""
    stream = Stream()
    rollout = gather(stream, [1, 2, 5], max_resamples=5)
    assert prompts_of(rollout) == [0, 3, 4, 6] and rollout.resampled == 3
    assert stream.calls == [(4, set()), (2, {0, 1, 2, 3}), (1, {0, 1, 2, 3, 4, 5})]
    metrics = rollout_metrics(rollout, RLSection())
    assert metrics["groups/without_signal"] == 0.0 and metrics["groups/resampled"] == 3.0
    assert [one.completion.tolist() for one in rollout.sequences[-2:]] == [[60, 61, 62], [61, 62, 63]]


def test_after_the_last_round_the_error_counts_why_groups_taught_nothing() -> None:
    stream = Stream()
    message = r"rl\.max_resamples=2: 4 of 4 groups have still no difference .*\(12 groups all rewarded 0\)"
    with pytest.raises(NoSignal, match=message):
        gather(stream, range(100), max_resamples=2)
    assert [count for count, _ in stream.calls] == [4, 4, 4]
    with pytest.raises(NoSignal, match=r"3 of 4 groups .*\(6 groups all rewarded 0\)"):
        gather(Stream(), range(1, 100), max_resamples=1)


def test_the_error_tells_failures_and_truncation_from_equal_rewards() -> None:
    def judge_all(problems: list[PromptRow], completions: list[Completion]) -> Judged:
        # Problem 0's second reward fails, problem 1 is solved every time, problem 2 never ends, problem 3 is sound.
        points: list[float | None] = [1.0, None, 5.0, 5.0, 0.0, 0.0, 0.0, 1.0]
        ended = [replace(one, finish_reason="length") if one.prompt_id == 2 else one for one in completions]
        return judge(problems, ended, points)

    rl = RLSection(prompts_per_step=4, num_generations=2, max_resamples=1)
    calls = iter([4, 3])

    def draw(count: int, seen: set[int]) -> list[PromptRow]:
        assert count == next(calls)
        return [problem(number) for number in range(4)]

    with pytest.raises(NoSignal) as raised:
        collect(draw, lambda problems: right(problems, SAMPLING), judge_all, rl)
    # One of each in the first round, and again in the second.
    for cause in ("2 groups a reward failed", "2 groups all rewarded 5", "2 groups all truncated"):
        assert cause in str(raised.value)


# --- the log ---


def test_metrics_by_hand() -> None:
    problems = [problem(number) for number in (1, 2, 3)]
    lengths = [1, 5, 2, 4, 3, 3]
    completions = [
        completion(number, index, length=lengths[2 * place + index], finish="length" if place == 1 else "stop")
        for place, number in enumerate((1, 2, 3))
        for index in (0, 1)
    ]
    judged = judge(problems, completions, [1, 3, 2, 2, None, 4])
    advantages, sequences = weigh(judged, RLSection())
    found = rollout_metrics(Rollout(judged, advantages, sequences, 0.0, 0.0, 0), RLSection())
    expected = {
        # The third group failed and is left out of the rewards, but not of the lengths.
        "rewards/total/mean": 2.0,
        "rewards/total/std": np.sqrt((1 + 1 + 0 + 0) / 4),
        "rewards/total/min": 1.0,
        "rewards/total/max": 3.0,
        "rewards/points/mean": 12 / 5,
        "rewards/points/failures": 1.0,
        "rewards/dropped": 2.0,
        "groups/without_signal": 2 / 3,
        "groups/resampled": 0.0,
        "completions/tokens": 18.0,
        "completions/mean_length": 3.0,
        "completions/max_length": 5.0,
        "completions/min_length": 1.0,
        "completions/truncated": 2 / 6,
    }
    assert found == pytest.approx(expected)
