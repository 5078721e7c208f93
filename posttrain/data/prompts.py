"""Prompts of reinforcement learning: problems rendered as token ids, and the order in which they are drawn.

A prompt keeps the number of its problem, from which sampling seeds derive; so neither filtering, nor trimming, nor the
order changes what is sampled for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from models.chat import render_chat
from models.tokenizer import Tokenizer
from posttrain.data.gsm8k import Problem
from rewards.base import RewardInput, Tags

SYSTEM_PROMPT = (
    "Solve the problem step by step. Write your reasoning between {reasoning_start} and {reasoning_end}. Then write "
    "the final answer, one number and nothing else, between {solution_start} and {solution_end}."
)
"""What the policy is told where a recipe does not say otherwise."""
TEMPLATE = "{system_prompt}\n\n{question}"
"""The text of the user's message. It holds no model's turn markers: those are the chat template's to write."""
STATE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """How a question becomes the text of a prompt."""

    system_prompt: str
    """May name the tags: `{reasoning_start}`, `{reasoning_end}`, `{solution_start}`, `{solution_end}`."""
    template: str
    """Names `{question}`, and may name `{system_prompt}` and the tags. Other braces are left as they are."""
    tags: Tags

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise ValueError(f"prompt template {self.template!r}: it asks nothing; write {{question}} where it belongs")

    def render(self, question: str) -> str:
        """The text of a prompt, before the tokenizer's chat template.

        Args:
            question: a problem's question; what looks like a field in it is left as it is.

        Returns:
            The text.
        """
        tags = dataclasses.asdict(self.tags)
        system_prompt = _fill(self.system_prompt, tags)
        return _fill(self.template, {**tags, "system_prompt": system_prompt, "question": question})


