"""The engine's thread: answers, errors, silence, interruption, and that none of them keeps a process alive."""

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from posttrain.samplers import engine_thread
from posttrain.samplers.base import SamplerError
from posttrain.samplers.engine_thread import EngineThread, Process


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """A process that no engine has spoilt, in place of this one."""
    fresh = Process()
    monkeypatch.setattr(engine_thread, "PROCESS", fresh)
    return fresh


def test_work_runs_on_one_thread_and_its_result_comes_back(process):
    thread = EngineThread()
    names = [thread.call(lambda: threading.current_thread().name, what="asking", seconds=60) for _ in range(2)]
    assert names == ["vllm", "vllm"]
    thread.end()
    assert process.spoilt_by is None


def test_an_engine_that_falls_silent_is_given_up_and_spoils_its_process(process):
    thread, release = EngineThread(), threading.Event()
    started = time.monotonic()
    with pytest.raises(SamplerError, match=r"the engine gave no sign of life for 0\.2 s while sampling"):
        thread.call(lambda: release.wait(500), what="sampling", seconds=0.2)
    assert time.monotonic() - started < 60
    process.alive = True
    with pytest.raises(SamplerError, match=r"failed before \(gave no sign of life .* go on in a new process"):
        process.claim()
    release.set()


def test_signs_of_life_start_the_wait_anew(process, monkeypatch):
    """On a clock that is wound by hand, so that a machine that pauses makes no difference."""
    now, looks = [0.0], queue.SimpleQueue()

    def monotonic() -> float:
        if threading.current_thread() is threading.main_thread():
            looks.put(now[0])
        return now[0]

    monkeypatch.setattr(engine_thread, "time", SimpleNamespace(monotonic=monotonic))
    thread = EngineThread()

    def work() -> str:
        for _ in range(8):
            now[0] += 100.0
            # The one who waits has looked at the clock since.
            while looks.get(timeout=60) < now[0]:
                pass
            thread.sign_of_life()
        return "done"

    assert thread.call(work, what="working", seconds=150.0) == "done"
    assert now[0] == 800.0


def test_errors_of_ours_pass_and_others_spoil_the_process(process):
    thread = EngineThread()

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SamplerError, match=r"^a tensor is stale$"):
        thread.call(lambda: fail(SamplerError("a tensor is stale")), what="syncing", seconds=60)
    assert process.spoilt_by is None
    with pytest.raises(SamplerError, match=r"failed while syncing \(RuntimeError: shapes differ\)") as caught:
        thread.call(lambda: fail(RuntimeError("shapes differ\nmore")), what="syncing", seconds=60)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert process.spoilt_by is not None


def test_one_engine_at_a_time(process):
    process.claim()
    with pytest.raises(SamplerError, match="an engine is alive in this process"):
        process.claim()


@pytest.fixture
def interrupts():
    """SIGINT as it is in a terminal; a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupted_wait_tells_the_work_and_the_next_call_starts_clean():
    thread, told, started = EngineThread(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        if thread.interrupted.wait(60):
            told.set()

    def interrupt() -> None:
        started.wait(60)
        # To this thread: a signal that another thread takes, or that comes before the sleep, does not end the sleep.
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        thread.call(work, what="sampling", seconds=300)
    assert told.wait(60)
    assert thread.call(lambda: [thread.interrupted.is_set()], what="asking", seconds=60) == [False]


@pytest.mark.usefixtures("interrupts")
def test_work_whose_turn_comes_after_the_interrupt_is_told_of_it():
    thread, release, seen = EngineThread(), threading.Event(), queue.SimpleQueue()

    def interrupted(work: Callable[[], object]) -> None:
        timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            thread.call(work, what="sampling", seconds=300)

    interrupted(lambda: release.wait(300))
    interrupted(lambda: seen.put(thread.interrupted.is_set()))
    release.set()
    assert seen.get(timeout=60) is True


HANGS = """
import time
from posttrain.samplers.base import SamplerError
from posttrain.samplers.engine_thread import EngineThread
try:
    EngineThread().call(lambda: time.sleep(600), what="sampling", seconds=0.2)
except SamplerError as error:
    print(error)
    raise SystemExit(3)
"""


def test_a_process_ends_although_its_engine_hangs():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 3, done.stderr
    assert "no sign of life" in done.stdout
