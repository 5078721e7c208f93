"""Samples of the ledger in a report: which are chosen, how tokens are shaded, what cannot be decoded."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.tokenizer import load_tokenizer
from posttrain.data.policy_rows import SampledSequence
from posttrain.data.prompts import PromptRow
from posttrain.ledger import completions_path, read_step, recorded_steps, write_step
from posttrain.report_completions import (
    LEVELS,
    MAX_TOKENS,
    chosen_groups,
    chosen_steps,
    completions_html,
    pieces,
    shade,
    shaded_html,
)
from posttrain.report_runs import RunRecord
from posttrain.rollout_log import ledger_rows
from posttrain.rollouts import Judged, Rollout
from posttrain.samplers.base import Completion
from recipes.schema import TokenizerSection
from rewards.base import Outcome
from rewards.combination import Combined

ROOT = Path(__file__).resolve().parents[2]
BYTES = load_tokenizer(TokenizerSection(path="bytes"))
TEXTS = ("é <b>4</b>", "5", "", "4\n")


def decode(ids):
    """The byte tokenizer's text."""
    return BYTES.decode(ids, skip_special=False)


def make_rollout(texts=TEXTS, rewards=(1.0, 0.0, 0.0, 1.0), advantages=(1.0, -1.0, 0.0, 0.5)):
    """One prompt with a completion for each text; the third one's reward failed, and it was cut off."""
    ids = [np.array([*text.encode(), BYTES.eos_id], np.int32) for text in texts]
    logps = [np.full(len(one), -0.7, np.float32) for one in ids]
    done = [
        Completion(7, i, one, logps[i], "length" if i == 2 else "stop", weight_version=3) for i, one in enumerate(ids)
    ]
    outcomes: list[tuple[Outcome, ...]] = [(Outcome("exact", value, None, ""),) for value in rewards]
    outcomes[2] = (Outcome("exact", None, "timeout", "after 10 s"),)
    total = np.array(rewards, np.float64)
    problem = PromptRow(prompt_id=7, token_ids=(50, 43, 50), text="2+2?", question="2+2?", answer="4", columns={})
    judged = Judged(
        [problem], done, list(texts), outcomes, Combined(total, np.ones(len(texts), bool), {"exact": total}, {})
    )
    sequences = [SampledSequence([50, 43, 50], one, logps[i], advantages[i], True) for i, one in enumerate(ids)]
    return Rollout(judged, np.array([advantages]), sequences, 0.1, 0.1, None)


def record(folder, tokenizer="bytes"):
    """A run whose recipe names a tokenizer."""
    return RunRecord(folder, "run", {"kind": "grpo", "tokenizer": {"path": tokenizer}}, [], [])


def test_the_report_reads_what_the_ledger_writes(tmp_path):
    rollout = make_rollout()
    trainer = [None if i == 2 else np.full(len(one.completion), -0.5) for i, one in enumerate(rollout.sequences)]
    for step in (2, 10):
        write_step(tmp_path, step, ledger_rows(step, rollout, trainer))
    assert recorded_steps(tmp_path) == [2, 10]
    rows = read_step(tmp_path, 10)
    assert [row["completion"] for row in rows] == list(TEXTS)
    assert [row["counted"] for row in rows] == [True, True, False, True]


def test_samples_show_texts_rewards_and_failures_and_escape_markup(tmp_path):
    write_step(tmp_path, 1, ledger_rows(1, make_rollout(), [None, None, None, None]))
    text = completions_html(record(tmp_path))
    assert "<b>4</b>" not in text.replace("<b>4</b></p>", "") and "&lt;" in text
    for shown in ("reward 1", "advantage +1.00", "exact: timeout: after 10 s", "exact failed", "cut off", "left out"):
        assert shown in text, shown
    # Nothing is shaded that was left out of the update.
    assert 'class="tg' not in text and 'class="tr' not in text


OBSERVER = """
import sys
from posttrain import cli
code = cli.main(["report", *sys.argv[1:]])
print(sorted({"jax", "jaxlib", "flax", "torch", "tunix", "vllm", "wandb"} & set(sys.modules)), code)
"""


def test_a_report_is_made_without_jax(tmp_path):
    write_step(tmp_path, 1, ledger_rows(1, make_rollout(), [None] * 4))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "attempt": 1, "time": 0.0, "policy/kl": 1.0}) + "\n")
    (tmp_path / "resolved.yaml").write_text("kind: grpo\ntokenizer: {path: bytes}\n")
    done = subprocess.run(
        [sys.executable, "-c", OBSERVER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] 0"
    text = (tmp_path / "report" / "index.html").read_text()
    assert "Sample completions" in text and "id 195" in text


def test_a_run_without_a_ledger_has_no_samples(tmp_path):
    assert completions_html(record(tmp_path)) == ""


def test_a_missing_tokenizer_leaves_whole_texts_and_says_why(tmp_path):
    write_step(tmp_path, 1, ledger_rows(1, make_rollout(), [None] * 4))
    for name in ("owner/never-downloaded", "./absent.model"):
        text = completions_html(record(tmp_path, name))
        assert name in text and "&lt;b&gt;4&lt;/b&gt;" in text


def test_a_file_that_is_no_ledger_is_named(tmp_path):
    path = completions_path(tmp_path, 1)
    path.parent.mkdir()
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"step-000001\.parquet: cannot be read"):
        completions_html(record(tmp_path))


