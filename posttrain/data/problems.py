"""A recipe's problems as prompts: those that are trained on, and those that are held out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.tokenizer import Tokenizer
from posttrain.data.gsm8k import Problem, ProblemSource, load_problems
from posttrain.data.prompts import SYSTEM_PROMPT, PromptRow, PromptSet, PromptStream, PromptTemplate, make_prompts
from posttrain.data.word_problems import GAIN_VERBS, LARGEST, LOSS_VERBS, word_problems
from recipes.schema import PromptDataSection, TokenizerSection
from rewards.base import Tags

logger = logging.getLogger(__name__)

TAGS = Tags()
NUM_STORIES = 10000
NUM_HELD_OUT_STORIES = 400


@dataclass(frozen=True)
class Problems:
    """A data section's problems, before any tokenizer."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]
    """Empty where the section names none."""


def load_all(data: PromptDataSection) -> Problems:
    """Loads or makes the problems of a section.

    Raises:
        ValueError: they cannot be loaded.
    """
    if data.kind == "word_problems":
        sizes = {"train": data.num_problems or NUM_STORIES, "test": data.num_eval_problems or NUM_HELD_OUT_STORIES}
        return Problems(*(_stories(data, split, count) for split, count in sizes.items()))
    held_out: Sequence[Problem] = []
    if data.eval_path or data.eval_name or data.eval_split:
        named = data.eval_path is not None or data.eval_name is not None
        held_out = load_problems(
            ProblemSource(
                path=data.eval_path if named else data.path,
                name=data.eval_name if named else data.name,
                split=data.eval_split or data.split,
                question_column=data.question_column,
                answer_column=data.answer_column,
                answer_mark=data.answer_mark,
                key_prefix="data.eval_",
            )
        )
    train = load_problems(
        ProblemSource(
            path=data.path,
            name=data.name,
            split=data.split,
            question_column=data.question_column,
            answer_column=data.answer_column,
            answer_mark=data.answer_mark,
            key_prefix="data.",
        )
    )
    _warn_of_shared(train[: data.num_problems], held_out[: data.num_eval_problems])
    return Problems(train, held_out)


def _warn_of_shared(train: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    """Tells of questions that are trained on and held out, letter for letter."""
    trained = {problem.question for problem in train}
    shared = sum(problem.question in trained for problem in held_out)
    if shared:
        logger.warning(
            "data: %d of %d held-out questions are also among those that are trained on, so that solving them says "
            "nothing of new ones; name other data.eval_path, data.eval_name or data.eval_split",
            shared,
            len(held_out),
        )


def _stories(data: PromptDataSection, split: Any, count: int) -> list[Problem]:
    stories = word_problems(
        count,
        seed=data.shuffle_seed,
        split=split,
        levels=data.levels,
        verbs=(*GAIN_VERBS, *LOSS_VERBS),
        largest=LARGEST,
    )
    return [
        Problem(number, story.question, str(story.answer), story.solution, {"level": story.level})
        for number, story in enumerate(stories)
    ]


def prompt_set(
    problems: Sequence[Problem],
    data: PromptDataSection,
    tokenizer: Tokenizer,
    section: TokenizerSection,
    *,
    max_prompt_length: int,
    limit: int | None,
) -> PromptSet:
    """Renders problems as a section says; what is left out is logged."""
    template = PromptTemplate(
        system_prompt=SYSTEM_PROMPT if data.system_prompt is None else data.system_prompt,
        template=data.template,
        tags=TAGS,
    )
    prompts = make_prompts(
        problems,
        tokenizer,
        template,
        max_prompt_tokens=max_prompt_length,
        limit=limit,
        add_bos=section.add_bos,
        as_chat=data.as_chat,
    )
    if prompts.num_overlong:
        logger.info(
            "%d of %d prompts are longer than %d tokens and left out",
            prompts.num_overlong,
            len(problems),
            max_prompt_length,
        )
    return prompts


class ClosablePrompts(PromptStream):
    """A stream as a session wants its data."""

    def close(self) -> None:
        """Nothing reads ahead."""


def prompt_stream(rows: Sequence[PromptRow], data: PromptDataSection) -> ClosablePrompts:
    """The rows in the order that a section says."""
    return ClosablePrompts(rows, seed=data.shuffle_seed if data.shuffle else None)
