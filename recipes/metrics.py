"""A run's metrics: metrics.jsonl first, and views of it (console, TensorBoard, W&B) that may be missing.

A row is one JSON object on one line: `step` (completed steps), `attempt`, `time` (seconds since 1970) and the
metrics by name. JSON has no NaN or infinity, so those are the strings "NaN", "Infinity" and "-Infinity";
`read_metrics` gives floats back. Several rows may have the same step (a training row and an evaluation row).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

from recipes.metric_views import TableView, View, make_views
from recipes.rundir import Run, metrics_path, write_atomically
from recipes.schema import Recipe

ROW_FIELDS = ("step", "attempt", "time")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends rows to metrics.jsonl, each flushed to the system before `write` returns, and shows them in views.

    In a process that is not the main one every call does nothing.
    """

    def __init__(
        self,
        path: Path,
        *,
        attempt: int,
        restored_step: int,
        is_main: bool,
        views: Sequence[View],
        clock: Callable[[], float],
    ) -> None:
        """Opens the file, dropping rows of an earlier attempt past the step that training goes on from.

        Args:
            path: the run's metrics.jsonl.
            attempt: the number of this attempt, from 1.
            restored_step: completed steps of the restored state; later rows are dropped. -1 drops all.
            is_main: whether this process writes.
            views: what else shows each row.
            clock: gives each row's time, such as time.time.
        """
        self._attempt = attempt
        self._clock = clock
        self._views = tuple(views) if is_main else ()
        self._file = None
        if is_main:
            drop_rows_after(path, restored_step)
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes one row.

        Args:
            step: completed steps; rows may come out of order.
            metrics: names to numbers, arrays of one element included.

        Raises:
            ValueError: a name is one of the row's own fields.
        """
        if self._file is None:
            return
        clash = [name for name in metrics if name in ROW_FIELDS]
        if clash:
            raise ValueError(f"metrics: {clash[0]}: is a field of every row; name the metric otherwise")
        numbers = {name: float(value) for name, value in metrics.items()}
        row = {"step": int(step), "attempt": self._attempt, "time": round(self._clock(), 3)}
        row |= {name: _encode(value) for name, value in numbers.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for view in self._views:
            view.write(int(step), numbers)

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows a table in the views that can; metrics.jsonl holds numbers alone.

        Args:
            step: completed steps.
            name: of the table.
            columns: their names.
            rows: text or numbers, as many in each as there are columns.
        """
        for view in self._views:
            if isinstance(view, TableView):
                view.write_table(int(step), name, columns, rows)

    def close(self, failed: bool = False) -> None:
        """Closes the file and the views; `failed` marks the run as failed where a view can show it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        views, self._views = self._views, ()
        for view in views:
            view.close(failed)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def open_metrics(run: Run, recipe: Recipe, *, restored_step: int, total_steps: int) -> MetricsWriter:
    """The writer of a run, with the views its recipe asks for.

    An attempt that goes on from no checkpoint of the run starts anew: rows of earlier attempts are not its own, not
    even one at its first step.

    Args:
        run: the attempt, as `create_run` gave it.
        recipe: its recipe.
        restored_step: completed steps of the restored state; 0 from the beginning.
        total_steps: the steps at which training is complete, for the progress bar.
    """
    views = make_views(run, recipe, restored_step=restored_step, total_steps=total_steps) if run.is_main else ()
    return MetricsWriter(
        metrics_path(run.dir),
        attempt=run.attempt,
        restored_step=-1 if run.resume_step is None else restored_step,
        is_main=run.is_main,
        views=views,
        clock=time.time,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads every row, numbers that are not finite included.

    A last line that was cut off by a crash is left out.

    Raises:
        ValueError: a line before the last is no row.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = _decode(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and any(later.strip() for later in lines[number:]):
            raise ValueError(f"{path}:{number}: is no row of metrics; restore the line or remove it")
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Removes the rows past a step, and a cut-off last line; the file is replaced in one move or left as it is."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = read_metrics(path)
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) == len(rows) and (text.endswith("\n") or not text):
        return
    encoded = [{name: _encode(value) for name, value in row.items()} for row in kept]
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in encoded))


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decode(line: str) -> dict[str, Any] | None:
    """A line's row, or None if it is not a whole row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in ROW_FIELDS):
        return None
    return {name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
