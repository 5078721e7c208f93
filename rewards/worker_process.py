"""The pool's view of one worker: its process, its socket, what it was asked and since when."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

# A fresh interpreter, and not multiprocessing's: that one would run the caller's main module again, JAX and all.
START = "import sys; sys.path.insert(0, sys.argv[1]); from rewards.worker import main; main(*map(int, sys.argv[2:]))"
ROOT = str(Path(__file__).resolve().parents[1])


class WorkerProcess:
    """One worker. It runs in a process group of its own, so that what its rewards fork ends with it."""

    def __init__(self, setup: dict[str, Any], start_seconds: float) -> None:
        """Starts the process and sends it `setup`; `ready` tells when it has answered."""
        self.socket, theirs = socket.socketpair()
        their_lifeline, self._lifeline = os.pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the worker
        fds = [theirs.fileno(), their_lifeline]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, ROOT, *map(str, fds)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=fds,
            start_new_session=True,
        )
        theirs.close()
        os.close(their_lifeline)
        self.ready = False
        self.tasks: deque[int] = deque()
        """Tasks that were sent and not answered; the first is being worked on."""
        self.deadline = time.monotonic() + start_seconds
        self._buffer = b""
        self._send(setup, start_seconds)

    def assign(self, tasks: list[list[int]], inputs: list[list[Any]], item_seconds: float) -> bool:
        """Sends work to an idle worker; whether it took it."""
        assert self.ready and not self.tasks
        self.tasks.extend(task for task, _, _ in tasks)
        self.deadline = time.monotonic() + item_seconds
        return self._send({"tasks": tasks, "inputs": inputs}, item_seconds)

    def _send(self, message: object, seconds: float) -> bool:
        # A worker that was stopped or has died would not take a large message.
        self.socket.settimeout(seconds)
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> tuple[list[Any], bool]:
        """Reads what has come, without waiting: the messages, and whether the other end has closed."""
        self.socket.setblocking(False)
        closed = False
        while True:
            try:
                read = self.socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                closed = True
                break
            if not read:
                closed = True
                break
            self._buffer += read
        *lines, self._buffer = self._buffer.split(b"\n")
        try:
            return [json.loads(line) for line in lines], closed
        except ValueError:
            # A reward wrote into the socket; nothing that comes after can be trusted.
            return [], True

    def has_ended(self) -> bool:
        """Whether the process has ended; it stays a zombie, so that its number belongs to nobody else."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self, seconds: float) -> str:
        """Kills the process and all that it forked; how it had ended if it had, and the last it wrote.

        Args:
            seconds: how long to wait for the process to end by itself. A dying process closes its socket first, and
                how it died is worth knowing.
        """
        limit = time.monotonic() + seconds
        while not (had_ended := self.has_ended()) and time.monotonic() < limit:
            time.sleep(0.005)
        if self.process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        code = self.process.returncode
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit status {code}"
        written = self._last_written()
        self.socket.close()
        self._output.close()
        os.close(self._lifeline)
        return (how if had_ended else "killed") + (f", having written {written!r}" if written else "")

    def _last_written(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        text = os.pread(self._output.fileno(), 300, max(0, size - 300)) if size else b""
        return text.decode(errors="replace").strip()
