"""The data sections of post-training: examples to imitate, and pairs of which one answer is preferred."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.sections.base import AsTuple, FrozenDict, FrozenMap, OnlyWhen, Problem, Section, Unless

TEMPLATED = OnlyWhen("data.format", "auto", "prompt_completion", "question_answer")


class RecordMixtureEntry(Section):
    """One source of a mixture; what is null is taken from the data section."""

    name: str | None = None
    """The dataset's hub name, as data.name."""
    path: str | None = None
    """Where the source lies, as data.path."""
    split: str | None = None
    """The split, as data.split."""
    columns: FrozenDict = FrozenMap()
    """As data.columns; entries here replace single ones there."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """The share of records drawn from this source, relative to the other weights."""

    def problems(self) -> Iterator[Problem]:
        """Yields an entry that names no source, or two."""
        if (self.name is None) == (self.path is None):
            yield Problem(
                "name", self.name, "a source of a mixture is on the hub or local", "set exactly one of name and path"
            )


class RecordsSection(Section):
    """What the data sections of post-training share: where records come from, in which order, and how long rows are."""

    COLUMN_ROLES: ClassVar[tuple[str, ...]]
    """What a record's columns may hold; each kind of data says it."""
    path: str | None = None
    """A JSON, JSON Lines, Parquet or CSV file, or a folder of them; relative to the working folder."""
    name: str | None = None
    """A Hugging Face hub name, with `:config` behind it where the dataset has several. One of path and name is set."""
    split: str = "train"
    """The split that training reads; may be sliced, as in `train[:90%]`."""
    eval_path: Annotated[str | None, Unless("eval.interval", 0)] = None
    """As path, for evaluation; null is data.path."""
    eval_name: Annotated[str | None, Unless("eval.interval", 0)] = None
    """As name, for evaluation; null is data.name."""
    eval_split: Annotated[str | None, Unless("eval.interval", 0)] = None
    """As split, for evaluation; null is data.split, which then needs an eval_path or eval_name of its own."""
    mixture: Annotated[tuple[RecordMixtureEntry, ...], AsTuple] = ()
    """Several sources drawn by weight, instead of path and name."""
    columns: FrozenDict = FrozenMap()
    """Which column holds what, where it is not called so itself, such as {prompt: instruction, completion: output}."""
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a row, at most."""
    buckets: Annotated[tuple[int, ...], AsTuple] = ()
    """Lengths of padded rows, rising: a batch holds rows of one of them. sequence_length is the last without naming."""
    overlong: Literal["truncate", "drop", "refuse"] = "truncate"
    """What is done with more than sequence_length tokens: cut off the end, leave the record out, or end the run."""
    untrainable: Literal["refuse", "skip"] = "refuse"
    """What a record with nothing to train on does: end the run with its name, or be left out and counted."""
    checked_records: Annotated[int | None, Field(ge=1)] = 1000
    """Records of each source that are checked before the first step; null checks all. Others are when they are read."""
    shuffle: bool = True
    """Read records in a random order, a new one each epoch."""
    shuffle_seed: Annotated[int, Field(ge=0), OnlyWhen("data.shuffle", True)] = 0
    """The seed of that order."""
    num_epochs: Annotated[int | None, Field(ge=1)] = None
    """Passes over the data; null repeats for ever."""
    num_workers_threads: Annotated[int, Field(ge=1)] = 16
    """Threads that read and tokenise."""
    prefetch_buffer: Annotated[int, Field(ge=1)] = 2
    """Batches made ahead of the step that needs them."""

    def problems(self) -> Iterator[Problem]:
        """Yields sources that are missing or named twice, unknown columns and buckets out of order."""
        yield from self._source_problems()
        for where, columns in [("columns", self.columns), *self._mixture_columns()]:
            unknown = [role for role in columns if role not in self.COLUMN_ROLES]
            if unknown:
                yield Problem(
                    f"{where}.{unknown[0]}",
                    columns[unknown[0]],
                    f"no column is called so here; what a record may hold is {', '.join(self.COLUMN_ROLES)}",
                    "use one of these as the key, with the column's name as its value",
                )
            for role, column in columns.items():
                if not isinstance(column, str):
                    yield Problem(f"{where}.{role}", column, "a column has a name", "write the column's name")
        rising = all(low < high for low, high in zip(self.buckets, self.buckets[1:], strict=False))
        if self.buckets and not (rising and self.buckets[0] >= 1 and self.buckets[-1] <= self.sequence_length):
            yield Problem(
                "buckets",
                list(self.buckets),
                f"the lengths rise from 1 to data.sequence_length={self.sequence_length} at most",
                "sort them and drop what is longer",
            )

    def _mixture_columns(self) -> Iterator[tuple[str, FrozenMap]]:
        for index, entry in enumerate(self.mixture):
            yield f"mixture[{index}].columns", entry.columns

    def _source_problems(self) -> Iterator[Problem]:
        named = [key for key in ("path", "name") if getattr(self, key) is not None]
        if self.mixture:
            for key in named:
                yield Problem(
                    key,
                    getattr(self, key),
                    "data.mixture names the sources",
                    f"set data.{key} to null and name it in the mixture",
                )
            if self.num_epochs is not None:
                yield Problem(
                    "num_epochs",
                    self.num_epochs,
                    "the sources of a mixture come to their ends at different times, so it has no epochs",
                    "set data.num_epochs to null and choose train.steps",
                )
        elif len(named) != 1:
            yield Problem(
                "path",
                self.path,
                f"records come from one place, and data.name={self.name}",
                "set data.path (local) or data.name (hub), and not both",
            )
        if self.eval_path is not None and self.eval_name is not None:
            yield Problem(
                "eval_path",
                self.eval_path,
                f"records come from one place, and data.eval_name={self.eval_name}",
                "set one of the two to null",
            )


class PosttrainDataSection(RecordsSection):
    """Examples for supervised fine-tuning and distillation: chats, prompts with completions, or plain text."""

    format: Literal["auto", "messages", "prompt_completion", "question_answer", "text"] = "auto"
    """What a record holds; auto takes the first of these whose columns are all there."""
    as_chat: Annotated[bool, TEMPLATED] = False
    """Lay prompt and completion out with the tokenizer's chat template, as a user's and an assistant's message."""
    prompt_template: Annotated[str | None, TEMPLATED] = None
    """The prompt's text, {column} standing for a column's text. null: the prompt as it is; `Question: {question}` and
    `Answer:` on a line of its own (question_answer); or, as_chat, the question as it is."""
    completion_template: Annotated[str | None, TEMPLATED] = None
    """As prompt_template, for the text that is trained. null: the completion or answer as it is, an answer after a
    space unless as_chat."""
    completion_only: Annotated[bool, Unless("data.format", "text")] = True
    """Train on what the assistant wrote and the stop token alone; false trains prompts too. Text is trained whole."""
    packing: bool = True
    """Lay several examples into one row, kept apart by segment ids; otherwise one example a row, padded."""
    max_segments_per_row: Annotated[int | None, Field(ge=1), OnlyWhen("data.packing", True)] = None
    """The most examples in a packed row; null is no limit."""

    def problems(self) -> Iterator[Problem]:
        """Yields the rules of sources and rows, and buckets of packed rows."""
        yield from super().problems()
        if self.packing and self.buckets:
            yield Problem(
                "buckets", list(self.buckets), "packed rows all have data.sequence_length", "set data.packing=false"
            )

    COLUMN_ROLES: ClassVar[tuple[str, ...]] = (
        "messages",
        "tools",
        "prompt",
        "completion",
        "question",
        "answer",
        "text",
    )


class PreferenceDataSection(RecordsSection):
    """Pairs of answers to one prompt, of which the first is preferred."""

    format: Literal["auto", "messages", "text"] = "auto"
    """messages: chosen and rejected are lists of messages; text: they are strings; auto looks at the columns."""
    as_chat: Annotated[bool, OnlyWhen("data.format", "auto", "text")] = False
    """Lay strings out with the tokenizer's chat template: the prompt as a user's message, the answers as replies."""

    COLUMN_ROLES: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected", "tools")
