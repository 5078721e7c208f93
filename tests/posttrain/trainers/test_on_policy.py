"""On-policy distillation: the rows are the student's own answers, and only those are trained."""

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain.cli import main
from posttrain.trainers.on_policy import prompts_of, student_rows
from pretrain.data.batch import TokenBatch
from recipes.metrics import read_metrics
from recipes.rundir import metrics_path

RECIPE = """
kind: distill
model: {preset: tiny-llama, overrides: {vocab_size: 259}}
teacher: {preset: tiny-llama, overrides: {vocab_size: 259}}
tokenizer: {path: bytes}
data: {path: PATH, sequence_length: 64, packing: false, num_workers_threads: 1}
distill: {mode: on_policy, max_completion_length: 8, alpha: 1.0, divergence: reverse_kl}
sampler: {engine: native, num_slots: 8}
train: {steps: 2, per_device_batch_size: 4}
optimizer: {learning_rate: 1.0e-3, weight_decay: 0.0}
checkpoint: {enabled: false}
"""


def batch(inputs: list[list[int]], trained: list[list[int]]) -> TokenBatch:
    cells = np.array(inputs, np.int32)
    zeros = np.zeros_like(cells)
    return TokenBatch(cells, zeros, (cells != 0).astype(np.int32), zeros, zeros, np.array(trained, np.int32))


def test_a_prompt_is_what_stands_before_the_first_trained_target() -> None:
    rows = batch([[5, 6, 7, 8], [9, 4, 0, 0], [3, 3, 3, 3]], [[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    prompts = dict(prompts_of(rows))
    assert {number: tokens.tolist() for number, tokens in prompts.items()} == {0: [5, 6, 7], 1: [9]}


def test_rows_hold_prompt_and_answer_and_train_the_answer_alone() -> None:
    rows = student_rows({1: np.array([5, 6, 7])}, {1: np.array([8, 9])}, (2, 6))
    assert rows.inputs.tolist() == [[0] * 6, [5, 6, 7, 8, 0, 0]]
    assert rows.targets.tolist() == [[0] * 6, [6, 7, 8, 9, 0, 0]]
    # The targets 8 and 9 are the answer; the state that predicts 8 is that of the prompt's last token.
    assert rows.targets_segmentation.tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0]]
    assert rows.inputs_position.tolist() == [[0] * 6, [0, 1, 2, 3, 0, 0]]
    assert rows.inputs_segmentation.tolist() == [[0] * 6, [1, 1, 1, 1, 0, 0]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("PATH", str(tmp_path / "rows.jsonl")))
    return path


@pytest.mark.parametrize("more", [(), pytest.param(("lora.rank=2",), marks=pytest.mark.slow)])
def test_a_student_that_is_its_teacher_writes_and_learns_nothing(
    recipe: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Adapters, which change nothing at first, are merged for the engine."""
    assert main(["distill", str(recipe), f"run.dir={tmp_path / 'run'}", "logging.console=none", *more]) == 0
    rows = read_metrics(metrics_path(tmp_path / "run"))
    assert [row["learning/loss"] for row in rows] == [0.0, 0.0]
    # Four answers of up to eight tokens are trained, and no token of a prompt.
    assert all(4 <= row["learning/total_weights"] <= 32 for row in rows)


def test_a_packed_row_has_no_single_prompt(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(recipe), f"run.dir={tmp_path / 'run'}", "data.packing=true"]) == 2
    assert "data.packing=true" in capsys.readouterr().err
