"""Turns between processes: a contestant takes steps when it is told to, and computes nothing in between.

The bench holds a `TurnProcess` for each contestant. In its process, `Orders` waits for a number of steps on each line
of the input, and prints one JSON line per step. Workers run in environments of their own: this file imports nothing
beyond Python's library.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Orders:
    """The worker's side. What libraries print goes to stderr, so that stdout holds the lines of steps alone."""

    def __init__(self) -> None:
        self._out, sys.stdout = sys.stdout, sys.stderr
        self._left = 0
        self._start: tuple[float, float] | None = None

    def next_step(self) -> bool:
        """Blocks until a step may begin, which begins now; False once no order will come."""
        if self._left == 0:
            line = sys.stdin.readline()
            self._left = int(line or 0)
        self._start = time.perf_counter(), time.process_time()
        return self._left > 0

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and is not reported."""
        return self._start is not None

    def end_step(self, report: Mapping[str, Any]) -> None:
        """Reports the step that ends now: with the report, its seconds on the wall and on processors."""
        assert self._start is not None
        seconds, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        record = {"seconds": seconds, "processor": processor, **report}
        print(json.dumps(record), file=self._out, flush=True)
        self._left -= 1
        self._start = None


class TurnProcess:
    """The bench's side."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts a worker in the repository's folder, with what the environment adds to this process's."""
        self._command = " ".join(command[:3])
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def take(self, steps: int) -> list[dict[str, Any]]:
        """Takes steps and returns the report of each.

        Raises:
            RuntimeError: the process ended; its last words are in the message.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        lines = [self._process.stdout.readline() for _ in range(steps)]
        if not all(lines):
            self._log.seek(0)
            raise RuntimeError(f"{self._command} ended: {self._log.read()[-4000:]}")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._log.close()
