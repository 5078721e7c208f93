"""Views of the metrics: what they print, where they write, and that W&B neither asks nor hangs."""

import io
import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes import metric_views
from recipes.load import load_recipe
from recipes.metric_views import (
    PlainView,
    ProgressView,
    TensorBoardView,
    WandbView,
    has_wandb_credentials,
    headline,
    make_views,
    wandb_run_id,
)
from recipes.rundir import Run, wandb_id_path

ROOT = Path(__file__).resolve().parents[2]


def recipe(*overrides):
    """The tiny recipe with overrides."""
    return load_recipe("pretrain_tiny", overrides).recipe


def run_in(folder):
    """An attempt in a folder, without lock."""
    return Run(Path(folder), 1, None, True, "")


def test_headline_shows_known_metrics_in_order_and_others_only_alone():
    metrics = {"perf/tokens_per_second": 12345.6, "learning/grad_norm": 2.0, "learning/loss": 5.12345}
    assert headline(metrics) == "loss 5.123  tokens/s 12,346"
    assert headline({"learning/grad_norm": 2.0, "x": math.nan}) == "learning/grad_norm 2  x nan"
    assert headline({"learning/loss": math.inf}) == "loss inf"


def test_plain_view_prints_one_line_a_row():
    out = io.StringIO()
    view = PlainView(total_steps=10, out=out)
    view.write(1, {"learning/loss": 2.0})
    view.write(2, {"evaluation/loss": 3.0})
    view.close(False)
    assert out.getvalue() == "step 1/10  loss 2\nstep 2/10  eval loss 3\n"


@pytest.mark.parametrize(
    ("overrides", "terminal", "kinds"),
    [
        ([], True, [ProgressView]),
        ([], False, [PlainView]),
        (["logging.console=plain"], True, [PlainView]),
        (["logging.console=none"], True, []),
        (["logging.console=none", "logging.tensorboard=true"], True, [TensorBoardView]),
    ],
)
def test_views_are_those_the_recipe_and_the_terminal_ask_for(tmp_path, monkeypatch, overrides, terminal, kinds):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    views = make_views(run_in(tmp_path), recipe(*overrides), restored_step=0, total_steps=10)
    for view in views:
        view.close(False)
    assert [type(view) for view in views] == kinds


def test_progress_bar_starts_at_the_restored_step_and_shows_the_last_row(monkeypatch):
    view = ProgressView(restored_step=4, total_steps=10)
    try:
        task = view._progress.tasks[0]
        assert (task.completed, task.total) == (4, 10)
        view.write(5, {"learning/loss": 2.5, "perf/tokens_per_second": 2000.0})
        assert (task.completed, task.fields["headline"]) == (5, "loss 2.5  tokens/s 2,000")
        view.write(6, {"evaluation/loss": 1.0})
        assert (task.completed, task.fields["headline"]) == (6, "loss 2.5  tokens/s 2,000")
    finally:
        view.close(False)


def test_tensorboard_events_hold_the_rows(tmp_path):
    view = TensorBoardView(tmp_path, restored_step=0)
    view.write(3, {"learning/loss": 1.5})
    view.close(False)
    (path,) = tmp_path.iterdir()
    events = path.read_bytes()
    # The value is a little-endian float32 after its tag, field 2 of the summary's value message.
    assert b"learning/loss" in events and struct.pack("<f", 1.5) in events


