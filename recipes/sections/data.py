"""The sections that say what is read: data, and the evaluation that reads its held-out split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import AsTuple, OnlyWhen, Problem, Section, Unless

READ_FROM_DISK = Unless("kind", "synthetic")


class MixtureEntry(Section):
    """One source of a data mixture; what is null is taken from the data section."""

    name: str | None = None
    """The dataset's name, as data.name."""
    path: str | None = None
    """Where the source lies, as data.path."""
    split: str | None = None
    """The split, as data.split."""
    text_column: str | None = None
    """The column that holds the text, as data.text_column."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """The share of documents drawn from this source, relative to the other weights."""

    def problems(self) -> Iterator[Problem]:
        """Yields an entry that names no source."""
        if self.name is None and self.path is None:
            yield Problem("name", None, "a source of a mixture is named", "set name or path")


class DataSection(Section):
    """The training rows: where they come from, and how documents are laid into rows."""

    kind: Literal["synthetic", "tfds", "hf", "text"] = "synthetic"
    """synthetic: one random batch, repeated; tfds: a TFDS folder; hf: Hugging Face datasets; text: local text files."""
    path: Annotated[str | None, READ_FROM_DISK] = None
    """The TFDS data folder, a local Hugging Face dataset, or text files; relative to the working folder."""
    name: Annotated[str | None, OnlyWhen("kind", "tfds", "hf")] = None
    """The dataset's name, such as `c4/en:3.1.0` (tfds) or a hub name (hf)."""
    split: Annotated[str, READ_FROM_DISK] = "train"
    """The split that training reads."""
    eval_path: Annotated[str | None, READ_FROM_DISK, Unless("eval.interval", 0)] = None
    """As path, for evaluation; null is data.path."""
    eval_name: Annotated[str | None, OnlyWhen("kind", "tfds", "hf"), Unless("eval.interval", 0)] = None
    """As name, for evaluation; null is data.name."""
    eval_split: Annotated[str | None, READ_FROM_DISK, Unless("eval.interval", 0)] = None
    """As split, for evaluation; null is data.split, which then needs an eval_path or eval_name of its own."""
    text_column: Annotated[str, READ_FROM_DISK] = "text"
    """The column that holds a document."""
    sequence_length: Annotated[int, Field(ge=1)] = 2048
    """Tokens in a row."""
    packing: bool = True
    """Lay several documents into one row, kept apart by segment ids; otherwise one document a row, padded."""
    max_segments_per_row: Annotated[int | None, Field(ge=1), OnlyWhen("packing", True)] = None
    """The most documents in a packed row; null is no limit."""
    shuffle: Annotated[bool, READ_FROM_DISK] = True
    """Read documents in a random order, a new one each epoch."""
    shuffle_seed: Annotated[int, Field(ge=0), READ_FROM_DISK, OnlyWhen("shuffle", True)] = 0
    """The seed of that order."""
    num_workers_threads: Annotated[int, Field(ge=1), READ_FROM_DISK] = 16
    """Threads that read and tokenise."""
    prefetch_buffer: Annotated[int, Field(ge=1), READ_FROM_DISK] = 2
    """Batches made ahead of the step that needs them."""
    num_epochs: Annotated[int | None, Field(ge=1), READ_FROM_DISK] = None
    """Passes over the data; null repeats for ever."""
    mixture: Annotated[tuple[MixtureEntry, ...], AsTuple, READ_FROM_DISK] = ()
    """Several sources drawn by weight, instead of path and name."""
    reuse_batch: Annotated[int, Field(ge=0), READ_FROM_DISK] = 0
    """Repeat the first so many real batches, to see a model overfit; 0 reads on."""

    def problems(self) -> Iterator[Problem]:
        """Yields sources that are missing or named twice."""
        if self.kind == "synthetic":
            return
        if self.mixture:
            for name in ("path", "name"):
                if getattr(self, name) is not None:
                    yield Problem(
                        name,
                        getattr(self, name),
                        "data.mixture names the sources",
                        f"set data.{name} to null and name it in the mixture",
                    )
            return
        needed = {"tfds": ("path", "name"), "text": ("path",), "hf": ()}[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                yield Problem(name, None, f"data.kind={self.kind} reads from a named place", f"set data.{name}")
        if self.kind == "hf" and self.path is None and self.name is None:
            yield Problem(
                "name", None, "data.kind=hf reads from a named place", "set data.name (hub) or data.path (local)"
            )


class EvalSection(Section):
    """The held-out loss: when it is taken and over how much."""

    interval: Annotated[int, Field(ge=0)] = 0
    """Completed training steps between evaluations; 0 turns evaluation off."""
    steps: Annotated[int | None, Field(ge=1), Unless("interval", 0)] = None
    """Batches in one evaluation; null is the whole split."""
    target_loss: Annotated[float, Field(ge=0.0), Unless("interval", 0)] = 0.0
    """Stop the run once the held-out loss (nats a token) is at or below this; 0 never stops."""
    per_device_batch_size: Annotated[float | None, Field(gt=0.0), Unless("interval", 0)] = None
    """Rows a device holds in an evaluation batch; null is train.per_device_batch_size."""
