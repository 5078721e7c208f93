"""The files of `posttrain stories`: one small world for every stage."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posttrain.data.word_problems import (
    GAIN_VERBS,
    LOSS_VERBS,
    MADE_UP_VERBS,
    Shares,
    Split,
    WordProblem,
    pretraining_texts,
    save_word_tokenizer,
    word_problems,
    write_problems,
)
from rewards.base import Tags

FILE_NAMES = (
    "tokenizer", "pretrain.jsonl", "sft.jsonl", "pairs.jsonl", "problems.jsonl", "validation.jsonl", "test.jsonl",
)  # fmt: skip
"""Of all that is written."""
LEVELS = (2, 3)
"""Of the problems: two steps each."""
SHOWN_LEVELS = (1,)
"""Of the solved stories in pretraining's text: one step, so that it is left to SFT to show how two are taken."""
ALL_VERBS = (*GAIN_VERBS[:6], *LOSS_VERBS[:6])
SOLVED_VERBS = (*GAIN_VERBS[:3], *LOSS_VERBS[:3], *MADE_UP_VERBS[:3])
"""Verbs of the stories that are shown with their solution; what the others mean is left to learn from rewards. A third
are made up, so that a model is undecided about the others: where it was sure of a wrong meaning, rewards could not undo
that."""
LARGEST = 50
"""Bound on all numbers: there are a quarter as many sums below 50 as below 100 to learn from the same text."""
SHARES = Shares(drills=0.4, sums=0.15, stories=0.1)
"""Much of the text drills single steps: a policy that calculates badly hears from its rewards of its sums alone. A
third are solved stories: with a fifth, some seeds did not find out that the verb decides the operation."""
PRETRAINING_SEED = 1_000_003
"""Added to the seed of pretraining's documents, so that they are not the stories of the later stages."""


def write_stories(
    folder: Path, *, seed: int, documents: int, examples: int, held_out: int
) -> Iterator[tuple[Path, str]]:
    """Writes the files; yields each with what it holds.

    Args:
        folder: where.
        seed: of all choices.
        documents: documents of pretraining.
        examples: solved stories of SFT, and pairs of DPO.
        held_out: stories of evaluation, whose arithmetic none of the other files holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    yield save_word_tokenizer(folder / "tokenizer", Tags()), "a tokenizer of words, numbers and signs"
    texts = pretraining_texts(
        documents,
        seed=seed + PRETRAINING_SEED,
        levels=LEVELS,
        verbs=ALL_VERBS,
        solved_levels=SHOWN_LEVELS,
        solved_verbs=SOLVED_VERBS,
        largest=LARGEST,
        shares=SHARES,
    )
    yield _write_lines(folder / "pretrain.jsonl", ({"text": text} for text in texts)), f"{documents} documents"
    solved = _problems(examples, seed, "train", SOLVED_VERBS)
    yield write_problems(solved, folder / "sft.jsonl", tags=None), f"{examples} solved stories"
    yield _write_lines(folder / "pairs.jsonl", _pairs(solved, seed)), f"{examples} pairs of a right and a wrong answer"
    problems = _problems(10 * examples, seed + 1, "train", ALL_VERBS)
    yield write_problems(problems, folder / "problems.jsonl", tags=None), f"{len(problems)} problems with answers"
    held_out_splits: tuple[Split, ...] = ("validation", "test")
    for split in held_out_splits:
        rows = _problems(held_out, seed, split, ALL_VERBS)
        yield write_problems(rows, folder / f"{split}.jsonl", tags=None), f"{held_out} problems, held out"


def _problems(count: int, seed: int, split: Split, verbs: tuple[str, ...]) -> list[WordProblem]:
    return word_problems(count, seed=seed, split=split, levels=LEVELS, verbs=verbs, largest=LARGEST)


def _pairs(problems: list[WordProblem], seed: int) -> Iterator[dict[str, str]]:
    """The right solution, and one that ends in another number."""
    rng = np.random.default_rng([seed, len(problems)])
    for problem in problems:
        wrong = int(rng.integers(0, LARGEST))
        wrong += wrong >= problem.answer
        spoiled = problem.solution.removesuffix(f"#### {problem.answer}") + f"#### {wrong}"
        yield {"prompt": problem.question + "\n", "chosen": problem.solution, "rejected": spoiled}


def _write_lines(path: Path, rows: Iterator[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
