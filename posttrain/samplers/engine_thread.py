"""A thread for an engine that cannot be trusted to answer, and the one-at-a-time rule of engines with global state.

An engine that stops answering, or fails, cannot be taken out of its process: it is left where it is, every later engine
of the process is refused, and the process can still end, because a daemon thread does not hold it up. What cannot be
bounded from inside a process is native code that keeps Python's global lock; neither torch's kernels nor JAX's do.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from posttrain.samplers.base import SamplerError

T = TypeVar("T")

# A signal that comes just before a thread blocks is seen only when it wakes, so no wait is longer than this.
LONGEST_SLEEP = 0.25


@dataclass(frozen=True)
class Call:
    """What the thread is to do, where it says what came of it, and whether the one who waits was interrupted."""

    work: Callable[[], Any]
    answers: "queue.SimpleQueue[Answer]"
    interrupted: threading.Event


@dataclass(frozen=True)
class Answer:
    """What a call came to: its result, or what it raised."""

    result: Any = None
    error: BaseException | None = None


@dataclass
class Process:
    """What this process's engines have come to."""

    alive: bool = False
    spoilt_by: str | None = None

    def claim(self) -> None:
        if self.spoilt_by is not None:
            raise SamplerError(
                f"vllm: an engine of this process failed before ({self.spoilt_by}): what it left behind spoils the "
                "next one; go on in a new process"
            )
        if self.alive:
            raise SamplerError(
                "vllm: an engine is alive in this process: vLLM keeps its state in globals, so there is one at a time; "
                "close() the other first"
            )
        self.alive = True


PROCESS = Process()


class EngineThread:
    """The thread on which vLLM runs. Calls are made from any one thread, and end in bounded time."""

    def __init__(self) -> None:
        # Simple queues, because an interrupt cannot leave their locks held.
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._last_sign = time.monotonic()
        self.interrupted = threading.Event()
        """That of the call which is being worked on, for the work to look at."""
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            # Each call has its own, so that an interrupt which comes before the work begins is told to it all the same.
            self.interrupted = call.interrupted
            self.sign_of_life()
            try:
                call.answers.put(Answer(result=call.work()))
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
                call.answers.put(Answer(error=error))
            del call

    def sign_of_life(self) -> None:
        """Says that work goes on; starts the wait anew."""
        self._last_sign = time.monotonic()

    def call(self, work: Callable[[], T], *, what: str, seconds: float) -> T:
        """Runs `work` on the thread.

        Args:
            work: a function of no arguments.
            what: it does, for the error.
            seconds: to wait from one sign of life to the next.

        Raises:
            SamplerError: it stopped answering, or raised anything but a ValueError or a SamplerError of ours.
        """
        call = Call(work, queue.SimpleQueue(), threading.Event())
        self.sign_of_life()
        try:
            self._calls.put(call)
            answer = self._await(call.answers, what=what, seconds=seconds)
        except KeyboardInterrupt:
            call.interrupted.set()
            raise
        error = answer.error
        if error is None:
            return answer.result
        if isinstance(error, SamplerError):
            raise error
        raise spoil(f"failed while {what} ({type(error).__name__}: {_first_line(error)})") from error

    def _await(self, answers: "queue.SimpleQueue[Answer]", *, what: str, seconds: float) -> Answer:
        while True:
            left = self._last_sign + seconds - time.monotonic()
            try:
                return answers.get(timeout=min(max(left, 0), LONGEST_SLEEP))
            except queue.Empty:
                if left <= 0:
                    raise spoil(f"gave no sign of life for {seconds:g} s while {what}") from None

    def end(self) -> None:
        """Lets the thread end once its calls are done."""
        self._calls.put(None)


def spoil(how: str) -> SamplerError:
    PROCESS.spoilt_by = how
    return SamplerError(f"vllm: the engine {how}: it cannot be used again in this process; go on in a new one")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