def _fill(template: str, fields: Mapping[str, str]) -> str:
    # In one pass, so that what is filled in is not filled in again.
    return re.sub(r"\{(" + "|".join(fields) + r")\}", lambda field: fields[field[1]], template)


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One prompt, with what its completions are judged by."""

    prompt_id: int
    """The problem's number."""
    token_ids: tuple[int, ...]
    text: str
    """The prompt as the policy sees it, special tokens spelled out."""
    question: str
    answer: str
    """The gold answer."""
    columns: Mapping[str, Any]
    """The problem's other columns, for rewards."""

    def reward_input(self, completion: str) -> RewardInput:
        """What rewards are given for a completion of this prompt.

        Args:
            completion: its text, without special tokens.

        Returns:
            The input; `question` is among its columns.
        """
        columns = {"question": self.question, **self.columns}
        return RewardInput(prompt=self.text, completion=completion, answer=self.answer, columns=columns)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, and how many were left out."""

    rows: tuple[PromptRow, ...]
    num_overlong: int
    """Problems whose prompts had too many tokens."""
    num_beyond_limit: int
    """Problems left over once the limit was reached."""


def make_prompts(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    template: PromptTemplate,
    *,
    max_prompt_tokens: int,
    limit: int | None,
    add_bos: bool,
    as_chat: bool | None = None,
) -> PromptSet:
    """Renders problems as prompts: one user's message, or plain text where the tokenizer has no chat template.

    Prompts that are too long are left out first, and the limit counts those that are left; a prompt is never cut, for
    its question would be.

    Args:
        problems: the problems.
        tokenizer: the policy's.
        template: how a question becomes text.
        max_prompt_tokens: tokens that a prompt may have.
        limit: prompts to keep, at most; None for all.
        add_bos: begin plain text with the beginning-of-sequence id. A chat template writes its own.
        as_chat: False makes plain text even where there is a chat template; None asks the tokenizer.

    Returns:
        The prompts, in the problems' order.

    Raises:
        ValueError: every prompt is too long, the chat template refuses one, or a chat is wanted and there is none.
    """
    if as_chat and tokenizer.chat_template is None:
        raise ValueError(
            f"data.as_chat=true: the tokenizer {tokenizer.name} has no chat template; name one as "
            "tokenizer.chat_template, or set data.as_chat=false"
        )
    plain = tokenizer.chat_template is None or as_chat is False
    rows: list[PromptRow] = []
    shortest, overlong, beyond = None, 0, 0
    for problem in problems:
        ids, text = _encoded(template.render(problem.question), tokenizer, add_bos, plain=plain)
        shortest = len(ids) if shortest is None else min(shortest, len(ids))
        if len(ids) > max_prompt_tokens:
            overlong += 1
        elif limit is not None and len(rows) >= limit:
            beyond += 1
        else:
            rows.append(
                PromptRow(problem.problem_id, tuple(ids), text, problem.question, problem.answer, problem.columns)
            )
    if not rows:
        raise ValueError(
            f"max_prompt_length={max_prompt_tokens}: none of {len(problems)} prompts is that short; the shortest has "
            f"{shortest} tokens; raise the length, or shorten the system prompt"
        )
    return PromptSet(tuple(rows), overlong, beyond)


def _encoded(text: str, tokenizer: Tokenizer, add_bos: bool, *, plain: bool) -> tuple[list[int], str]:
    if plain:
        return tokenizer.encode(text, add_bos=add_bos, add_eos=False), text
    chat = render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    return [int(index) for index in chat.ids], chat.text


class PromptStream:
    """Prompts in a random order without end: every epoch each prompt once, in an order of its own.

    What a call takes is all different: a prompt that comes up again, because an epoch ends inside the call, waits for
    the next one. The position is a plain dict of a few numbers, and does not depend on how many prompts a call takes.
    """

    def __init__(self, rows: Sequence[PromptRow], *, seed: int | None) -> None:
        """Starts at the first prompt of the first epoch.

        Args:
            rows: the prompts.
            seed: seed of the orders; None keeps the rows' own order in every epoch.

        Raises:
            ValueError: no prompts, or two with one id.
        """
        if not rows:
            raise ValueError("prompts: []: there is nothing to sample; name data with problems")
        ids = [row.prompt_id for row in rows]
        if len(set(ids)) != len(ids):
            twice = next(index for index in ids if ids.count(index) > 1)
            raise ValueError(f"prompts: id {twice} is there twice: completions are told apart by it; give each its own")
        self._rows = tuple(rows)
        self._seed = seed
        self._fingerprint = {"rows": len(rows), "seed": seed, "sha256": _digest(rows)}
        self._epoch, self._index = 0, 0
        self._order = self._order_of(0)
        self._deferred: deque[int] = deque()

    @property
    def epoch(self) -> int:
        """Epochs that were drawn to their end."""
        return self._epoch

    def take(self, count: int, *, exclude: Collection[int]) -> list[PromptRow]:
        """Draws the next prompts.

        Args:
            count: how many.
            exclude: ids of prompts that must not be among them, such as those that this step already sampled. They
                keep their turn, and come first in the next call.

        Returns:
            That many different prompts.

        Raises:
            ValueError: there are not so many different prompts.
        """
        seen = set(exclude)
        available = sum(row.prompt_id not in seen for row in self._rows)
        if not 0 <= count <= available:
            raise ValueError(
                f"prompts: {count} of {available}: a step samples each prompt once; lower the number of prompts a "
                "step, or name more data"
            )
        chosen: list[PromptRow] = []
        waiting: list[int] = []
        while len(chosen) < count:
            place = self._deferred.popleft() if self._deferred else self._next()
            row = self._rows[place]
            if row.prompt_id in seen:
                waiting.append(place)
            else:
                seen.add(row.prompt_id)
                chosen.append(row)
        self._deferred.extendleft(reversed(waiting))
        return chosen

    def get_state(self) -> dict[str, Any]:
        """The position after the last prompt that was taken: what JSON holds."""
        return {
            "version": STATE_VERSION,
            "fingerprint": dict(self._fingerprint),
            "epoch": self._epoch,
            "index": self._index,
            "deferred": list(self._deferred),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: it was saved with other prompts or another seed, or by another version.
        """
        if state.get("version") != STATE_VERSION or "fingerprint" not in state:
            raise ValueError(
                f"saved prompt position: version {state.get('version')!r}: this stream reads version {STATE_VERSION}; "
                "resume with the version that wrote it"
            )
        saved, own = state["fingerprint"], self._fingerprint
        differing = sorted(key for key in own.keys() | saved.keys() if own.get(key) != saved.get(key))
        if differing:
            was = ", ".join(f"{key}={saved.get(key)!r}, now {own.get(key)!r}" for key in differing)
            raise ValueError(
                f"saved prompt position: {was}: prompts would be skipped or repeated; resume with the same data, "
                "template, tokenizer and seed"
            )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._order = self._order_of(self._epoch)
        self._deferred = deque(int(place) for place in state["deferred"])

    def _next(self) -> int:
        place = int(self._order[self._index])
        self._index += 1
        if self._index == len(self._rows):
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        return place

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self._rows))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))


def _digest(rows: Sequence[PromptRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt_id, row.token_ids, row.answer]).encode() + b"\n")
    return digest.hexdigest()
