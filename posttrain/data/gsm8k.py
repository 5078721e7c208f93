"""Problems with one gold answer: GSM8K, and any data set with a question's and an answer's column.

GSM8K's answers are worked solutions that end with `#### 72` (Cobbe et al. 2021, "Training Verifiers to Solve Math Word
Problems"). The gold answer is what follows the mark, as it is written; rewards know how to compare numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pretrain.data.hugging_face import load_split
from pretrain.data.sources import Source
from rewards.base import check_columns
from rewards.extraction import MARK, marked_answer

HUB_NAME = "openai/gsm8k:main"
"""GSM8K on the hub; its splits are train (7,473 problems) and test (1,319)."""


@dataclasses.dataclass(frozen=True)
class ProblemSource:
    """Where problems lie, and what their columns are called."""

    path: str | None
    """A JSON, JSON Lines, Parquet or CSV file, or a folder of them."""
    name: str | None
    """A hub name, with `:config` behind it. One of path and name is set."""
    split: str
    """The split; may be sliced, as in `train[:90%]`."""
    question_column: str
    """What the policy is asked."""
    answer_column: str
    """The gold answer, or the worked solution that ends with it."""
    answer_mark: str | None
    """What parts the solution from the answer; None where the column holds the answer alone."""
    key_prefix: str
    """What the recipe puts before `path`, `name` and `split`, for messages: `data.` or `data.eval_`."""

    def __post_init__(self) -> None:
        if self.answer_mark not in (None, MARK):
            raise ValueError(
                f"answer_mark={self.answer_mark!r}: solutions are marked as GSM8K's are; set {MARK}, or null where the "
                "column holds the answer alone"
            )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem."""

    problem_id: int
    """Its row in the split, from 0: the same in every run, whatever else is filtered, trimmed or shuffled."""
    question: str
    answer: str
    """The gold answer, stripped."""
    solution: str
    """The answer's column as it is: GSM8K's worked solution."""
    columns: Mapping[str, Any]
    """The row's other columns, for rewards."""


def load_problems(source: ProblemSource) -> list[Problem]:
    """Loads every problem of a split.

    Args:
        source: where they lie.

    Returns:
        The problems, in the data's order.

    Raises:
        ValueError: the data cannot be loaded, lacks a column or is empty; a row has no question or no answer, or a
            column that rewards cannot be given.
    """
    prefix = source.key_prefix
    found = Source(
        kind="hf",
        path=source.path,
        name=source.name,
        split=source.split,
        text_column="",
        path_key=f"{prefix}path",
        name_key=f"{prefix}name",
        split_key=f"{prefix}split",
        text_column_key="",
        weight=1.0,
    )
    rows = load_split(found)
    for column in (source.question_column, source.answer_column):
        if column not in rows.features:
            raise ValueError(
                f"{found.named()}: column {column!r}: the data has the columns {', '.join(sorted(rows.features))}; "
                "name the question's and the answer's, as data.question_column and data.answer_column"
            )
    if len(rows) == 0:
        raise ValueError(f"{found.named()}: it holds no problems; name other data")
    return [_problem(index, row, source, f"{found.named()} row {index} (from 0)") for index, row in enumerate(rows)]


def gold_answer(solution: str, where: str) -> str:
    """The answer at the end of a worked solution.

    Args:
        solution: a solution in GSM8K's format.
        where: whose it is, for the message.

    Returns:
        The rest of the line after the last `####`, stripped.

    Raises:
        ValueError: there is no mark, or nothing after it.
    """
    answer = marked_answer(solution)
    if answer is None:
        raise ValueError(
            f"{where}: answer {solution[-60:]!r}: a solution ends with {MARK} and the answer; correct the row, or set "
            "data.answer_mark=null if the column holds the answer alone"
        )
    return answer


def _problem(index: int, row: Mapping[str, Any], source: ProblemSource, where: str) -> Problem:
    question, solution = row[source.question_column], row[source.answer_column]
    if isinstance(solution, int | float) and not isinstance(solution, bool):
        solution = str(solution)
    for column, value in ((source.question_column, question), (source.answer_column, solution)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{where}: column {column!r}: {value!r}: a problem has a question and an answer; fill it in"
            )
    answer = solution.strip() if source.answer_mark is None else gold_answer(solution, where)
    columns = {name: value for name, value in row.items() if name not in (source.question_column, source.answer_column)}
    check_columns(where, columns)
    return Problem(index, question, answer, solution, columns)
