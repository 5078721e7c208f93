"""kill -9 in the middle of a pipeline's stage: the same command goes on, and ends with the bits of a straight run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.metrics import read_metrics
from recipes.rundir import metrics_path, read_attempts
from tests.posttrain.test_pipeline import TINY
from tests.pretrain.runs import assert_same_bits, saved

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
GRPO = f"""\
  grpo:
    base: grpo_stories
    data: {{path: "{{stages.data}}/problems.jsonl", eval_path: null}}
    train: {{steps: {STEPS}}}
    rl: {{prompts_per_step: 2, num_generations: 4, max_completion_length: 8}}
"""


def start(folder: Path, name: str, *, slow: bool) -> subprocess.Popen:
    """The pipeline in a process of its own; `slow` makes each step of training last a second longer."""
    code = (
        "import sys, time\nfrom pretrain.session import TrainingSession\nfrom posttrain.cli import main\n"
        "step = TrainingSession.step\n"
        "def waiting(session, batch):\n    time.sleep(float(sys.argv[3]))\n    return step(session, batch)\n"
        "TrainingSession.step = waiting\n"
        "sys.exit(main(['pipeline', sys.argv[1], 'run.dir=' + sys.argv[2]]))\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", code, "p.yaml", name, "1.0" if slow else "0.0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child: subprocess.Popen) -> str:
    """What the process printed, once it ended well."""
    out, _ = child.communicate(timeout=550)
    assert child.returncode == 0, out[-3000:]
    return out


def kill_in(child: subprocess.Popen, run: Path, step: int) -> None:
    """Kills a process once a stage has logged so many steps."""
    deadline = time.monotonic() + 500
    try:
        while not (metrics_path(run).is_file() and any(row["step"] >= step for row in read_metrics(metrics_path(run)))):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_pipeline_killed_in_two_stages_ends_with_the_bits_of_a_straight_one(tmp_path):
    (tmp_path / "p.yaml").write_text(TINY.replace("  eval_sft:", GRPO + "  eval_sft:"))
    finish(start(tmp_path, "straight", slow=False))
    for stage, step in (("sft", 1), ("grpo", 2)):
        kill_in(start(tmp_path, "killed", slow=True), tmp_path / "killed" / stage, step)
        assert not (tmp_path / "killed" / stage / "stage.json").exists()
    out = finish(start(tmp_path, "killed", slow=False))
    assert out.count(": done already") == 3 and "  Q: " in out
    attempts = {name: len(read_attempts(tmp_path / "killed" / name)) for name in ("pretrain", "sft", "grpo", "export")}
    assert attempts == {"pretrain": 1, "sft": 2, "grpo": 2, "export": 1}
    for stage, steps in (("sft", 2), ("grpo", STEPS)):
        assert_same_bits(*(saved(tmp_path / run / stage, steps) for run in ("straight", "killed")))
