"""`posttrain wandb-workspace`: the layout as JSON offline, and what wandb-workspaces is given online."""

import json
import re
import sys
import types

import pytest

from posttrain import cli
from posttrain.report_panels import PANELS, labels
from posttrain.verbs import wandb_workspace
from posttrain.verbs.wandb_workspace import save_workspace, specification

KEY = "f" * 40


def test_offline_the_layout_is_written_with_every_section_and_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert cli.main(["wandb-workspace", "maths"]) == 0
    said = capsys.readouterr()
    assert "WANDB_MODE=offline" in said.err and "maths-workspace.json: 9 sections" in said.out
    text = (tmp_path / "maths-workspace.json").read_text()
    assert KEY not in text
    spec = json.loads(text)
    assert (spec["project"], spec["entity"], spec["x"]) == ("maths", None, "step")
    names = [section["name"] for section in spec["sections"]]
    assert {"learning", "policy", "rewards", "completions", "sampler", "evaluation", "perf"} <= set(names)
    # Every panel lies on the runs' own axis, and names metrics one way or the other.
    for section in spec["sections"]:
        for panel in section["panels"]:
            assert panel["x"] == "step" and bool(panel["metrics"]) != bool(panel["regex"]), panel


def test_out_writes_where_it_says_and_asks_nothing_of_wandb(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_workspace, "save_workspace", lambda spec: pytest.fail("W&B was asked"))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    out = tmp_path / "spec.json"
    assert cli.main(["wandb-workspace", "maths", "--entity", "me", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["entity"] == "me" and not capsys.readouterr().err
    assert cli.main(["wandb-workspace", "maths", "--out", str(tmp_path / "absent" / "spec.json")]) == 2


@pytest.mark.parametrize("project", ["", "../../x", "me/maths"])
def test_a_name_that_no_project_has_writes_nothing(tmp_path, monkeypatch, capsys, project):
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "there")
    assert cli.main(["wandb-workspace", project]) == 2
    assert f"PROJECT: {project!r}: a project of W&B has a name" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("missing", ["package", "key"])
def test_without_the_package_or_a_key_the_layout_is_written(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "" if missing == "key" else KEY)
    monkeypatch.setattr(wandb_workspace, "find_spec", lambda name: None if missing == "package" else object())
    assert cli.main(["wandb-workspace", "maths"]) == 0
    reason = {"package": "wandb-workspaces is not installed", "key": "no W&B API key is set"}[missing]
    assert reason in capsys.readouterr().err
    assert (tmp_path / "maths-workspace.json").is_file()


NAMES = [
    "rewards/total/mean", "rewards/total/std", "rewards/tot/mean", "rewards/exact/mean", "rewards/exact/failures",
    "rewards/dropped", "groups/resampled", "perf/step_seconds", "perf/sync_seconds", "perf/rollout_seconds",
    "perf/old_policy_seconds", "perf/st_seconds", "evaluation/greedy", "evaluation/greedy_low", "evaluation/avg@4",
    "evaluation/avg@4_high", "evaluation/pass@16",
    "policy/clip_fraction", "policy/clip_fraction_low", "distill/soft_loss", "distill/margin",
]  # fmt: skip


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_a_regular_expression_matches_what_the_reports_panel_selects(panel):
    # RE2 knows no lookaround.
    assert "(?=" not in panel.regex() and "(?!" not in panel.regex()
    assert {name for name in NAMES if re.search(panel.regex(), name)} == set(panel.select(NAMES))


def test_labels_name_the_group_only_where_it_tells_metrics_apart():
    assert labels(["learning/loss", "evaluation/loss"]) == ["training loss", "held-out loss"]
    assert labels(["perf/sync_seconds", "perf/old_policy_seconds"]) == ["sync", "old policy"]
    assert labels(["rewards/exact/mean", "rewards/format/mean"]) == ["exact", "format"]
    assert labels(["rewards/exact/failures", "rewards/dropped"]) == ["exact failed", "dropped"]


class Recorded:
    """Stands for a class of wandb-workspaces: keeps its arguments, and the view has an address once saved."""

    def __init__(self, **arguments):
        self.__dict__.update(arguments)

    def save(self):
        """Gives the view an address."""
        self.url = f"https://wandb.example/{self.entity}/{self.project}"
        saved.append(self)
        return self


saved: list[Recorded] = []


@pytest.fixture
def fake(monkeypatch):
    """wandb and wandb-workspaces without a service; gives the fake wandb."""
    saved.clear()
    wandb = types.ModuleType("wandb")
    wandb.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    wandb.Api = lambda timeout: types.SimpleNamespace(default_entity="mine")
    modules = {"wandb": wandb}
    for name in ("wandb_workspaces", "wandb_workspaces.reports", "wandb_workspaces.reports.v2"):
        modules[name] = types.ModuleType(name)
    modules["wandb_workspaces.workspaces"] = types.ModuleType("wandb_workspaces.workspaces")
    modules["wandb_workspaces.reports.v2"].LinePlot = Recorded
    for name in ("Workspace", "Section", "WorkspaceSettings"):
        setattr(modules["wandb_workspaces.workspaces"], name, Recorded)
    modules["wandb_workspaces"].reports = modules["wandb_workspaces.reports"]
    modules["wandb_workspaces"].workspaces = modules["wandb_workspaces.workspaces"]
    modules["wandb_workspaces.reports"].v2 = modules["wandb_workspaces.reports.v2"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return wandb


def test_online_the_view_has_the_layouts_panels(fake):
    assert save_workspace(specification("maths", None)) == "https://wandb.example/mine/maths"
    (view,) = saved
    assert view.settings.x_axis == "step"
    plots = {plot.title: plot for section in view.sections for plot in section.panels}
    assert len(plots) == len(PANELS)
    assert plots["Loss"].y == ["learning/loss", "evaluation/loss"] and plots["Loss"].metric_regex is None
    assert plots["Where a step's time goes"].plot_type == "stacked-area"
    assert plots["Where a step's time goes"].y == [] and plots["Where a step's time goes"].metric_regex


def test_what_wandb_refuses_is_told_in_one_line(fake):
    def refuse(timeout):
        raise fake.errors.Error("no such project\nand a long story")

    fake.Api = refuse
    with pytest.raises(ValueError, match=r"maths: W&B did not take it \(no such project\); correct"):
        save_workspace(specification("maths", None))
    fake.Api = lambda timeout: types.SimpleNamespace(default_entity=None)
    with pytest.raises(ValueError, match="add --entity NAME"):
        save_workspace(specification("maths", None))
