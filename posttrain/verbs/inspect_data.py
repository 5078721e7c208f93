"""The verb that shows the rows a recipe trains on, each token as trained or not.

What is shown are the batches of the very iterator that the trainer reads, taken apart again: what is wrong with a
template, a mask or a packed row can be seen before a run is started.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

TRAINED, GIVEN = "bold green", "dim"
OPENING, CLOSING = "[[", "]]"
"""Around trained tokens where there are no colours."""


def register(app: typer.Typer) -> None:
    """Adds `inspect-data`."""
    app.command(name="inspect-data")(inspect_data)


def inspect_data(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the bare name of a shipped one.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that win, as data.packing=false.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Rows (or pairs) to show.")] = 2,
    evaluation: Annotated[bool, typer.Option("--eval", help="The evaluation's rows, not training's.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="No colours, as when the output is not a terminal.")] = False,
) -> None:
    """Show the rows a recipe trains on, trained tokens marked.

    Trained tokens are green on a terminal, and stand in [[ ]] elsewhere. A row with nothing to train is an error.
    """
    from posttrain.cli import open_recipe
    from pretrain.data.iterators import RowIterator

    loaded = open_recipe(recipe, overrides)
    iterator, decode = open_iterator(loaded.recipe, evaluation=evaluation)
    show = _plain_printer(decode) if plain or not sys.stdout.isatty() else _rich_printer(decode)
    total = Counts(0, 0, 0)
    try:
        for number, batch in enumerate(itertools.islice(iterator, rows)):
            for row in rows_of(batch, number):
                require_trained(row)
                show(row)
                total = total + row.counts
        tallies = iterator.tallies if isinstance(iterator, RowIterator) else {}
    finally:
        iterator.close()
    print(f"total: {total}")
    if "examples" in tallies:
        names = ("examples", "truncated", "dropped", "skipped")
        print("records read for them: " + ", ".join(f"{tallies[name]} {name}" for name in names))


@dataclass(frozen=True)
class Counts:
    """The cells of rows, those that predict a token, and those of them that are trained."""

    cells: int
    predicted: int
    trained: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.cells + other.cells, self.predicted + other.predicted, self.trained + other.trained)

    def __str__(self) -> str:
        padding = self.cells - self.predicted
        return (
            f"{self.cells} cells, {self.predicted} tokens to predict, {self.trained} of them trained "
            f"({100 * self.trained / max(1, self.predicted):.1f} %), {padding} padding "
            f"({100 * padding / max(1, self.cells):.1f} %)"
        )


@dataclass(frozen=True)
class Segment:
    """The tokens of one document, example or answer, and which of them are trained."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    def runs(self) -> Iterator[tuple[bool, list[int]]]:
        """The tokens in runs that are trained or not."""
        for trained, run in itertools.groupby(zip(self.trained, self.tokens, strict=True), key=lambda two: two[0]):
            yield trained, [token for _, token in run]


@dataclass(frozen=True)
class Row:
    """A row of a batch, taken apart."""

    label: str
    counts: Counts
    segments: tuple[Segment, ...]


