"""Runs command lines for the conformance tests in one process with 8 devices, each only once and when asked for."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from pretrain.data.prepare import prepare_tfds
from recipes.metrics import read_metrics
from recipes.rundir import metrics_path
from tests.conformance import observe
from tests.conformance.observe import Observed

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).parent / "recipes"
SHARED_TEXT = ROOT.parent / "shared" / "data" / "text"
DATASET = "c4/en:3.1.0"
CALL_SECONDS = 540
"""After that long a call has hung; below pytest's own limit, so that the error names the call."""
QUIET = ("logging.console=none", "logging.peak_flops=1e11")

Result = TypeVar("Result")


@dataclass
class Outcome:
    """A finished command line: its folder, what it wrote and what was seen of it."""

    dir: Path
    seen: Observed
    rows: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl as the command left it."""

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows of training steps."""
        return [row for row in self.rows if "learning/loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations."""
        return [row for row in self.rows if "evaluation/loss" in row]

    def column(self, name: str) -> np.ndarray:
        """A metric over the training steps, float64; exact, since JSON keeps every digit of a float."""
        return np.array([row[name] for row in self.training])

    @property
    def losses(self) -> np.ndarray:
        """The training loss of each step, nats a token."""
        return self.column("learning/loss")


class Lab:
    """One child process for all cells, so that imports, data and compiled programs are shared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[Any, ...], Outcome | str] = {}
        self._data: Path | None = None
        self._errors = folder / "stderr.txt"
        self._open()

    def _open(self) -> None:
        # A spawned process starts without JAX, so it may still choose its devices.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=observe.start, initargs=(self._errors,))
        self._process_id = self._pool.submit(os.getpid)

    def close(self) -> None:
        """Ends the child."""
        self._pool.shutdown(cancel_futures=True)

    def call(self, fn: Callable[..., Result], *args: Any) -> Result:
        """Calls a function of `observe` in the child; an error there fails the test here, with its traceback.

        A child that dies or hangs fails the cell that it worked for, and the next cell gets a new one.
        """
        try:
            result, error = self._pool.submit(observe.call, fn, args).result(timeout=CALL_SECONDS)
        except (BrokenProcessPool, TimeoutError) as end:
            if isinstance(end, TimeoutError):
                os.kill(self._process_id.result(), signal.SIGKILL)
            self._open()
            written = self._errors.read_text(encoding="utf-8", errors="replace")
            pytest.fail(f"{fn.__name__}{args}: {end!r}; the end of the process's stderr:\n{written[-6000:]}")
        if error is not None:
            pytest.fail(f"{fn.__name__}{args}:\n{error}", pytrace=False)
        return result

    def run(self, framework: str, *overrides: str, recipe: str = "text", onto: Path | None = None) -> Outcome:
        """Runs `posttrain pretrain` through its entry point in the child, watched.

        Args:
            framework: model.framework.
            overrides: settings after the ones every test shares.
            recipe: "text" of this folder, or the name of a shipped recipe.
            onto: the folder of an earlier attempt to resume.
        """
        outcome = self._once(self._watched, framework, overrides, recipe, onto)
        assert outcome.seen.frameworks == {framework}
        return outcome

    def run_apart(self, framework: str, *overrides: str, onto: Path) -> Outcome:
        """Resumes a run as users do, with `python -m posttrain` in a process of its own; nothing is watched."""
        return self._once(_apart, framework, overrides, "text", onto)

    def _once(
        self,
        start: Callable[[list[str]], Observed],
        framework: str,
        overrides: tuple[str, ...],
        recipe: str,
        onto: Path | None,
    ) -> Outcome:
        """Runs a command line, or gives its outcome if it ran before."""
        key = (start.__name__, framework, overrides, recipe, onto)
        if key not in self._known:
            self._known[key] = f"this command line failed before, in the test that was first to ask for it: {key}"
            run_dir = onto or self.folder / f"{framework}-{len(self._known):03d}"
            seen = start(self.arguments(framework, overrides, recipe, run_dir, resumes=onto is not None))
            assert seen.code == 0, f"posttrain pretrain ended with code {seen.code}:\n{seen.log[-4000:]}"
            self._known[key] = Outcome(run_dir, seen, read_metrics(metrics_path(run_dir)))
        outcome = self._known[key]
        if isinstance(outcome, str):
            pytest.fail(outcome, pytrace=False)
        return outcome

    def _watched(self, arguments: list[str]) -> Observed:
        return self.call(observe.run, arguments)

    def arguments(
        self, framework: str, overrides: tuple[str, ...], recipe: str, run_dir: Path, *, resumes: bool
    ) -> list[str]:
        """The command line after the program's name."""
        ours = recipe == "text"
        arguments = ["pretrain", str(RECIPES / "text.yaml") if ours else recipe, f"model.framework={framework}"]
        if ours:
            arguments.append(f"data.path={self.data}")
        resume = "must" if resumes else "never"
        return [*arguments, *QUIET, f"run.dir={run_dir}", f"run.resume={resume}", *overrides]

    @property
    def data(self) -> Path:
        """The TFDS folder of text, made at first use."""
        if self._data is None:
            source = SHARED_TEXT if SHARED_TEXT.is_dir() else write_stand_in(self.folder / "stand-in.txt")
            self._data = self.folder / "data"
            prepare_tfds(
                source,
                self._data,
                name=DATASET,
                fractions={"train": 0.98, "validation": 0.02},
                num_shards=2,
                text_column="text",
                shuffle_seed=0,
            )
        return self._data


def _apart(arguments: list[str]) -> Observed:
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": observe.device_flags()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CALL_SECONDS,
    )
    return Observed(code=done.returncode, log=done.stdout)


def write_stand_in(path: Path) -> Path:
    """Writes 4000 documents of 3 to 60 words from a small vocabulary, where the shared text is missing."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijklmnop"), draw.integers(2, 8))) for _ in range(200)]
    frequencies = 1.0 / np.arange(1, 201)
    documents = (
        " ".join(draw.choice(words, draw.integers(3, 61), p=frequencies / frequencies.sum())) for _ in range(4000)
    )
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path