def test_views_import_nothing_before_they_are_made():
    code = (
        "import sys; import recipes.metrics; "
        "print([m for m in ('wandb', 'tensorboardX', 'rich', 'jax', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_wandb_run_id_is_made_once_and_kept(tmp_path):
    first = wandb_run_id(tmp_path)
    assert wandb_run_id(tmp_path) == first == wandb_id_path(tmp_path).read_text().strip()
    assert wandb_run_id(tmp_path / "other") != first


def test_wandb_credentials_are_found_where_wandb_looks(tmp_path):
    netrc = tmp_path / "netrc"
    nowhere = {"NETRC": str(netrc)}
    assert not has_wandb_credentials(nowhere)
    assert has_wandb_credentials(nowhere | {"WANDB_API_KEY": "x"})
    assert not has_wandb_credentials(nowhere | {"WANDB_API_KEY": ""})
    netrc.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    netrc.chmod(0o600)
    assert has_wandb_credentials(nowhere)
    assert not has_wandb_credentials(nowhere | {"WANDB_BASE_URL": "https://wandb.example.org"})
    netrc.write_text("nonsense {")
    assert not has_wandb_credentials(nowhere)


class FakeWandb:
    """Stands in for the wandb module: records the calls, and fails to start as told."""

    class errors:
        """The module's errors."""

        class Error(Exception):
            """The base of all of W&B's errors."""

    def __init__(self, online_error=None):
        self.online_error = online_error
        self.calls = []
        self.settings = {}

    def Settings(self, **settings):
        """Keeps the settings."""
        self.settings = settings
        return settings

    def init(self, **arguments):
        """Starts, or fails."""
        self.calls.append(("init", arguments["mode"], arguments))
        if arguments["mode"] == "online" and self.online_error:
            raise self.online_error
        return self

    def __getattr__(self, name):
        return lambda *arguments, **named: self.calls.append((name, arguments, named))


@pytest.fixture
def fake(monkeypatch):
    """Puts a FakeWandb in wandb's place."""

    def put(**arguments):
        module = FakeWandb(**arguments)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return put


def test_wandb_rows_have_their_own_step_axis_and_may_come_out_of_order(tmp_path, fake):
    module = fake()
    view = WandbView(run_in(tmp_path), recipe("logging.wandb=offline"), out=io.StringIO())
    view.write(5, {"x": 1.0})
    view.write(3, {"y": 2.0})
    view.close(True)
    assert [call[0] for call in module.calls] == ["init", "define_metric", "define_metric", "log", "log", "finish"]
    assert module.calls[2] == ("define_metric", ("*",), {"step_metric": "step"})
    assert module.calls[4] == ("log", ({"step": 3, "y": 2.0},), {})
    assert module.calls[5] == ("finish", (), {"exit_code": 1})


def test_wandb_gets_bounded_times_no_command_line_and_the_runs_id(tmp_path, fake):
    module = fake()
    overrides = ["logging.wandb=offline", "logging.wandb_project=mine", f"model.load_parameters_path=hf_{'a1' * 12}"]
    WandbView(run_in(tmp_path), recipe(*overrides), out=io.StringIO())
    arguments = module.calls[0][2]
    assert arguments["project"] == "mine" and arguments["id"] == wandb_run_id(tmp_path)
    assert arguments["resume"] == "allow" and Path(arguments["dir"]).is_relative_to(tmp_path)
    assert arguments["config"]["model"]["load_parameters_path"] == "<redacted>"
    assert arguments["config"]["train"]["steps"] == 20
    assert 0 < module.settings["init_timeout"] <= 120 and 0 < module.settings["finish_timeout"] <= 300
    assert module.settings["x_disable_meta"] and module.settings["console"] == "off"


def test_wandb_online_without_a_key_goes_offline_with_one_line(tmp_path, fake, monkeypatch):
    module = fake()
    monkeypatch.setattr(os, "environ", {"NETRC": str(tmp_path / "none")})
    out = io.StringIO()
    WandbView(run_in(tmp_path), recipe("logging.wandb=online"), out=out)
    assert [call[1] for call in module.calls if call[0] == "init"] == ["offline"]
    assert out.getvalue().count("\n") == 1 and "no W&B API key" in out.getvalue()


@pytest.mark.parametrize("error", [FakeWandb.errors.Error("no route\nto host"), TimeoutError()])
def test_wandb_that_does_not_start_online_goes_offline_with_one_line(tmp_path, fake, monkeypatch, error):
    module = fake(online_error=error)
    monkeypatch.setattr(os, "environ", {"WANDB_API_KEY": "x"})
    out = io.StringIO()
    WandbView(run_in(tmp_path), recipe("logging.wandb=online"), out=out)
    assert [call[0] for call in module.calls][:3] == ["init", "teardown", "init"]
    assert [call[1] for call in module.calls if call[0] == "init"] == ["online", "offline"]
    assert out.getvalue().count("\n") == 1 and "logging offline" in out.getvalue()


def test_wandb_online_with_a_key_stays_online(tmp_path, fake, monkeypatch):
    module = fake()
    monkeypatch.setattr(os, "environ", {"WANDB_API_KEY": "x"})
    out = io.StringIO()
    WandbView(run_in(tmp_path), recipe("logging.wandb=online"), out=out)
    assert [call[1] for call in module.calls if call[0] == "init"] == ["online"] and not out.getvalue()


REAL_WANDB = """
import sys
from pathlib import Path
import recipes.metric_views as views
from recipes.load import load_recipe
from recipes.rundir import Run
mode, folder, views.WANDB_INIT_SECONDS = sys.argv[1], Path(sys.argv[2]), 3.0
recipe = load_recipe("pretrain_tiny", ["logging.wandb=" + mode]).recipe
view = views.WandbView(Run(folder, 1, None, True, ""), recipe, out=sys.stdout)
view.write(5, {"learning/loss": 1.0})
view.write(3, {"evaluation/loss": float("nan")})
view.write_table(3, "completions", ("prompt", "reward"), [("1 + 1 =", 0.5), ("2 + 2 =", 1.0)])
view.close(False)
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_real_wandb_writes_its_rows_offline_even_when_the_service_is_unreachable(tmp_path, mode):
    """The real package: port 9 answers nobody, and the environment says disabled, which the recipe overrules."""
    environment = dict(os.environ) | {
        "WANDB_MODE": "disabled",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", REAL_WANDB, mode, str(tmp_path / "run"), "--api-key", "hidden-on-command-line"]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == (1 if mode == "online" else 0)
    (log,) = (tmp_path / "run").glob("logs/wandb/offline-run-*/run-*.wandb")
    data = log.read_bytes()
    assert data.count(b"learning/loss") and data.count(b"evaluation/loss")
    (table,) = (tmp_path / "run").glob("logs/wandb/offline-run-*/files/media/table/completions_*.table.json")
    assert json.loads(table.read_text())["data"] == [["1 + 1 =", 0.5], ["2 + 2 =", 1.0]]
    assert wandb_run_id(tmp_path / "run").encode() in data
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"hidden-on-command-line" not in everything
    assert time.monotonic() - began < 300


def test_wandb_times_are_bounded():
    assert 0 < metric_views.WANDB_INIT_SECONDS <= 60 and 0 < metric_views.WANDB_OFFLINE_SECONDS <= 120
    assert 0 < metric_views.WANDB_FINISH_SECONDS <= 300
