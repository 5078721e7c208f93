"""The verb that shows what became of runs: a page with plots, the runs' facts, and sample completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds `report`."""
    app.command()(report)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run folders, or folders of runs, as a pipeline's.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where to write. [of one RUN: RUN/report]", show_default=False),
    ] = None,
) -> None:
    """Write a page about one run, or several beside each other.

    FOLDER/index.html needs nothing beside it and opens in any browser; the plots are also written as PNGs. A run that
    still goes on can be reported.
    """
    from posttrain.report import write_report

    if out is None and len(runs) > 1:
        raise ValueError(f"posttrain report: {len(runs)} runs: a comparison belongs to none of them; add --out FOLDER")
    written = write_report(runs, out.expanduser() if out is not None else runs[0].expanduser() / "report")
    print(f"{written.page}: {written.num_runs} run{'s' * (written.num_runs > 1)}, {len(written.plots)} plots")
