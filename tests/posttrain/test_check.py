"""What a recipe would learn from, before it trains: the first step's own prompts, completions, rewards and mask."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.tokenizer import load_tokenizer
from posttrain import cli
from posttrain.check import (
    PolicyFindings,
    findings,
    group_counts,
    look_at_rows,
    sample_policy,
    spreads,
    trained_segment,
)
from posttrain.data.policy_rows import SampledSequence
from posttrain.ledger import read_step
from posttrain.verbs.inspect_data import Counts
from recipes.schema import GRPORecipe, RLSection
from rewards.base import RewardInfo
from tests.posttrain.rollout_parts import INFO, completion, judge, problem
from tests.posttrain.trainers.runs import load, train

BROKEN = """
RANGES = {"broken": (0.0, 1.0)}

def reward_broken(completion, answer):
    raise RuntimeError("no such thing")
"""


def found(points: list[float | None], *overrides: str, finish: str = "stop", tmp_path: Path) -> PolicyFindings:
    """Findings of two prompts with half of the completions each."""
    recipe = load("grpo", tmp_path, "run", *overrides).recipe
    assert isinstance(recipe, GRPORecipe)
    group = len(points) // 2
    completions = [completion(number, index, finish=finish) for number in range(2) for index in range(group)]
    judged = judge([problem(0), problem(1)], completions, points)
    return findings(recipe, judged, (INFO,), load_tokenizer(recipe.tokenizer), engine="native")


FLAT, TRUNCATED = "no group has any difference in reward", "every completion is truncated"


@pytest.mark.parametrize(
    ("points", "overrides", "finish", "reasons"),
    [
        ([1.0, 2.0, 3.0, 3.0], [], "stop", []),
        ([1.0, 2.0, 3.0, 3.0], [], "length", [TRUNCATED]),
        ([1.0, 1.0, 3.0, 3.0], [], "stop", [FLAT]),
        # INFO's range is -5 to 5.
        ([-5.0] * 4, [], "stop", [FLAT, "every reward is the lowest there is"]),
        ([5.0] * 4, [], "stop", [FLAT, "every reward is the highest there is"]),
        # A failure drops its group; what is left of the two teaches something, or nothing.
        ([None, 1.0, 3.0, 4.0], [], "stop", []),
        ([None, 1.0, 3.0, None], [], "stop", ["no completion may be learnt from"]),
        ([None, 1.0, 3.0, 4.0], ["rewards.on_failure=stop"], "stop", ["1 rewards failed, and rewards.on_failure=stop"]),
        (
            [1.0, 2.0, 3.0, 3.0],
            ["rl.mask_truncated=true"],
            "length",
            [TRUNCATED, FLAT, "no completion may be learnt from"],
        ),
    ],
)
def test_what_cannot_learn_is_named(
    points: list[float | None], overrides: list[str], finish: str, reasons: list[str], tmp_path: Path
) -> None:
    hopeless = found(points, *overrides, finish=finish, tmp_path=tmp_path).hopeless
    assert len(hopeless) == len(reasons), hopeless
    for name, reason in zip(hopeless, reasons, strict=True):
        assert name.startswith(reason)


def test_the_spread_of_rewards_by_part_and_of_the_total(tmp_path: Path) -> None:
    """Of 4, -5, 5, 5, a failure and 1: mean 2, variance (4 + 49 + 9 + 9 + 1) / 5 = 14.4; the failure's group is out."""
    judged = found([4.0, -5.0, 5.0, 5.0, None, 1.0], tmp_path=tmp_path).rollout.judged
    part, total = spreads(judged, (INFO,))
    assert (part.name, part.low, part.high, part.failed) == ("points x 1", -5.0, 5.0, 1)
    np.testing.assert_allclose([part.mean, part.std], [2.0, np.sqrt(14.4)])
    assert (part.at_floor, part.at_ceiling) == (0.2, 0.4)
    # The first group alone: 4, -5, 5.
    np.testing.assert_allclose([total.mean, total.at_floor, total.at_ceiling], [4 / 3, 1 / 3, 1 / 3])
    assert total.failed == 3
    unbounded = spreads(judged, (RewardInfo("points", 1.0, -np.inf, 5.0),))[0]
    assert unbounded.at_floor is None and unbounded.at_ceiling == 0.4


def test_groups_without_difference_are_counted_by_where_they_stand(tmp_path: Path) -> None:
    rl = RLSection()
    low_and_mid = group_counts(found([-5.0, -5.0, 3.0, 3.0], tmp_path=tmp_path).rollout.judged, (INFO,), rl)
    assert (low_and_mid.total, low_and_mid.without_signal, low_and_mid.at_floor, low_and_mid.at_ceiling) == (2, 2, 1, 0)
    high_and_spread = group_counts(found([5.0, 5.0, -5.0, 3.0], tmp_path=tmp_path).rollout.judged, (INFO,), rl)
    assert (high_and_spread.without_signal, high_and_spread.at_floor, high_and_spread.at_ceiling) == (1, 0, 1)


def test_completions_that_the_mask_leaves_out_make_no_difference_in_reward(tmp_path: Path) -> None:
    """The second group's completions that ended are both worth 5; the truncated one's 1 is not learnt from."""
    ended = [completion(number, index) for number in range(2) for index in range(3)]
    ended[5] = replace(ended[5], finish_reason="length")
    judged = judge([problem(0), problem(1)], ended, [1.0, 2.0, 3.0, 5.0, 5.0, 1.0])
    masked, whole = (group_counts(judged, (INFO,), RLSection(mask_truncated=mask)) for mask in (True, False))
    assert (masked.without_signal, masked.at_ceiling) == (1, 1) and (whole.without_signal, whole.at_ceiling) == (0, 0)


