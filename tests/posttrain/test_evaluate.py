"""The evaluation with an engine whose answers are given: which gold answer judges what, and the figures by hand."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.tokenizer import Tokenizer, load_tokenizer
from posttrain.data.prompts import PromptRow
from posttrain.evaluate import EVALUATION_STEP, Evaluator, Report
from posttrain.rollouts import Judge, Judged
from posttrain.samplers.base import Completion, Prompt, Sampling
from posttrain.statistics import estimate_proportion
from recipes.schema import RewardsSection, TokenizerSection
from rewards.base import Outcome, RewardInfo
from rewards.combination import combine
from tests.posttrain.rollout_parts import FakeSampler

GOLD = {5: "72", 3: "8", 9: "1,000"}
"""By prompt id, in the order of the rows."""
GREEDY = {5: "#### 72", 3: "<answer>9</answer>", 9: "<answer>1000</answer>"}
SAMPLED = {
    5: ["<answer>72</answer>", "<answer>72.0</answer>", "#### 72", "no idea"],
    3: ["<answer>8</answer>", "<answer>9</answer>", "<answer>9</answer>", "<answer>7</answer>"],
    9: ["<answer>1000</answer>", "<answer>1,000</answer>", "<answer>5</answer>", "<answer>5</answer>"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerSection(path="bytes"))


class Engine(FakeSampler):
    """Writes what is given for each prompt, and keeps how it was asked."""

    def __init__(self, tokenizer: Tokenizer, greedy: dict[int, str], sampled: dict[int, list[str]]) -> None:
        super().__init__(self._write, version=3)
        self.tokenizer, self.greedy, self.sampled = tokenizer, greedy, sampled
        self.asked: list[Sampling] = []

    def _write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self.asked.append(sampling)
        written = []
        for prompt in prompts:
            one = prompt.prompt_id
            for index, text in enumerate([self.greedy[one]] if sampling.temperature == 0 else self.sampled[one]):
                ids = np.array(self.tokenizer.encode(text, add_bos=False, add_eos=True), np.int32)
                written.append(Completion(one, index, ids, np.zeros(len(ids), np.float32), "stop", self.weight_version))
        return written


class GivenJudge:
    """One reward of range 0 to 1, of a completion's text and its problem's gold answer."""

    infos = (RewardInfo("given", 1.0, 0.0, 1.0),)

    def __init__(self, value: Callable[[str, str], float | None]) -> None:
        self.value = value

    def __call__(self, problems: list[PromptRow], completions: list[Completion], tokenizer: Tokenizer) -> Judged:
        group = len(completions) // len(problems)
        texts = [tokenizer.decode(one.token_ids.tolist(), skip_special=True) for one in completions]
        values = [self.value(text, problems[number // group].answer) for number, text in enumerate(texts)]
        outcomes = [(Outcome("given", value, None if value is not None else "exception", ""),) for value in values]
        combined = combine(
            outcomes, self.infos, groups=[number // group for number in range(len(texts))], on_failure="zero"
        )
        return Judged(problems, completions, texts, outcomes, combined)


def evaluator(tokenizer: Tokenizer, judge: Any, correct: str, *, num_samples: int = 4) -> Evaluator:
    """Over the three problems."""
    rows = [PromptRow(one, (one, 1), f"<q{one}>", f"q{one}", answer, {}) for one, answer in GOLD.items()]
    return Evaluator(
        rows=rows,
        tokenizer=tokenizer,
        judge=judge,
        correct=correct,
        max_tokens=32,
        num_samples=num_samples,
        temperature=0.75,
        seed=11,
    )


def values(report: Report) -> dict[str, float]:
    return {name: estimate.value for name, estimate in report.estimates.items()}


@pytest.fixture(scope="module")
def reports(tokenizer: Tokenizer) -> dict[str, Report]:
    """By the reward that says what is right, with the rewards' own processes."""
    engine = Engine(tokenizer, GREEDY, SAMPLED)
    section = RewardsSection(functions={"gsm8k_exact": 1.0, "numbers": 1.0})
    with Judge(section, reward_file=None) as judge:
        return {name: evaluator(tokenizer, judge, name)(engine) for name in ("gsm8k_exact", "numbers")}


def test_the_figures_are_those_known_by_hand(reports: dict[str, Report]) -> None:
    """Right are 3, 1 and 2 of 4. Three of four say 72, and one nothing; 9 outvotes 8; 1000 and 5 tie."""
    found = values(reports["gsm8k_exact"])
    assert list(found) == ["greedy", "avg@4", "pass@4", "maj@4"]
    expected = [2 / 3, (3 / 4 + 1 / 4 + 2 / 4) / 3, 1.0, (1 + 0 + 1 / 2) / 3]
    np.testing.assert_allclose(list(found.values()), expected, rtol=0, atol=1e-12)


def test_all_figures_go_by_the_reward_that_says_what_is_right(reports: dict[str, Report]) -> None:
    """`numbers` wants tags: of the three that say 72 two are right, so the majority is with probability 2/3."""
    found = values(reports["numbers"])
    expected = [1 / 3, (2 / 4 + 1 / 4 + 2 / 4) / 3, 1.0, (2 / 3 + 0 + 1 / 2) / 3]
    np.testing.assert_allclose(list(found.values()), expected, rtol=0, atol=1e-12)


def test_intervals_are_of_problems_and_not_of_samples(reports: dict[str, Report]) -> None:
    estimates = reports["gsm8k_exact"].estimates
    assert estimates["greedy"] == estimate_proportion(2, 3)
    assert estimates["pass@4"] == estimate_proportion(3, 3)
    # Of the 27 equally likely draws of three problems one, 3.7 %, has the mean 1/4, and one 3/4: the 2.5 % points.
    assert (estimates["avg@4"].low, estimates["avg@4"].high) == (0.25, 0.75)
    row = reports["gsm8k_exact"].metrics()
    assert row["evaluation/avg@4"] == 0.5 and row["evaluation/avg@4_low"] == 0.25
    assert row["evaluation/seconds"] > 0 and len(row) == 3 * 4 + 4


