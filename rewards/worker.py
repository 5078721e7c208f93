"""A process that runs rewards: it reads work from a socket, and answers each piece as soon as it is done.

One JSON text a line. From the pool: first the set-up `{"path", "specs", "tags", "reward_file", "memory_bytes"}`, then
`[[task, reward index, input index], ...]` beside the inputs they name. To the pool: first `{"rewards": [...]}` or
`{"error": text}`, then `[task, value, failure, detail, notes]` for each task, in order.

A reward is a stranger's code. What it prints goes to a file that this process empties; a process that it forks does not
come back from it; and everything ends, whatever it is doing, when the pool's process does.
"""

import fcntl
import json
import math
import numbers
import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from rewards.base import LARGEST, FailureKind, Reward, RewardInput, RewardSpec, Tags
from rewards.numbers import Numbers, warm_up
from rewards.registry import make_reward
from rewards.reward_file import load_reward_file

LARGEST_FILE = 1 << 28
"""Bytes of any file that a worker writes, what it prints included: a reward that prints for ever meets an error."""
SHOWN = 200
"""Characters of a printed text or an exception that a record keeps."""


def main(requests_fd: int, lifeline_fd: int) -> None:
    """Serves one pool until its socket closes.

    Args:
        requests_fd: the socket that carries work and answers.
        lifeline_fd: a pipe into which nothing is ever written; it closes when the pool's process ends.
    """
    _end_with(lifeline_fd)
    connection = socket.socket(fileno=requests_fd)
    lines = connection.makefile("rb")
    setup = json.loads(lines.readline())
    if setup["memory_bytes"] is not None:
        _limit(resource.RLIMIT_AS, setup["memory_bytes"])
    # Python ignores the signal that comes with this limit, so the writing call raises OSError.
    _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
    # A crash of the interpreter is one of the things that are expected here.
    _limit(resource.RLIMIT_CORE, 0)
    try:
        loaded = _load(setup)
    except ValueError as error:
        _send(connection, {"error": str(error)})
        return
    _send(connection, {"rewards": [[name, weight, one.low, one.high] for name, weight, one in loaded]})
    watch = _Watch()
    for line in lines:
        request = json.loads(line)
        inputs = [RewardInput(*fields) for fields in request["inputs"]]
        for task, reward, item in request["tasks"]:
            value, failure, detail = judge(loaded[reward][2], inputs[item])
            watch.leave_if_forked()
            _send(connection, [task, value, failure, detail, watch.notes()])


def judge(reward: Reward, item: RewardInput) -> tuple[float | None, FailureKind | None, str]:
    """Calls a reward and judges what comes back.

    Args:
        reward: any reward.
        item: a completion.

    Returns:
        The value, or None with the failure's kind and what happened, as text that every file can hold.
    """
    value, failure, detail = _judged(reward, item)
    # A stranger's message may hold halves of characters, which no encoding has.
    return value, failure, detail.encode(errors="replace").decode()


def _judged(reward: Reward, item: RewardInput) -> tuple[float | None, FailureKind | None, str]:
    try:
        value: Any = reward(item)
        # An integer too large for a float raises too.
        number = float(value) if isinstance(value, numbers.Real) else None
    except (Exception, SystemExit) as error:  # noqa: BLE001  a stranger's function may raise anything; all is recorded
        return None, "exception", f"{type(error).__name__}: {error}"[:SHOWN]
    if number is None:
        return None, "not_a_number", f"returned {type(value).__name__} {value!r:.80}"
    if not math.isfinite(number):
        return None, "not_finite", f"returned {number}"
    if abs(number) > LARGEST:
        return None, "out_of_range", f"returned {number}, and a reward is at most {LARGEST:g} in size"
    if not reward.low <= number <= reward.high:
        return None, "out_of_range", f"returned {number}, outside {reward.low} to {reward.high}"
    return number, None, ""


def _limit(kind: int, wanted: int) -> None:
    """Lowers a limit of this process; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (limit, limit))


def _load(setup: dict[str, Any]) -> list[tuple[str, float, Reward]]:
    tags = Tags(*setup["tags"])
    loaded: list[tuple[str, float, Reward]] = []
    for fields in setup["specs"]:
        spec = RewardSpec(**fields)
        reward = make_reward(spec, tags)
        if isinstance(reward, Numbers):
            warm_up()
        loaded.append((spec.name, float(spec.weight), reward))
    if setup["reward_file"] is not None:
        for one in load_reward_file(setup["reward_file"]):
            if one.name in [name for name, _, _ in loaded]:
                raise ValueError(
                    f"reward file {setup['reward_file']}: reward_{one.name}: the recipe names a reward {one.name} too; "
                    "rename the function"
                )
            loaded.append((one.name, one.weight, one))
    return loaded


def _send(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


class _Watch:
    """Sees what a reward does beside answering: it prints, or it forks."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # A copy of the descriptor, since a reward may close or replace the one it knows.
        self._output = os.dup(1)
        self._forks = 0
        os.register_at_fork(after_in_parent=self._count)

    def _count(self) -> None:
        self._forks += 1

    def leave_if_forked(self) -> None:
        """Ends this process if a reward forked it: only one of the two may answer."""
        if os.getpid() != self._pid:
            os._exit(0)

    def notes(self) -> list[str]:
        """What was seen since the last call, and forgets it."""
        found = []
        if self._forks:
            found.append(f"forked {self._forks} processes")
            self._forks = 0
        for stream in (sys.stdout, sys.stderr):
            with suppress(ValueError, OSError, AttributeError):
                stream.flush()
        size = os.fstat(self._output).st_size
        if size:
            text = os.pread(self._output, SHOWN, 0).decode(errors="replace")
            found.append(f"printed {size} bytes: {text!r}")
            os.ftruncate(self._output, 0)
            os.lseek(self._output, 0, os.SEEK_SET)
        return found


def _end_with(lifeline_fd: int) -> None:
    """Ends this process and all that it forked when the other end of a pipe closes."""
    if hasattr(fcntl, "F_SETSIG"):
        # The kernel itself kills the group, so that a computation that never returns to Python ends too. It does so for
        # a pipe; for a socket it would not while the thread below waits on it.
        fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, fcntl.fcntl(lifeline_fd, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_wait_and_end, args=(lifeline_fd,), daemon=True).start()


def _wait_and_end(lifeline_fd: int) -> None:
    # This sees an end that came before the kernel was asked, and serves systems that cannot be asked.
    os.read(lifeline_fd, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)
