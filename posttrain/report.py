"""What became of one run or of several: `index.html`, one page that needs nothing beside it, and its plots as PNGs.

Read are metrics.jsonl, resolved.yaml, provenance.json and the ledger of completions; JAX is not imported, so a report
can be made beside a run that goes on, and on a machine without an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.report_completions import completions_html
from posttrain.report_page import page
from posttrain.report_panels import PANELS
from posttrain.report_plots import draw
from posttrain.report_runs import open_runs
from recipes.rundir import write_atomically


@dataclass(frozen=True)
class Written:
    """What a report consists of."""

    page: Path
    plots: list[Path]
    num_runs: int


def write_report(paths: Sequence[Path], out: Path) -> Written:
    """Reports runs.

    Args:
        paths: run directories, or folders that hold some, as a pipeline's.
        out: the folder to write into; made if missing. The files of an earlier report there are replaced.

    Raises:
        ValueError: a path is no run, no run has a row of metrics, a file is damaged, or `out` cannot be written.
    """
    runs = open_runs(paths)
    try:
        out.mkdir(parents=True, exist_ok=True)
        figures: dict[str, str] = {}
        for panel in PANELS:
            picture = out / f"{panel.name}.png"
            # A plot of an earlier report that this one does not have would be taken for a part of it.
            picture.unlink(missing_ok=True)
            svg = draw(panel, runs, picture)
            if svg is not None:
                figures[panel.name] = svg
        completions = {run.name: text for run in runs if (text := completions_html(run))}
        write_atomically(out / "index.html", page(runs, figures, completions))
    except OSError as error:
        raise ValueError(f"--out={out}: cannot be written ({error.strerror}); choose another folder") from None
    return Written(out / "index.html", [out / f"{name}.png" for name in figures], len(runs))
