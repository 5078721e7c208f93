"""A recipe's problems: those that are trained on, and those that are held out."""

import json
from pathlib import Path

import pytest

from posttrain.data.problems import load_all
from recipes.schema import PromptDataSection


def written(path: Path, questions: list[str]) -> str:
    """A file of problems."""
    path.write_text("".join(json.dumps({"question": one, "answer": "#### 1"}) + "\n" for one in questions))
    return str(path)


@pytest.mark.parametrize(
    ("held_out", "limits", "said"),
    [
        (["a", "b", "c"], {}, "3 of 3"),
        (["c", "d", "e"], {}, "1 of 3"),
        (["A", "b ", "d"], {}, None),
        (["d", "c", "a"], {"num_problems": 1}, "1 of 3"),
        (["d", "c", "a"], {"num_eval_problems": 2}, "1 of 2"),
        (["d", "c", "a"], {"num_eval_problems": 1}, None),
    ],
)
def test_held_out_questions_that_are_trained_on_are_told_once(tmp_path, caplog, held_out, limits, said):
    """By their exact text, among as many of each as are taken."""
    path = written(tmp_path / "train.jsonl", ["a", "b", "c"])
    eval_path = written(tmp_path / "held_out.jsonl", held_out)
    found = load_all(PromptDataSection(path=path, eval_path=eval_path, **limits))
    assert [one.question for one in found.held_out] == held_out
    told = [one.getMessage() for one in caplog.records if one.name == "posttrain.data.problems"]
    assert [one[: len(f"data: {said}")] for one in told] == ([] if said is None else [f"data: {said}"])


def test_the_same_file_for_both_is_told(tmp_path, caplog):
    path = written(tmp_path / "one.jsonl", ["a", "b"])
    load_all(PromptDataSection(path=path, eval_path=path))
    assert "data: 2 of 2 held-out questions are also among those that are trained on" in caplog.text