@pytest.mark.parametrize(
    ("advantage", "logp", "level"),
    [
        # 1 + round(4 * |A| / scale * (1 - p)), with the advantage's sign; the scale is 2.
        (2.0, math.log(0.25), 4),  # 4 * 1 * 0.75 = 3
        (-2.0, math.log(0.25), -4),
        (1.0, math.log(0.5), 2),  # 4 * 0.5 * 0.5 = 1
        (2.0, 0.0, 1),  # sure to come: not moved, but the sign shows
        (2.0, None, 5),
        (0.0, -1.0, 0),
        (math.nan, -1.0, 0),
    ],
)
def test_a_token_is_shaded_by_advantage_times_one_minus_its_probability(advantage, logp, level):
    assert shade(advantage, logp, 2.0) == level
    assert abs(level) <= LEVELS


def test_each_token_has_its_shade_and_log_probabilities(tmp_path):
    rollout = make_rollout()
    trainer = [np.full(len(one.completion), math.log(0.5), np.float32) for one in rollout.sequences]
    write_step(tmp_path, 1, ledger_rows(1, rollout, trainer))
    best, worst, _, newline = read_step(tmp_path, 1)
    # Two bytes spell é, so they share a span; the scale is the step's greatest advantage, 1: 1 + round(4 * 0.5) = 3.
    assert '<span class="tg3" title="id 195, sampler -0.700, trainer -0.693; id 169' in shaded_html(best, decode, 1.0)
    assert shaded_html(best, decode, 1.0).count('class="tg3"') == len(best["completion_ids"]) - 1
    assert '<span class="tr3" title="id 53, sampler -0.700, trainer -0.693">5</span>' in shaded_html(worst, decode, 1.0)
    assert "⏎\n" in shaded_html(newline, decode, 1.0)


def test_pieces_join_to_the_whole_text_whatever_the_tokens():
    ids = list("aé€😀b".encode())
    found = pieces(decode, ids)
    assert [one.text for one in found] == ["a", "é", "€", "😀", "b"]
    assert [(one.tokens.start, one.tokens.stop) for one in found] == [(0, 1), (1, 3), (3, 6), (6, 10), (10, 11)]
    # Bytes that spell no character do not hold up the rest, and none is lost.
    broken = pieces(decode, [255, 255, 255, 255, 255, 65])
    assert "".join(one.text for one in broken) == decode([255] * 5 + [65])

    def by_words(ids):
        # A tokenizer of words puts a space between tokens, and none before the first.
        return " ".join(f"w{index}" for index in ids)

    assert [one.text for one in pieces(by_words, [1, 2, 3])] == ["w1", " w2", " w3"]


def test_a_long_completion_is_cut_and_the_rest_counted(tmp_path):
    rollout = make_rollout(texts=("x" * (MAX_TOKENS + 9), "5", "", "4"))
    write_step(tmp_path, 1, ledger_rows(1, rollout, [None] * 4))
    row = read_step(tmp_path, 1)[0]
    # The end token is one more.
    assert "and 10 more tokens" in shaded_html(row, decode, 1.0)


def test_a_credential_in_a_completion_is_not_shown(tmp_path):
    key = "hf_" + "CanaryCanaryCanaryCanary1234567890"
    write_step(tmp_path, 1, ledger_rows(1, make_rollout(texts=(f"my key is {key}", "5", "", "4")), [None] * 4))
    text = completions_html(record(tmp_path))
    assert "my key is" in text and "Canary" not in text


def test_the_steps_shown_are_the_first_the_last_and_one_between():
    assert chosen_steps([1, 2]) == [1, 2]
    assert chosen_steps(list(range(1, 82))) == [1, 41, 81]


def test_the_prompts_shown_are_those_whose_rewards_differ_most_with_best_and_worst():
    def row(prompt, reward):
        return {"prompt_id": prompt, "reward": reward}

    rows = [row(1, 0.5)] * 6 + [row(2, value) for value in (0, 0.2, 1, 0.4, 0.6, 0.1)] + [row(3, 0.0), row(3, 0.1)]
    shown = chosen_groups(rows)
    assert [[one["reward"] for one in group] for group in shown] == [[1, 0.6, 0.1, 0], [0.1, 0.0]]
