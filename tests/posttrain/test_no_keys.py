"""A canary: keys stand in the environment, and no file of a run or of its report holds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).resolve().parents[2]
# Written in pieces, so that no scanner of keys takes this file for a leak. W&B takes keys of 40 letters alone.
KEYS = {
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",
    "HF_TOKEN": "hf_" + "CanaryOfTheHub" * 3,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "CanaryOfTheHub" * 3,
    "AWS_SECRET_ACCESS_KEY": "CanaryOfTheCloud" * 3,
}


def posttrain(*arguments, home):
    """Runs a verb in a process of its own with the keys in its environment; gives what it printed."""
    environment = {**os.environ, **KEYS, "HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_no_file_of_a_run_and_its_report_and_nothing_printed_holds_a_key(tmp_path):
    run = tmp_path / "run"
    printed = posttrain(
        "pretrain", "pretrain_tiny", "train.steps=2", "checkpoint.enabled=true", f"run.dir={run}",
        "logging.wandb=offline", "logging.tensorboard=true", home=tmp_path / "home",
    )  # fmt: skip
    printed += posttrain("report", run, home=tmp_path / "home")
    printed += posttrain("wandb-workspace", "p", "--out", tmp_path / "workspace.json", home=tmp_path / "home")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.relative_to(tmp_path).parts[1] for path in files if path.is_relative_to(run)}
    # The canary looks where keys could be: none of these may be missing.
    assert {"metrics.jsonl", "resolved.yaml", "provenance.json", "logs", "checkpoints", "report"} <= names
    assert any(path.suffix == ".wandb" for path in files) and (tmp_path / "workspace.json") in files
    for key in KEYS.values():
        assert key not in printed
        assert [path for path in files if key.encode() in path.read_bytes()] == []
