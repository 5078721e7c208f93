"""From sampling to advantages: whose completions they are, groups that teach nothing, and what the log says."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.tokenizer import load_tokenizer
from posttrain.data.prompts import PromptRow
from posttrain.rollout_log import ledger_rows, rollout_metrics, unlearnt
from posttrain.rollouts import Judge, Judged, NoSignal, RewardStop, Rollout, collect, sample, weigh
from posttrain.samplers.base import Completion, SamplerError, Sampling
from recipes.schema import RewardsSection, RLSection, TokenizerSection
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


def test_dapo_resamples_where_the_recipe_does_not_say_otherwise() -> None:
    assert prompts_of(gather(Stream(), [1, 2], loss_algo="dapo")) == [0, 3, 4, 5]
    assert prompts_of(gather(Stream(), [1, 2], loss_algo="dapo", max_resamples=0)) == [0, 1, 2, 3]


def test_data_that_ends_while_groups_are_replaced_is_told_with_why_they_were() -> None:
    stream = Stream()

    def draw(count: int, seen: set[int]) -> list[PromptRow]:
        if len(seen) + count > 5:
            raise ValueError(f"prompts: {count} of {5 - len(seen)}")
        return stream(count, seen)

    rl = RLSection(prompts_per_step=4, num_generations=2, max_resamples=7)
    message = r"rl\.max_resamples=7: 1 of 4 groups .* after 1 rounds \(2 groups all rewarded 0\).*\(prompts: 1 of 0\)"
    with pytest.raises(NoSignal, match=message) as raised:
        collect(
            draw,
            lambda problems: right(problems, SAMPLING),
            lambda problems, made: judge(
                problems, made, [float(one.sample_index * (one.prompt_id < 3)) for one in made]
            ),
            rl,
        )
    assert [one.prompt_id for one in raised.value.judged.problems] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="prompts: 9 of 5"):
        collect(draw, list, judge, RLSection(prompts_per_step=9, num_generations=2, max_resamples=7))


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


def test_replaced_groups_are_kept_as_evidence_of_what_failed_and_what_was_sampled() -> None:
    """Of the first four groups 1 fails and 2 is flat; 4 and 5 take their places. Completions have 3 tokens each."""

    def judge_all(problems: list[PromptRow], completions: list[Completion]) -> Judged:
        points: dict[int, list[float | None]] = {1: [None, 1.0], 2: [5.0, 5.0]}
        return judge(problems, completions, [value for one in problems for value in points.get(one.prompt_id, [0, 1])])

    rl = RLSection(prompts_per_step=4, num_generations=2, max_resamples=1)
    rollout = collect(Stream(), lambda problems: right(problems, SAMPLING), judge_all, rl)
    assert prompts_of(rollout) == [0, 3, 4, 5] and rollout.replaced is not None
    assert [one.prompt_id for one in rollout.replaced.problems] == [1, 2]
    assert rollout.judged.combined.failures == {}
    assert rollout.replaced.combined.failures == {("points", "exception"): 1}
    metrics = rollout_metrics(rollout, rl)
    assert metrics["rewards/points/failures"] == 1.0 and metrics["rewards/dropped"] == 2.0
    assert metrics["completions/tokens"] == 6 * 2 * 3 and metrics["completions/trained_tokens"] == 4 * 2 * 3
    # What is trained alone: the replaced 5s move no mean.
    assert metrics["rewards/total/mean"] == metrics["rewards/points/mean"] == 0.5
    assert metrics["groups/without_signal"] == 0.0 and metrics["groups/resampled"] == 2.0
    rows = ledger_rows(3, rollout, [one.sampler_logps for one in rollout.sequences])
    assert [one["prompt_id"] for one in rows] == [0, 0, 3, 3, 4, 4, 5, 5, 1, 1, 2, 2]
    assert [one["counted"] for one in rows] == [True] * 8 + [False] * 4
    assert [one["reward_failures"] for one in rows[8:]] == [[("points", "exception: boom")], [], [], []]
    assert all(one["advantage"] == 0.0 and one["trainer_logps"] is None for one in rows[8:])


def truncated_but_one(problems: list[PromptRow], limited: set[int]) -> list[Completion]:
    """Three of each prompt; of the limited ones the last two were cut off."""
    return [
        completion(one.prompt_id, index, finish="length" if one.prompt_id in limited and index else "stop")
        for one in problems
        for index in range(3)
    ]


def test_a_group_that_differs_in_what_is_masked_alone_teaches_nothing_and_is_replaced() -> None:
    """Rewards 0, 1, 2 of each prompt: with the mask prompt 1 keeps its 0 alone, and its advantages would be 0."""

    def judge_all(problems: list[PromptRow], completions: list[Completion]) -> Judged:
        return judge(problems, completions, [float(one.sample_index) for one in completions])

    def gathered(**settings: Any) -> tuple[Rollout, dict[str, float]]:
        rl = RLSection(prompts_per_step=2, num_generations=3, **settings)
        rollout = collect(Stream(), lambda problems: truncated_but_one(problems, {1}), judge_all, rl)
        return rollout, rollout_metrics(rollout, rl)

    rollout, metrics = gathered(mask_truncated=True)
    assert not rollout.advantages[1].any() and metrics["groups/without_signal"] == 0.5
    # One completion of prompt 1 is left, of 3 tokens.
    assert metrics["completions/trained_tokens"] == 4 * 3
    rollout, metrics = gathered(mask_truncated=True, max_resamples=1)
    assert [one.prompt_id for one in rollout.judged.problems] == [0, 2] and rollout.resampled == 1
    assert rollout.advantages.any(1).all() and metrics["groups/without_signal"] == 0.0
    rollout, metrics = gathered(max_resamples=1)
    assert rollout.resampled == 0 and metrics["groups/without_signal"] == 0.0


def test_the_error_tells_rewards_that_the_mask_leaves_equal() -> None:
    rl = RLSection(prompts_per_step=1, num_generations=3, max_resamples=1, mask_truncated=True)
    with pytest.raises(NoSignal, match=r"\(2 groups all that ended rewarded 4\)"):
        collect(
            Stream(),
            lambda problems: truncated_but_one(problems, {0, 1}),
            lambda problems, completions: judge(problems, completions, [4.0, 1.0, 2.0]),
            rl,
        )


def test_what_ends_a_step_early_has_the_completions_of_every_round() -> None:
    with pytest.raises(NoSignal) as raised:
        gather(Stream(), range(1, 100), max_resamples=1)
    rows = ledger_rows(1, unlearnt(raised.value.judged), [None] * 14)
    assert sorted({one["prompt_id"] for one in rows}) == list(range(7)) and not any(one["counted"] for one in rows)

    def judge_all(problems: list[PromptRow], completions: list[Completion]) -> Judged:
        judged = judge(problems, completions, [0.0] * len(completions))
        if problems[0].prompt_id == 2:
            raise RewardStop("reward points", judged)
        return judged

    rl = RLSection(prompts_per_step=2, num_generations=2, max_resamples=1)
    with pytest.raises(RewardStop) as stopped:
        collect(Stream(), lambda problems: right(problems, SAMPLING), judge_all, rl)
    assert [one.prompt_id for one in stopped.value.judged.problems] == [0, 1, 2, 3]


# --- the log ---


def test_a_reward_that_wants_more_memory_than_the_recipe_gives_fails_and_is_counted(tmp_path: Path) -> None:
    """One GiB of zeros, of which no page is touched, under half a GiB and under no limit."""
    file = tmp_path / "greedy.py"
    file.write_text("def reward_greedy(completion):\n    return float(len(bytearray(1 << 30)) > 0)\n")
    tokenizer = load_tokenizer(TokenizerSection(path="bytes"))
    for limit, failures in ((0.5, {("greedy", "exception"): 1}), (None, {})):
        section = RewardsSection(functions={}, memory_gib=limit)
        with Judge(section, reward_file=file) as judge_all:
            judged = judge_all([problem(1)], [completion(1, 0)], tokenizer)
        assert judged.combined.failures == failures
        assert judged.totals().tolist() == [[0.0 if failures else 1.0]]
        assert judged.outcomes[0][0].detail == ("MemoryError: " if failures else "")


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
    found = rollout_metrics(Rollout(judged, advantages, sequences, 0.0, 0.0, None), RLSection())
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
        # Of lengths 1, 5, 2, 4: those of the third group are not learnt from.
        "completions/trained_tokens": 12.0,
        "completions/mean_length": 3.0,
        "completions/max_length": 5.0,
        "completions/min_length": 1.0,
        "completions/truncated": 2 / 6,
    }
    assert found == pytest.approx(expected)
