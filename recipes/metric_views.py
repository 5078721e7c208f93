"""Views of the metrics: a progress bar or plain lines, TensorBoard, Weights & Biases.

Each view imports what it shows with when it is made, so a run without it needs neither the package nor its time.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from recipes.provenance import redact_values
from recipes.rundir import Run, tensorboard_dir, wandb_dir, wandb_id_path, write_atomically
from recipes.schema import LoggingSection, Recipe, effective_values

# What a line of the console shows of a row, in this order; a row with none of these is shown whole.
HEADLINES = {
    "learning/loss": "loss",
    "evaluation/loss": "eval loss",
    "evaluation/greedy": "solved",
    "rewards/total/mean": "reward",
    "dpo/accuracy": "accuracy",
    "perf/tokens_per_second": "tokens/s",
}
WANDB_INIT_SECONDS = 30.0
WANDB_FINISH_SECONDS = 120.0
WANDB_OFFLINE_SECONDS = 120.0
"""For what waits for this machine alone, which may be busy: W&B's own process, and a start offline."""


class View(Protocol):
    """Something that shows rows."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows one row; `step` counts completed steps."""

    def close(self, failed: bool) -> None:
        """Shows the end of the run."""


def make_views(run: Run, recipe: Recipe, *, restored_step: int, total_steps: int) -> list[View]:
    """The views that the recipe's logging section asks for."""
    logging = recipe.logging
    views: list[View] = []
    if logging.tensorboard:
        views.append(TensorBoardView(tensorboard_dir(run.dir), restored_step=restored_step))
    if logging.wandb != "disabled":
        views.append(WandbView(run, recipe, out=sys.stdout))
    if logging.console == "rich" and sys.stdout.isatty():
        views.append(ProgressView(restored_step=restored_step, total_steps=total_steps))
    elif logging.console != "none":
        views.append(PlainView(total_steps=total_steps, out=sys.stdout))
    return views


@runtime_checkable
class TableView(View, Protocol):
    """Something that shows tables too."""

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Shows one table; `step` counts completed steps."""


class PlainView:
    """Prints one line a row: for files, pipes and batch jobs."""

    def __init__(self, *, total_steps: int, out: IO[str]) -> None:
        self._total_steps = total_steps
        self._out = out

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the row's headline."""
        print(f"step {step}/{self._total_steps}  {headline(metrics)}", file=self._out, flush=True)

    def close(self, failed: bool) -> None:
        """Has nothing to close."""


class ProgressView:
    """Draws a progress bar with the last row's headline and the time left; evaluation rows are printed above it."""

    def __init__(self, *, restored_step: int, total_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[headline]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=restored_step, headline="")
        self._progress.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar to the row's step."""
        if any(name.startswith("evaluation/") for name in metrics):
            self._progress.console.print(f"step {step}  {headline(metrics)}", highlight=False, markup=False)
            self._progress.update(self._task, completed=step)
        else:
            self._progress.update(self._task, completed=step, headline=headline(metrics))

    def close(self, failed: bool) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()


class TensorBoardView:
    """Writes TensorBoard events; those past the restored step are hidden when a run resumes."""

    def __init__(self, folder: Path, *, restored_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(folder), purge_step=restored_step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, failed: bool) -> None:
        """Writes what is left."""
        self._writer.close()


class WandbView:
    """Logs to Weights & Biases. It never prompts, and both its start and its end are bounded in time.

    Online without credentials, or where the service does not answer, it goes on offline and says so in one line.
    The run id is kept in the run directory, so a resumed run continues the same page. `step` is an axis of its own:
    rows may come out of order, which W&B's internal step forbids.
    """

    def __init__(self, run: Run, recipe: Recipe, *, out: IO[str]) -> None:
        import wandb

        settings = recipe.logging
        mode = settings.wandb
        if mode == "online" and not has_wandb_credentials(os.environ):
            print("logging.wandb=online: no W&B API key is set (WANDB_API_KEY or netrc); logging offline", file=out)
            mode = "offline"
        run_id = wandb_run_id(run.dir)
        try:
            self._wandb_run = _start_wandb(wandb, mode, run, recipe, settings, run_id)
        except (wandb.errors.Error, TimeoutError) as error:
            if mode != "online":
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(f"logging.wandb=online: W&B did not start ({reason}); logging offline", file=out)
            # W&B's background process still holds the run id for the attempt that failed.
            wandb.teardown(exit_code=0)
            self._wandb_run = _start_wandb(wandb, "offline", run, recipe, settings, run_id)
        self._wandb_run.define_metric("step")
        self._wandb_run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one row on the `step` axis."""
        self._wandb_run.log({"step": step, **metrics})

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs one table on the `step` axis."""
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._wandb_run.log({"step": step, name: table})

    def close(self, failed: bool) -> None:
        """Ends the W&B run."""
        self._wandb_run.finish(exit_code=1 if failed else 0)


def wandb_run_id(run_dir: Path) -> str:
    """The W&B run id of a run directory, made on first use and kept there."""
    path = wandb_id_path(run_dir)
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(6)
    write_atomically(path, run_id + "\n")
    return run_id


def has_wandb_credentials(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find credentials without asking: an environment variable, or netrc."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import netrc

    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    path = Path(environment.get("NETRC") or Path.home() / ".netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def headline(metrics: Mapping[str, float]) -> str:
    """The few numbers of a row that a console line shows."""
    shown = [(label, metrics[name]) for name, label in HEADLINES.items() if name in metrics]
    return "  ".join(f"{label} {_number(value)}" for label, value in shown or metrics.items())


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def _start_wandb(wandb: Any, mode: str, run: Run, recipe: Recipe, settings: LoggingSection, run_id: str) -> Any:
    wandb_dir(run.dir).mkdir(parents=True, exist_ok=True)
    return wandb.init(
        project=settings.wandb_project,
        entity=settings.wandb_entity,
        mode=mode,
        dir=str(wandb_dir(run.dir)),
        id=run_id,
        name=run.dir.name,
        resume="allow",
        config=redact_values(effective_values(recipe)),
        # The command line and the environment may hold secrets, and provenance.json has what matters of them.
        settings=wandb.Settings(
            init_timeout=WANDB_INIT_SECONDS if mode == "online" else WANDB_OFFLINE_SECONDS,
            x_service_wait=WANDB_OFFLINE_SECONDS,
            login_timeout=1.0,
            finish_timeout=WANDB_FINISH_SECONDS,
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
        ),
    )
