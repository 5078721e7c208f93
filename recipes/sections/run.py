"""The sections that say what a run leaves behind: checkpoint, run directory, logging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import AsTuple, OnlyWhen, Problem, Section, Unless

WHEN_ENABLED = OnlyWhen("enabled", True)


class CheckpointSection(Section):
    """When state is saved, and in which storage format."""

    enabled: bool = True
    """Save at all."""
    interval: Annotated[int, Field(ge=0), WHEN_ENABLED] = 0
    """Completed steps between saves; 0 saves on completion only."""
    on_completion: Annotated[bool, WHEN_ENABLED] = True
    """Save after the last step."""
    keep: Annotated[int | None, Field(ge=1), WHEN_ENABLED] = None
    """The newest so many checkpoints stay; null keeps all."""
    asynchronous: Annotated[bool, WHEN_ENABLED] = True
    """Write in the background while training goes on."""
    ocdbt: Annotated[bool, WHEN_ENABLED] = True
    """Merge all arrays into one key-value store; false writes a folder an array."""
    zarr3: Annotated[bool, WHEN_ENABLED] = True
    """Write zarr version 3; false writes version 2."""
    target_file_bytes: Annotated[int, Field(ge=1), WHEN_ENABLED, OnlyWhen("zarr3", True)] = 2 * 1024**3
    """The size a data file aims for, in bytes."""
    verify: Literal["full", "quick"] = "full"
    """What a restore checks: every file's hash, or sizes and names."""

    def problems(self) -> Iterator[Problem]:
        """Yields an enabled section that never saves."""
        if self.enabled and self.interval == 0 and not self.on_completion:
            yield Problem(
                "on_completion",
                False,
                "with checkpoint.interval=0 nothing would ever be saved",
                "set checkpoint.interval, checkpoint.on_completion=true, or checkpoint.enabled=false",
            )


class RunSection(Section):
    """Where the run's files lie, and whether an earlier attempt continues."""

    root: Annotated[str, OnlyWhen("dir", None)] = "runs"
    """The folder that holds run directories."""
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), OnlyWhen("dir", None)] = None
    """The start of the directory's name; null is the recipe's kind. A time stamp and a suffix keep it unique."""
    dir: str | None = None
    """The run directory itself; null makes a new one under root."""
    resume: Annotated[Literal["auto", "never", "must"], Unless("dir", None)] = "auto"
    """For a given dir: auto continues or starts, never refuses an existing run, must needs a checkpoint there."""

    def problems(self) -> Iterator[Problem]:
        """Yields folders that are no plain paths."""
        for name in ("root", "dir"):
            value = getattr(self, name)
            if value is not None and "://" in value:
                yield Problem(
                    name, value, "a run lies in a local or mounted folder", f"set run.{name} to a path without a scheme"
                )
            if value == "":
                yield Problem(name, "''", "a folder has a name", f"set run.{name} to a path")


class LoggingSection(Section):
    """What is shown of metrics.jsonl, which is always written."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; online without an API key falls back to offline and says so."""
    wandb_project: Annotated[str, Unless("wandb", "disabled")] = "posttrain"
    """The project in Weights & Biases."""
    wandb_entity: Annotated[str | None, Unless("wandb", "disabled")] = None
    """The account or team; null is the key's own."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""
    console: Literal["rich", "plain", "none"] = "rich"
    """rich draws a progress bar on a terminal and prints plain lines elsewhere."""
    interval: Annotated[int, Field(ge=1)] = 1
    """Completed steps between rows of training metrics."""
    profile_steps: Annotated[tuple[int, int] | None, AsTuple] = None
    """The first and the last completed step of a profiler trace, such as [5, 7]; null traces none."""
    peak_flops: Annotated[float | None, Field(gt=0.0)] = None
    """Floating-point operations a second of one device, for perf/mfu; null measures once and remembers."""

    def problems(self) -> Iterator[Problem]:
        """Yields a profile that ends before it begins."""
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            yield Problem(
                "profile_steps",
                list(self.profile_steps),
                "a trace runs from a first to a last completed step, counted from 1",
                "write [first, last] with 1 <= first <= last",
            )


class RLLoggingSection(LoggingSection):
    """As LoggingSection, and what is shown of completions; `completions/` in the run always holds all of them."""

    completions_interval: Annotated[int, Field(ge=0), Unless("wandb", "disabled")] = 10
    """Completed steps between tables of completions in Weights & Biases; 0 shows none."""
    completions_shown: Annotated[int, Field(ge=1), Unless("wandb", "disabled")] = 32
    """Completions in such a table, at most: the first of the step."""
