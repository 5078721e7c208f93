"""The verb that lays out a project's dashboard in Weights & Biases, with the panels that the report has.

Where W&B cannot be reached, the layout is written as JSON: the same sections, for whoever can.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "posttrain"
"""Of the view; saving it again makes another view of this name and changes none."""
STEP_METRIC = "step"
"""The axis that every run logs beside its metrics: rows come out of order, which W&B's own step forbids."""
NOT_IN_PROJECTS = ("/", "\\", "#", "?", "%", ":")
"""What W&B refuses in a project's name."""


def register(app: typer.Typer) -> None:
    """Adds `wandb-workspace`."""
    app.command(name="wandb-workspace")(wandb_workspace)


def wandb_workspace(
    project: Annotated[str, typer.Argument(metavar="PROJECT", help="As logging.wandb_project.", show_default=False)],
    entity: Annotated[
        str | None, typer.Option("--entity", metavar="E", help="A user or a team. [yours]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write JSON, and ask nothing of W&B.")
    ] = None,
) -> None:
    """Lay out a W&B project's dashboard.

    A view with a section each for evaluation, rewards, learning, policy, completions, sampler and speed. It takes the
    package wandb-workspaces and a key; without them, PROJECT-workspace.json is written instead.
    """
    if not project or any(mark in project for mark in NOT_IN_PROJECTS):
        raise ValueError(
            f"PROJECT: {project!r}: a project of W&B has a name, without any of {' '.join(NOT_IN_PROJECTS)}; give the "
            "name alone, and the user or team as --entity"
        )
    spec = specification(project, entity)
    reason = _why_offline() if out is None else ""
    if out is not None or reason:
        path = out.expanduser() if out is not None else Path(f"{project}-workspace.json")
        _write(path, spec)
        if reason:
            print(f"posttrain wandb-workspace: {reason}; the layout is written, not shown", file=sys.stderr)
        print(f"{path}: {len(spec['sections'])} sections, {sum(len(one['panels']) for one in spec['sections'])} panels")
        return
    print(save_workspace(spec))


def specification(project: str, entity: str | None) -> dict[str, Any]:
    """The layout as plain values: sections of line plots over the runs' own step axis.

    A panel names its metrics in `metrics`, or in `regex` where their names depend on the recipe.
    """
    from posttrain.report_panels import PANELS, SECTIONS

    sections = []
    for section, title in SECTIONS.items():
        panels: list[dict[str, Any]] = []
        for panel in PANELS:
            if panel.section != section:
                continue
            open_ended = any("*" in pattern for pattern in panel.metrics)
            panels.append(
                {
                    "title": panel.title,
                    "x": STEP_METRIC,
                    "metrics": [] if open_ended else [*panel.metrics, *(panel.band or ())],
                    "regex": panel.regex() if open_ended else None,
                    "log_y": panel.log,
                    "stacked": panel.stacked,
                    "unit": panel.unit,
                }
            )
        sections.append({"name": section, "title": title, "panels": panels})
    return {"format": 1, "entity": entity, "project": project, "name": NAME, "x": STEP_METRIC, "sections": sections}


def save_workspace(spec: dict[str, Any]) -> str:
    """Saves the layout as a view of the project, and gives its address.

    Raises:
        ValueError: W&B knows no entity for the key, or refuses.
    """
    import wandb
    import wandb_workspaces.reports.v2 as blocks
    import wandb_workspaces.workspaces as workspaces

    try:
        entity = spec["entity"] or wandb.Api(timeout=20).default_entity
        if not entity:
            raise ValueError("posttrain wandb-workspace: W&B names no entity for this key; add --entity NAME")
        view = workspaces.Workspace(
            entity=entity,
            project=spec["project"],
            name=spec["name"],
            sections=[
                workspaces.Section(
                    name=section["title"], is_open=True, panels=[_plot(blocks, panel) for panel in section["panels"]]
                )
                for section in spec["sections"]
            ],
            settings=workspaces.WorkspaceSettings(x_axis=spec["x"]),
        )
        return str(view.save().url)
    except (wandb.errors.Error, OSError) as error:
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"posttrain wandb-workspace {spec['project']}: W&B did not take it ({said[0]}); correct PROJECT, --entity "
            "or the key, or write the layout with --out FILE"
        ) from None


def _plot(blocks: Any, panel: dict[str, Any]) -> Any:
    return blocks.LinePlot(
        title=panel["title"],
        x=panel["x"],
        y=panel["metrics"],
        metric_regex=panel["regex"],
        log_y=panel["log_y"] or None,
        title_y=panel["unit"] or None,
        plot_type="stacked-area" if panel["stacked"] else "line",
    )


def _why_offline() -> str:
    """Why W&B cannot be asked; empty if it can."""
    from recipes.metric_views import has_wandb_credentials

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if find_spec("wandb_workspaces") is None:
        return "wandb-workspaces is not installed (pip install wandb-workspaces)"
    if not has_wandb_credentials(os.environ):
        return "no W&B API key is set (WANDB_API_KEY or netrc)"
    return ""


def _write(path: Path, spec: dict[str, Any]) -> None:
    from recipes.rundir import write_atomically

    try:
        write_atomically(path, json.dumps(spec, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); name another file with --out") from None
