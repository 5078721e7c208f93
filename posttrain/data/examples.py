"""From records to examples: the tokens of one conversation, or prompt and completion, and which of them are trained.

Every format ends as ids with a mask of the same length. In a chat the mask is that of `models.chat.render_chat`, which
refuses what it cannot mask right. A prompt and its completion are encoded so that the prompt has the ids it has alone,
as a sampler is given them: the two are encoded as one text, and where a token would straddle the border between them,
each on its own. Trained are the completion's tokens and the end of sequence behind it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from models.chat import render_chat
from models.tokenizer import Tokenizer
from posttrain.data.sources import RecordSource
from recipes.sections.posttrain_data import PosttrainDataSection

COLUMNS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
"""What a record of each format holds, in the order in which `auto` looks for them."""
OPTIONAL = {"messages": ("tools",), "prompt_completion": ("tools",)}
"""What a record may hold besides."""
TEMPLATES = {
    "prompt_completion": ("{prompt}", "{completion}"),
    "question_answer": ("Question: {question}\nAnswer:", " {answer}"),
}
"""Prompt and completion where the recipe has no template of its own."""
CHAT_TEMPLATES = {
    "prompt_completion": ("{prompt}", "{completion}"),
    "question_answer": ("{question}", "{answer}"),
}
"""The same, to be laid out as a chat."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """Tokens, and which of them a model is trained to write."""

    tokens: Int32[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]
    """The first token is nobody's target, whatever this says of it."""
    text_bytes: int
    """UTF-8 bytes of the text that the trained tokens stand for; marks such as the end of sequence are no bytes."""


NOTHING = Example(np.zeros(0, np.int32), np.zeros(0, bool), 0)
"""What becomes of a record that holds nothing to train on."""


@dataclasses.dataclass(frozen=True)
class ExampleFormat:
    """How the records of one source become examples: all that decides the tokens, but for the tokenizer."""

    format: str
    columns: tuple[tuple[str, str], ...]
    """(what it holds, column): what the format needs, and the optional ones that are there."""
    prompt_template: str
    """Empty where the format has none; likewise the completion's."""
    completion_template: str
    as_chat: bool
    completion_only: bool
    add_bos: bool
    add_eos: bool

    @property
    def read_columns(self) -> list[str]:
        """The columns to read: those of the format, and those that its templates name."""
        named = _PLACEHOLDER.findall(self.prompt_template + self.completion_template)
        return sorted({column for _, column in self.columns} | {dict(self.columns).get(name, name) for name in named})


def example_format(
    data: PosttrainDataSection, source: RecordSource, columns: Sequence[str], *, add_bos: bool, add_eos: bool
) -> ExampleFormat:
    """Decides how a source's records are read.

    Args:
        data: the recipe's section.
        source: the data set.
        columns: the columns it has.
        add_bos: begin what is no chat with the tokenizer's BOS.
        add_eos: end it with its EOS.

    Raises:
        ValueError: no format fits the columns, the named one's columns are not there, or a template names another.
    """
    chosen = dict(source.columns)
    for role, column in source.columns:
        if column not in columns:
            raise ValueError(
                f"{source.columns_key}.{role}={column}: the data has the columns {', '.join(sorted(columns))}; "
                "name one of them"
            )
    templates = (data.prompt_template, data.completion_template)
    chosen_format = _find_format(data, source, columns, chosen) if None in templates else _templated_format(data.format)
    needed = COLUMNS[chosen_format] if None in templates else ()
    roles = [role for role in (*needed, *OPTIONAL.get(chosen_format, ())) if chosen.get(role, role) in columns]
    texts = (CHAT_TEMPLATES if data.as_chat else TEMPLATES).get(chosen_format, ("", ""))
    if data.as_chat and not texts[0]:
        raise ValueError(
            f"data.as_chat=true: {source.named()} holds {chosen_format}, which is no prompt with a completion; "
            "set data.as_chat=false, or data.format"
        )
    prompt, completion = (text if own is None else own for own, text in zip(templates, texts, strict=True))
    found = ExampleFormat(
        format=chosen_format,
        columns=tuple((role, chosen.get(role, role)) for role in roles),
        prompt_template=prompt,
        completion_template=completion,
        as_chat=data.as_chat,
        completion_only=data.completion_only and chosen_format != "text",
        add_bos=add_bos,
        add_eos=add_eos,
    )
    missing = [column for column in found.read_columns if column not in columns]
    if missing:
        raise ValueError(
            f"data.prompt_template={prompt!r} data.completion_template={completion!r}: there is no column {missing[0]} "
            f"(the data has {', '.join(sorted(columns))}); correct the template"
        )
    return found


def _templated_format(named: str) -> str:
    return "prompt_completion" if named == "auto" else named


def _find_format(
    data: PosttrainDataSection, source: RecordSource, columns: Sequence[str], chosen: Mapping[str, str]
) -> str:
    tried = COLUMNS if data.format == "auto" else {data.format: COLUMNS[data.format]}
    for name, roles in tried.items():
        if all(chosen.get(role, role) in columns for role in roles):
            return name
    wanted = "; or ".join(" and ".join(chosen.get(role, role) for role in roles) for roles in tried.values())
    raise ValueError(
        f"data.format={data.format}: {source.named()} has the columns {', '.join(sorted(columns))}, and needed are "
        f"{wanted}; name the columns in {source.columns_key}, or set data.format"
    )