def open_iterator(recipe: Any, *, evaluation: bool) -> tuple[Any, Callable[[list[int]], str]]:
    """The recipe's own iterator, giving batches of one row, and what turns its ids into text.

    Raises:
        ValueError: this kind of recipe reads no data, or the data is not as the recipe says.
    """
    from models.checkpoints.hf_config import resolve_config
    from models.tokenizer import load_tokenizer
    from recipes.schema import DataSection
    from recipes.sections.posttrain_data import PosttrainDataSection, PreferenceDataSection

    data = getattr(recipe, "data", None)
    makers: tuple[Callable[..., Any], Callable[..., Any]]
    if isinstance(data, PreferenceDataSection):
        from posttrain.data.pairs import make_preference_eval_iterator, make_preference_iterator

        makers = make_preference_iterator, make_preference_eval_iterator
    elif isinstance(data, PosttrainDataSection):
        from posttrain.data.build import make_sft_eval_iterator, make_sft_iterator

        makers = make_sft_iterator, make_sft_eval_iterator
    elif isinstance(data, DataSection):
        from pretrain.data.build import make_eval_iterator, make_train_iterator

        makers = make_train_iterator, make_eval_iterator
    else:
        raise ValueError(
            f"kind={recipe.kind}: its recipes have no rows of tokens to show; name a recipe whose data section does"
        )
    section = recipe.tokenizer
    synthetic = isinstance(data, DataSection) and data.kind == "synthetic"
    tokenizer = None if synthetic else load_tokenizer(section)
    iterator: Any = makers[evaluation](
        data,
        tokenizer,
        vocab_size=resolve_config(recipe.model).vocab_size,
        rows_per_batch=1,
        add_bos=section.add_bos,
        add_eos=section.add_eos,
        host_index=0,
        host_count=1,
    )
    if tokenizer is None:
        return iterator, lambda ids: " ".join(map(str, ids))
    return iterator, lambda ids: tokenizer.decode(ids, skip_special=False)


def rows_of(batch: Any, number: int) -> Iterator[Row]:
    """Takes a batch of one row, or one pair, apart; `number` counts the batches."""
    from posttrain.data.pairs import PreferenceBatch

    if not isinstance(batch, PreferenceBatch):
        yield _row(batch, 0, f"row {number}")
        return
    for side, name in enumerate(("chosen", "rejected")):
        yield _row(batch.rows(), side, f"pair {number} (pair_id {batch.pair_id[0]}) {name}")


def require_trained(row: Row) -> None:
    """Refuses a row that trains nothing.

    Raises:
        ValueError: none of its tokens is trained.
    """
    if not row.counts.trained:
        raise ValueError(
            f"{row.label}: none of its {row.counts.predicted} tokens is trained, so a step on it would learn nothing; "
            "correct the data section's format, columns or templates"
        )


def _row(batch: Any, index: int, label: str) -> Row:
    """Reads one row of a TokenBatch."""
    import numpy as np

    segmentation = batch.inputs_segmentation[index]
    trained = batch.targets_segmentation[index] != 0
    segments = []
    for segment in range(1, int(segmentation.max(initial=0)) + 1):
        cells = np.flatnonzero(segmentation == segment)
        tokens = (int(batch.inputs[index][cells[0]]), *map(int, batch.targets[index][cells]))
        segments.append(Segment(tokens, (False, *map(bool, trained[cells]))))
    predicted = int(np.count_nonzero(segmentation))
    return Row(label, Counts(len(segmentation), predicted, int(np.count_nonzero(trained))), tuple(segments))


def _plain_printer(decode: Callable[[list[int]], str]) -> Callable[[Row], None]:
    def show(row: Row) -> None:
        print(f"{row.label}: {row.counts}")
        for number, segment in enumerate(row.segments, 1):
            print(f"--- {_described(number, segment, len(row.segments))}")
            pieces = ((trained, decode(tokens)) for trained, tokens in segment.runs())
            print("".join(f"{OPENING}{text}{CLOSING}" if trained else text for trained, text in pieces))
        print()

    return show


def _rich_printer(decode: Callable[[list[int]], str]) -> Callable[[Row], None]:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def show(row: Row) -> None:
        console.print(Text(f"{row.label}: {row.counts}", "bold"))
        for number, segment in enumerate(row.segments, 1):
            console.rule(Text(_described(number, segment, len(row.segments))), align="left", style="cyan")
            text = Text()
            for trained, tokens in segment.runs():
                text.append(decode(tokens), TRAINED if trained else GIVEN)
            console.print(text)
        console.print()

    return show


def _described(number: int, segment: Segment, count: int) -> str:
    return f"segment {number} of {count}: {len(segment.tokens)} tokens, {sum(segment.trained)} trained"
