"""Small training runs for the tests of the loop, in this process or in one of their own."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoints import store
from pretrain.trainer import Result, run
from recipes.load import load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import checkpoint_dir, metrics_path

ROOT = Path(__file__).resolve().parents[2]
# All that makes resumption hard: shuffled and packed text, dropout, moments.
RECIPE = """
kind: pretrain
model:
  preset: tiny-llama
  overrides: {embed_dim: 32, mlp_dim: 64, num_heads: 2, num_kv_heads: 1, vocab_size: 264}
  dropout_rate: 0.1
tokenizer: {path: bytes}
data:
  kind: text
  sequence_length: 32
  num_workers_threads: 2
optimizer: {learning_rate: 1e-2}
schedule: {kind: constant, warmup_fraction: 0, steps: 100000}
train: {steps: 8, per_device_batch_size: 4, seed: 3}
logging: {console: none, peak_flops: 1e11}
"""


def write_corpus(folder: Path, *, num_documents: int = 400) -> Path:
    """A text file of different documents of 10 to 80 bytes, parted by blank lines."""
    rng = np.random.default_rng(7)
    words = ["ash", "birch", "cedar", "elm", "fir", "oak", "pine", "rowan", "yew"]
    documents = [f"{n} " + " ".join(rng.choice(words, rng.integers(2, 14))) for n in range(num_documents)]
    path = folder / "corpus.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def write_recipe(folder: Path) -> Path:
    """The recipe and its text, as files."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    write_corpus(folder)
    return path


def settings(folder: Path, name: str, overrides: tuple[str, ...]) -> list[str]:
    """The overrides of a run in `folder/name` on the corpus in `folder`."""
    return [f"data.path={folder / 'corpus.txt'}", f"run.dir={folder / name}", *overrides]


def train(folder: Path, name: str, *overrides: str) -> Result:
    """Runs the recipe in this process."""
    return run(load_recipe(str(folder / "recipe.yaml"), settings(folder, name, overrides)), ["test"])


# A run that is to be stopped at some step goes on while the one who stops it waits for a busy machine.
SLOWLY = """
import sys, time
from posttrain.cli import main
from pretrain.session import TrainingSession
step = TrainingSession.step
def slow_step(*arguments):
    time.sleep(0.3)
    return step(*arguments)
TrainingSession.step = slow_step
sys.exit(main(sys.argv[1:]))
"""


def start(
    folder: Path,
    name: str,
    *overrides: str,
    devices: int = 1,
    slowly: bool = False,
    env: Mapping[str, str] = MappingProxyType({}),
) -> "subprocess.Popen[str]":
    """Starts the recipe by the command line in a process of its own; `slowly`, each step takes 0.3 s longer."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    recipe = str(folder / "recipe.yaml")
    program = ["-c", SLOWLY] if slowly else ["-m", "posttrain"]
    return subprocess.Popen(
        [sys.executable, *program, "pretrain", recipe, *settings(folder, name, overrides)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_row(child: "subprocess.Popen[str]", run_dir: Path, *, step: int) -> None:
    """Waits until a run has written the row of a step; fails if it ends before that."""
    deadline = time.monotonic() + 400
    ended = False
    while time.monotonic() < deadline and not ended:
        # Asked before looking, so that the rows of a run that has just ended are seen.
        ended = child.poll() is not None
        if metrics_path(run_dir).is_file() and any(row["step"] >= step for row in read_metrics(metrics_path(run_dir))):
            return
        time.sleep(0.02)
    end(child)
    pytest.fail(f"no row of step {step}: {child.communicate()[1][-3000:]}")


def free_port() -> int:
    """A port that no other process takes meanwhile: outside the range from which the system gives out ports itself."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    draw = random.SystemRandom()
    while True:
        with socket.socket() as tried:
            port = draw.randrange(max(1024, lowest - 16384), lowest)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def end(*children: "subprocess.Popen[str]") -> None:
    """Kills processes that are still there, and waits for them."""
    for child in children:
        child.kill()
    for child in children:
        child.wait()


def rows(run_dir: Path, metric: str) -> dict[int, float]:
    """A metric by completed steps; a step that was written twice is a fault."""
    found = [(row["step"], row[metric]) for row in read_metrics(metrics_path(run_dir)) if metric in row]
    assert len(dict(found)) == len(found), found
    return dict(found)


def losses(run_dir: Path) -> dict[int, float]:
    """The training losses by completed steps, with all their digits."""
    return rows(run_dir, "learning/loss")


def saved(run_dir: Path, step: int) -> dict[Any, Any]:
    """A checkpoint's leaves on the host, by path."""
    return store.flatten(store.read_host(checkpoint_dir(run_dir, step) / "items", only=None))


def assert_same_bits(one: Any, other: Any) -> None:
    """Two trees have the same structure and the same bits."""
    left, right = (jax.tree_util.tree_flatten_with_path(tree) for tree in (one, other))
    assert left[1] == right[1]
    for (path, a), (_, b) in zip(left[0], right[0], strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
