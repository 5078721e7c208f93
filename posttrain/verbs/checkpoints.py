"""Verbs that look at checkpoints: two of them compared, one inspected, and one's parameters exported alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.checkpoints.inspect import Inspection

PLACES = "A run, step, items or Hugging Face folder."


def register(app: typer.Typer) -> None:
    """Adds `compare`, `inspect` and `export-params`."""
    app.command()(compare)
    app.command()(inspect)
    app.command(name="export-params")(export_params)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help=PLACES, show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of any layout.", show_default=False)],
    values: Annotated[bool, typer.Option("--values", help="Compare numbers too, not only names and shapes.")] = False,
    atol: Annotated[float, typer.Option(metavar="X", min=0.0, help="Values agree if |A - B| <= atol + ...")] = 1e-5,
    rtol: Annotated[float, typer.Option(metavar="X", min=0.0, help="... rtol * |B|; 0 and 0 for equal.")] = 1e-5,
    ignore_rngs: Annotated[bool, typer.Option("--ignore-rngs", help="Leave out states of random streams.")] = False,
    only: Annotated[str, typer.Option(metavar="WHAT", help="params, or all with the optimizer's state.")] = "all",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A line for each array of each layer.")] = False,
) -> None:
    """Compare two checkpoints, whatever their layouts.

    Each is Linen's, NNX's, MaxText's or Hugging Face's, with layers stacked or apart. Prints what only one has, and
    where shapes, dtypes and (with --values) numbers differ. Exit codes: 0 the same, 1 different, 2 one of them can't
    be read.
    """
    if only not in ("params", "all"):
        raise ValueError(f"--only={only}: no such selection; use params or all")
    from models.checkpoints.compare import Options, compare_checkpoints, report_lines
    from posttrain.process import start_process

    start_process()
    options = Options(
        values=values, atol=atol, rtol=rtol, ignore_rngs=ignore_rngs, only="all" if only == "all" else "params"
    )
    result = compare_checkpoints(a, b, options)
    for line in report_lines(result, options, verbose=verbose):
        print(line)
    if not result.same:
        raise typer.Exit(1)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help=PLACES, show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Check files by name and size, without reading them.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A row for each array of each layer.")] = False,
) -> None:
    """Show what a checkpoint holds, and whether it is sound.

    Its arrays with sizes, the run and the mesh that wrote it, and whether its files are what was written.
    Exit codes: 0 sound, 1 damaged, 2 no checkpoint.
    """
    from models.checkpoints.inspect import inspect_checkpoint
    from posttrain.process import start_process

    start_process()
    found = inspect_checkpoint(checkpoint, verify="quick" if quick else "full", verbose=verbose)
    if sys.stdout.isatty():
        _print_tables(found)
    else:
        print("\n".join(_plain_lines(found)))
    if found.problems:
        raise typer.Exit(1)


def export_params(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A run, step or items folder.", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder that does not exist, or is empty.", show_default=False)
    ],
    scan: Annotated[bool, typer.Option("--scan", help="Keep stacked layers stacked; else they are apart.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Check files by name and size, without reading them.")] = False,
) -> None:
    """Export a checkpoint's parameters alone, in bfloat16.

    Layers are taken apart and nothing else is kept, as decoding wants it. DST becomes a checkpoints folder with the
    step 0, which every loader takes. Exit codes: 0 done, 1 it could not be written, 2 a mistake.
    """
    from models.checkpoints.export_params import export_params as run
    from posttrain.process import start_process

    start_process()
    try:
        written = run(
            source.expanduser(), destination.expanduser(), scan_layers=scan, verify="quick" if quick else "full"
        )
    except OSError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"{written}: parameters of {source} in bfloat16")


def _table_cells(found: Inspection) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The texts of both tables, arrays and totals."""
    from models.checkpoints.inspect import size_text

    arrays: list[tuple[str, ...]] = [
        (
            row.name,
            f"{list(row.shape)}" + (f" x {row.count}" if row.count > 1 else ""),
            row.dtype,
            size_text(row.num_bytes),
            row.placement,
        )
        for row in found.rows
    ]
    totals: list[tuple[str, ...]] = [
        (name, f"{count:,}", f"{values:,}", size_text(size)) for name, count, values, size in found.totals
    ]
    return arrays, totals


ARRAY_HEAD = ("array", "shape", "dtype", "size", "split over")
TOTAL_HEAD = ("section", "arrays", "values", "size")
_RIGHT = {"size", "arrays", "values"}


def _plain_lines(found: Inspection) -> list[str]:
    """The inspection as text in columns."""
    width = max(len(name) for name, _ in found.facts)
    lines = [f"{name:<{width}}  {value}" for name, value in found.facts]
    lines += [f"  {problem}" for problem in found.problems]
    for head, rows in zip((ARRAY_HEAD, TOTAL_HEAD), _table_cells(found), strict=True):
        if rows:
            # A column that is empty all the way, as the mesh's on one device, says nothing.
            kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
            widths = {column: max(len(row[column]) for row in (head, *rows)) for column in kept}
            lines.append("")
            for row in (head, *rows):
                cells = [
                    row[column].rjust(widths[column]) if head[column] in _RIGHT else row[column].ljust(widths[column])
                    for column in kept
                ]
                lines.append("  ".join(cells).rstrip())
    return lines


def _print_tables(found: Inspection) -> None:
    """The inspection for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    width = max(len(name) for name, _ in found.facts)
    for name, value in found.facts:
        style = "bold red" if value.startswith("DAMAGED") else "green" if value.startswith("sound") else ""
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), (value, style)), soft_wrap=True)
    for problem in found.problems:
        console.print(Text(f"  {problem}", "red"), soft_wrap=True)
    for head, rows in zip((ARRAY_HEAD, TOTAL_HEAD), _table_cells(found), strict=True):
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD)
        kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
        for column in kept:
            settings: dict[str, Any] = {"justify": "right"} if head[column] in _RIGHT else {}
            table.add_column(head[column], overflow="fold", **settings)
        for row in rows:
            table.add_row(*(Text(row[column], "bold" if row[0] == "all" else "") for column in kept))
        console.print(table)
