"""Problems from files: real GSM8K, named columns, and rows that are not right."""

import json
import re

import pytest

from posttrain.data.gsm8k import Problem, ProblemSource, gold_answer, load_problems


def source(path, **changes):
    given = {
        "path": str(path),
        "name": None,
        "split": "train",
        "question_column": "question",
        "answer_column": "answer",
        "answer_mark": "####",
        "key_prefix": "data.",
    }
    return ProblemSource(**{**given, **changes})


def written(tmp_path, *rows):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_real_gsm8k_has_its_known_size_and_answers(shared_dir):
    train = load_problems(source(shared_dir / "data/gsm8k/train.jsonl"))
    test = load_problems(source(shared_dir / "data/gsm8k/test.jsonl"))
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].question.startswith("Natalia sold clips to 48 of her friends in April")
    assert [problem.answer for problem in train[:4]] == ["72", "10", "5", "42"]
    assert train[0].solution.endswith("altogether in April and May.\n#### 72")
    assert [problem.problem_id for problem in train] == list(range(7473))
    # Every gold answer of GSM8K is a whole number, some with commas.
    assert all(re.fullmatch(r"-?[\d,]+", problem.answer) for problem in [*train, *test])


def test_named_columns_make_a_problem_and_the_others_reach_rewards(tmp_path):
    file = written(tmp_path, {"ask": "6 x 7?", "gold": " 42 ", "level": 3}, {"ask": "1/2?", "gold": "0.5", "level": 1})
    problems = load_problems(source(file, question_column="ask", answer_column="gold", answer_mark=None))
    assert problems == [
        Problem(0, "6 x 7?", "42", " 42 ", {"level": 3}),
        Problem(1, "1/2?", "0.5", "0.5", {"level": 1}),
    ]


def test_numbers_as_answers_are_read_as_text(tmp_path):
    file = written(tmp_path, {"question": "6 x 7?", "answer": 42})
    assert load_problems(source(file, answer_mark=None))[0].answer == "42"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [("a\n#### 72", "72"), ("####72", "72"), ("#### 1,000 \n", "1,000"), ("#### 1\n#### 2", "2"), ("#### -5.", "-5.")],
)
def test_the_gold_answer_follows_the_last_mark(solution, answer):
    assert gold_answer(solution, "row") == answer


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"question": "q", "answer": "72"}, {}, "row 0 (from 0): answer '72': a solution ends with ####"),
        ({"question": "q", "answer": "####"}, {}, "a solution ends with #### and the answer"),
        ({"question": " ", "answer": "#### 7"}, {}, "row 0 (from 0): column 'question': ' '"),
        ({"question": "q", "answer": None}, {}, "column 'answer': None"),
        ({"q": "q", "answer": "#### 7"}, {}, "column 'question': the data has the columns answer, q; name"),
        ({"question": "q", "answer": "#### 7", "prompt": "p"}, {}, "column 'prompt': rewards know this name already"),
        ({"question": "q", "answer": "#### 7"}, {"answer_mark": "Answer:"}, "answer_mark='Answer:'"),
        ({"question": "q", "answer": "#### 7"}, {"path": "absent.jsonl"}, "data.path='absent.jsonl'"),
        ({"question": "q", "answer": "#### 7"}, {"name": "openai/gsm8k"}, "data.name='openai/gsm8k'"),
    ],
)
def test_what_is_not_a_problem_is_refused_by_name(tmp_path, row, changes, said):
    file = written(tmp_path, row)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_problems(source(**{"path": file, **changes}))