def test_each_problem_has_a_line_with_its_own_completions(reports: dict[str, Report], tmp_path: Path) -> None:
    reports["numbers"].write(tmp_path, "step-000003")
    lines = [json.loads(line) for line in (tmp_path / "step-000003.jsonl").read_text().splitlines()]
    right = {5: (False, [1, 1, 0, 0]), 3: (False, [1, 0, 0, 0]), 9: (True, [1, 1, 0, 0])}
    assert lines == [
        {
            "prompt_id": one,
            "question": f"q{one}",
            "answer": GOLD[one],
            "greedy": GREEDY[one],
            "greedy_correct": right[one][0],
            "greedy_failure": None,
            "greedy_finish": "stop",
            "sampled": SAMPLED[one],
            "sampled_correct": [bool(flag) for flag in right[one][1]],
            "sampled_failures": [None] * 4,
            "sampled_finish": ["stop"] * 4,
        }
        for one in (5, 3, 9)
    ]
    found = json.loads((tmp_path / "step-000003.json").read_text())
    assert {name: found.pop(name) for name in ("completions", "failures", "truncated")} == {
        "completions": 15, "failures": 0, "truncated": 0.0
    }  # fmt: skip
    assert {name: one["value"] for name, one in found.items()} == values(reports["numbers"])
    assert len(reports["numbers"].table().splitlines()) == 4


def test_both_passes_ask_the_engine_for_what_the_recipe_says(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer, GREEDY, SAMPLED)
    evaluator(tokenizer, GivenJudge(lambda text, gold: 0.0), "given")(engine)
    shared: dict[str, Any] = {"max_tokens": 32, "stop_ids": (257,), "seed": 11, "step": EVALUATION_STEP}
    assert engine.asked == [
        Sampling(temperature=0.0, num_samples=1, **shared),
        Sampling(temperature=0.75, num_samples=4, **shared),
    ]


@pytest.mark.parametrize(
    ("num_samples", "names"),
    [(0, ("greedy",)), (1, ("greedy", "avg@1")), (4, ("greedy", "avg@4", "pass@4", "maj@4"))],
)
def test_the_names_are_known_before_anything_is_sampled(
    tokenizer: Tokenizer, num_samples: int, names: tuple[str, ...]
) -> None:
    engine = Engine(tokenizer, GREEDY, {one: texts[:num_samples] for one, texts in SAMPLED.items()})
    asked = evaluator(tokenizer, GivenJudge(lambda text, gold: 1.0), "given", num_samples=num_samples)
    report = asked(engine)
    assert asked.names() == tuple(report.estimates) == names
    assert ("sampled" in report.problems[0]) is (num_samples > 0)


def test_what_no_sample_does_right_no_majority_does(tokenizer: Tokenizer) -> None:
    """All say the gold answer, and the reward wants something else of them; then avg, pass and maj are 0 together."""
    engine = Engine(tokenizer, GREEDY, {one: [f"#### {gold}"] * 4 for one, gold in GOLD.items()})
    found = values(evaluator(tokenizer, GivenJudge(lambda text, gold: 0.5), "given")(engine))
    assert found == {"greedy": 0.0, "avg@4": 0.0, "pass@4": 0.0, "maj@4": 0.0}


def test_a_right_sample_whose_answer_is_not_found_votes_with_the_gold_answer(tokenizer: Tokenizer) -> None:
    """A reward that looks elsewhere: each problem has two right ones of it against one 9, and one without an answer."""
    texts = ["right", "right", "<answer>9</answer>", "no idea"]
    engine = Engine(tokenizer, GREEDY, dict.fromkeys(GOLD, texts))
    judge = GivenJudge(lambda text, gold: float(text == "right"))
    found = values(evaluator(tokenizer, judge, "given")(engine))
    assert found == {"greedy": 0.0, "avg@4": 0.5, "pass@4": 1.0, "maj@4": 1.0}


def test_a_reward_that_failed_does_not_say_that_the_answer_is_right(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer, GREEDY, SAMPLED)
    judge = GivenJudge(lambda text, gold: None if gold == "72" else 1.0)
    report = evaluator(tokenizer, judge, "given", num_samples=4)(engine)
    np.testing.assert_allclose(list(values(report).values()), [2 / 3] * 4, rtol=0, atol=1e-12)
    # Five completions of one problem of three.
    row = report.metrics()
    assert (row["evaluation/failures"], row["evaluation/completions"], row["evaluation/truncated"]) == (5, 15, 0)
    record = report.problems[0]
    assert (record["greedy_failure"], record["sampled_failures"]) == ("given: exception: ", ["given: exception: "] * 4)
    assert "  5 of 15 completions count as wrong because their reward failed, as by given: exc" in report.table()


def test_truncated_completions_are_counted(tokenizer: Tokenizer) -> None:
    """Of three greedy ones and twelve sampled ones the three greedy."""

    class Cut(Engine):
        def _write(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
            finish: Any = "length" if sampling.temperature == 0 else "stop"
            return [dataclasses.replace(one, finish_reason=finish) for one in super()._write(prompts, sampling)]

    report = evaluator(tokenizer, GivenJudge(lambda text, gold: 1.0), "given")(Cut(tokenizer, GREEDY, SAMPLED))
    assert report.metrics()["evaluation/truncated"] == 3 / 15
    assert [one["greedy_finish"] for one in report.problems] == ["length"] * 3
    assert report.table().endswith("\n  3 of 15 completions ran to the longest length allowed")