def test_the_mask_is_that_of_the_update() -> None:
    segment = trained_segment(
        SampledSequence((7, 8, 9), np.array([5, 6], np.int32), np.zeros(2, np.float32), 1.0, True)
    )
    assert segment.tokens == (7, 8, 9, 5, 6) and segment.trained == (False, False, False, True, True)
    left_out = SampledSequence((7, 8), np.array([5], np.int32), np.zeros(1, np.float32), 0.0, False)
    assert trained_segment(left_out).trained == (False, False, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


def run(capsys: Any, folder: Path, kind: str, *arguments: str) -> tuple[int, str, str]:
    load(kind, folder, "run")
    code = cli.main(["check", str(folder / f"{kind}.yaml"), f"run.root={folder / 'runs'}", *arguments])
    return code, *capsys.readouterr()


def test_a_recipe_with_something_to_learn_is_shown_and_leaves_nothing_behind(capsys, folder: Path) -> None:
    code, out, _ = run(capsys, folder, "grpo", "--samples", "2")
    assert code == 0, out
    assert "16 prompts, 4 completions of each, before training (native engine)" in out
    assert "verdict: there is something to learn from" in out and "random ones" in out
    spread = next(line for line in out.splitlines() if line.startswith("length x 1"))
    assert float(spread.split()[4]) > 0, "rewards differ"
    # The prompt is given, and the completion alone is trained: 6 tokens at most, between the marks.
    ids = out.partition("as token ids:\n")[2].partition("answer:")[0].split()
    trained = ids[ids.index("[[") + 1 : ids.index("]]")]
    assert 1 <= len(trained) <= 6 and ids[-1] == "]]" and ids.count("[[") == 1
    assert out.count("- reward ") == 2
    assert not (folder / "runs").exists()


def test_rewards_that_are_all_alike_and_those_that_fail_end_with_code_1(capsys, folder: Path) -> None:
    rewards = folder / "rewards.py"
    rewards.write_text(BROKEN)
    nothing_right = ("rewards.functions={gsm8k_exact: 1.0}", "rewards.options={}")
    code, out, _ = run(capsys, folder, "grpo", *nothing_right, "--reward-file", str(rewards), "--prompts", "3")
    assert code == 1
    assert "verdict: nothing can be learned: " in out and FLAT in out
    assert "doctor: no group has any difference in reward: every advantage is 0" in out
    assert "groups: 3 of 3 have no difference in reward (3 all at the floor" in " ".join(out.split())
    failures = next(line for line in out.splitlines() if line.startswith("failures: "))
    assert failures.startswith("failures: broken: 12 x exception, such as:") and "no such thing" in out


@pytest.mark.slow
def test_what_is_sampled_is_what_the_first_step_trains_on(folder: Path) -> None:
    result = train("grpo", folder, "trained", "train.steps=1")
    recipe: Any = load("grpo", folder, "trained").recipe
    judged = sample_policy(recipe, num_prompts=recipe.rl.prompts_per_step, reward_file=None).rollout.judged
    ledger = read_step(result.run_dir, 1)
    assert [one["prompt_id"] for one in ledger] == [one.prompt_id for one in judged.completions]
    for one, other in zip(ledger, judged.completions, strict=True):
        assert list(one["completion_ids"]) == other.token_ids.tolist()
    assert [one["reward"] for one in ledger] == judged.combined.totals.tolist()


def test_rows_are_looked_at_where_nothing_is_sampled(capsys, folder: Path) -> None:
    """The data's prompts and answers in bytes: what is trained is an answer's digits and its end."""
    code, out, _ = run(capsys, folder, "sft", "data.packing=false", "data.shuffle=false")
    assert code == 0
    assert "the first 64 rows" in out and "vocabulary: the tokenizer has 259 ids, the model 259" in out
    shown = out.partition("segment 1 of 1: ")[2].splitlines()
    answer = shown[1].partition("[[")[2].removesuffix("<eos>]]")
    assert answer.isdigit() and f"{len(answer) + 1} trained" in shown[0]


def test_rows_of_which_nothing_is_trained_teach_nothing(folder: Path) -> None:
    seen = look_at_rows(load("sft", folder, "run").recipe, num_rows=2)
    assert seen.hopeless == () and seen.num_rows == 2
    nothing = type(seen)(**{**vars(seen), "counts": Counts(64, 40, 0)})
    assert nothing.hopeless == ("none of the 40 tokens of the first 2 rows is trained",)


@pytest.mark.parametrize(
    ("kind", "arguments", "line"),
    [
        ("grpo", ["--devices", "4"], "--devices=4: only --compile reads it; add --compile, or remove --devices"),
        ("sft", ["--samples", "4"], "--samples=4: it has no effect with kind=sft, which samples nothing; remove it"),
        ("grpo", ["rl.prompts_per_step=90"], "rl.prompts_per_step=90: there are 60 prompts of at most rl.max"),
        ("grpo", ["rl.row_length=8"], "rl.row_length=8: a prompt of 64 tokens with a completion of 6 does not fit"),
    ],
)
def test_mistakes_are_told(capsys, folder: Path, kind: str, arguments: list[str], line: str) -> None:
    code, _, err = run(capsys, folder, kind, *arguments)
    assert code == 2 and line in err