def make_example(values: Mapping[str, Any], tokenizer: Tokenizer, form: ExampleFormat) -> Example:
    """Tokenises one record.

    Args:
        values: column to value.
        tokenizer: with a chat template where the record is a chat.
        form: how records of this source are read.

    Returns:
        The example; with no token trained where the record holds nothing that could be.

    Raises:
        ValueError: a column holds something else than its format says, or a chat cannot be masked right.
    """
    columns = dict(form.columns)
    if form.format == "messages":
        tools = read_tools(values, columns)
        return chat_example([], read_messages(values, columns["messages"]), tokenizer, form.completion_only, tools)
    if form.format == "text":
        return text_example("", read_text(values, columns["text"]), tokenizer, form)
    prompt = values[columns["prompt"]] if "prompt" in columns else None
    if isinstance(prompt, list):
        tools = read_tools(values, columns)
        completion = read_messages(values, columns["completion"])
        return chat_example(
            read_messages(values, columns["prompt"]), completion, tokenizer, form.completion_only, tools
        )
    prompt_text = _fill(form.prompt_template, values, columns)
    completion_text = _fill(form.completion_template, values, columns)
    if not form.as_chat:
        return text_example(prompt_text, completion_text, tokenizer, form)
    messages = [{"role": "user", "content": prompt_text}]
    answer = [{"role": "assistant", "content": completion_text}] if completion_text.strip() else []
    return chat_example(messages, answer, tokenizer, form.completion_only, None)


def chat_example(
    prompt: Sequence[Mapping[str, Any]],
    completion: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    completion_only: bool,
    tools: Sequence[dict[str, Any]] | None,
) -> Example:
    """The tokens of a conversation, with the assistant's turns behind the prompt trained, or everything.

    Args:
        prompt: messages that are given; what the assistant says in them is not trained.
        completion: the messages that follow.
        tokenizer: with a chat template.
        completion_only: False trains all tokens.
        tools: JSON schemas of the tools that the assistant may call.

    Raises:
        ValueError: the chat cannot be masked right.
    """
    if not completion:
        return NOTHING
    chat = render_chat(tokenizer, [*prompt, *completion], add_generation_prompt=False, tools=tools)
    if not completion_only:
        return Example(chat.ids, np.ones(len(chat.ids), bool), len(chat.text.encode("utf-8")))
    trained = chat.trained
    if prompt and trained.any():
        trained = trained & (np.arange(len(trained)) >= len(prompt_ids(prompt, chat.ids, tokenizer, tools)))
    written = tokenizer.decode(chat.ids[trained], skip_special=True)
    return Example(chat.ids, trained, len(written.encode("utf-8")))


def prompt_ids(
    prompt: Sequence[Mapping[str, Any]],
    whole: Int32[np.ndarray, " n"],
    tokenizer: Tokenizer,
    tools: Sequence[dict[str, Any]] | None,
) -> Int32[np.ndarray, " p"]:
    """The ids that a sampler is given for `prompt`, which must be those that `whole` begins with.

    Raises:
        ValueError: they are not.
    """
    ids = render_chat(tokenizer, prompt, add_generation_prompt=True, tools=tools).ids
    if not np.array_equal(whole[: len(ids)], ids):
        raise ValueError(
            f"tokenizer {tokenizer.name}: chat: the {len(prompt)} messages of the prompt have other tokens alone, as a "
            "sampler sees them, than with the completion behind them; use a chat template that renders earlier "
            "messages the same way in every position"
        )
    return ids


def text_example(prompt: str, completion: str, tokenizer: Tokenizer, form: ExampleFormat) -> Example:
    """The tokens of a prompt and what follows it; an empty completion trains nothing."""
    if not completion.strip():
        return NOTHING
    given, tokens = encode_completion(prompt, completion, tokenizer, add_bos=form.add_bos, add_eos=form.add_eos)
    trained = np.arange(len(tokens)) >= (given if form.completion_only else 0)
    text = completion if form.completion_only else prompt + completion
    return Example(np.array(tokens, np.int32), trained, len(text.encode("utf-8")))


def encode_completion(
    prompt: str, completion: str, tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool
) -> tuple[int, list[int]]:
    """Encodes a prompt and its completion so that the prompt keeps the ids it has alone.

    Returns:
        The number of the prompt's tokens, BOS included, and all tokens.
    """
    whole = tokenizer.encode(prompt + completion, add_bos=add_bos, add_eos=add_eos)
    given = tokenizer.encode(prompt, add_bos=add_bos, add_eos=False)
    if whole[: len(given)] == given:
        return len(given), whole
    return len(given), [*given, *tokenizer.encode(completion, add_bos=False, add_eos=add_eos)]


def read_messages(values: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """The messages of a column; null is none.

    Raises:
        ValueError: the column holds something else.
    """
    held = values[column]
    if held is None:
        return []
    if not isinstance(held, list) or not all(isinstance(message, dict) for message in held):
        raise ValueError(
            f"column {column}: {_shorten(held)}: a conversation is a list of messages, each with role and content; "
            "correct it, or name another column in data.columns"
        )
    return held


def read_tools(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The tools of a conversation, None where the record has none."""
    held = values[columns["tools"]] if "tools" in columns else None
    return held or None


def read_text(values: Mapping[str, Any], column: str) -> str:
    """The text of a column; null is empty.

    Raises:
        ValueError: the column holds something else.
    """
    held = values[column]
    if held is None:
        return ""
    if not isinstance(held, str):
        raise ValueError(
            f"column {column}: {_shorten(held)}: it holds no text; name a column of text in data.columns, or set "
            "data.format"
        )
    return held


def _fill(template: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: read_text(values, columns.get(match[1], match[1])), template)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
