"""The pool against rewards that hang, crash, kill, fork, print and lie. Every wait in here is bounded by a deadline."""

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewards import pool as pool_module
from rewards import worker_process
from rewards.base import RewardInfo, RewardInput, RewardPoolError, RewardSpec, Tags
from rewards.pool import PoolLimits, RewardPool

ROOT = Path(__file__).resolve().parents[2]

# Each completion of "misbehave" names what this reward does with it; a number is what it returns.
HOSTILE = """
import ctypes, os, signal, sys, time

def misbehave(what):
    if what == "hang": time.sleep(600)
    if what == "compute": return 7 ** (7 ** 9)
    if what == "raise": raise RuntimeError("no luck")
    if what == "exit": sys.exit(3)
    if what == "_exit": os._exit(3)
    if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault": ctypes.string_at(0)
    if what == "stop": os.kill(os.getpid(), signal.SIGSTOP)
    if what == "nan": return float("nan")
    if what == "inf": return float("inf")
    if what == "text": return "5"
    if what == "none": return None
    if what == "beyond": return 101.0
    if what == "memory": return len(bytearray(1 << 40))
    if what == "recurse": return misbehave(what)
    if what == "print": print("hello"); return 5
    if what == "write": os.write(1, b"raw"); os.write(2, b" error"); return 5
    if what == "close": os.close(1); os.close(2); return 5
    if what == "fork": os.fork(); return 5
    if what == "linger":
        if os.fork() == 0: time.sleep(600)
        os._exit(3)
    if what == "socket":
        for fd in range(3, 20):
            try: os.write(fd, b'[0, 5.0, null, "", []]\\n')
            except OSError: pass
        return 5
    if what == "bool": return True
    if what == "half": raise ValueError("bad \\udcff byte")
    if what == "integer": return 10 ** 400
    return float(what)

RANGES = {"misbehave": (0, 100)}

def reward_misbehave(completion):
    return misbehave(completion)
"""


def limits(**changes) -> PoolLimits:
    # So long that only what never ends is late, on a busy machine too; tests of deadlines set their own.
    given = {
        "num_workers": 2,
        "item_seconds": 60.0,
        "call_seconds": 400.0,
        "start_seconds": 300.0,
        "memory_bytes": None,
    }
    return PoolLimits(**{**given, **changes})


def pool_of(source: str, tmp_path: Path, specs=(), **changes) -> RewardPool:
    file = tmp_path / "my_rewards.py"
    file.write_text(source)
    return RewardPool(specs, tags=Tags(), reward_file=file, limits=limits(**changes))


def items(*completions: str, **columns) -> list[RewardInput]:
    return [RewardInput("q", completion, "72", columns) for completion in completions]


@pytest.mark.parametrize(
    ("what", "failure", "detail"),
    [
        ("hang", "timeout", "no answer within 2 s; killed"),
        ("compute", "timeout", "no answer within 2 s"),
        ("stop", "timeout", "no answer within 2 s"),
        ("raise", "exception", "RuntimeError: no luck"),
        ("exit", "exception", "SystemExit: 3"),
        ("recurse", "exception", "RecursionError"),
        ("memory", "exception", "MemoryError"),
        ("_exit", "died", "exit status 3"),
        ("kill", "died", "signal 9"),
        ("segfault", "died", "signal 11"),
        ("linger", "died", "exit status 3"),
        ("nan", "not_finite", "returned nan"),
        ("inf", "not_finite", "returned inf"),
        ("text", "not_a_number", "returned str '5'"),
        ("none", "not_a_number", "returned NoneType"),
        ("beyond", "out_of_range", "returned 101.0, outside 0.0 to 100.0"),
        ("abc", "exception", "could not convert string to float"),
        ("half", "exception", "ValueError: bad ? byte"),
        ("1e200", "out_of_range", "returned 1e+200, and a reward is at most 1e+30 in size"),
        ("integer", "exception", "OverflowError"),
    ],
)
def test_a_failure_is_named_and_its_neighbours_are_scored_in_order(tmp_path, caplog, what, failure, detail):
    # One worker is given six at a time, so that a failure has neighbours on both sides to lose.
    asked = [what if index == 2 else str(index) for index in range(24)]
    start = time.monotonic()
    seconds = 2.0 if failure == "timeout" else 60.0
    with pool_of(HOSTILE, tmp_path, num_workers=1, memory_bytes=1 << 32, item_seconds=seconds) as pool:
        outcomes = pool.score(items(*asked))
        # The pool serves on.
        assert [one.value for (one,) in pool.score(items("8", "9"))] == [8.0, 9.0]
        assert pool.failures == {("misbehave", failure): 1}
        assert pool.restarts == (failure in ("timeout", "died"))
    # Two starts of a worker and one deadline of two seconds; generous, for a machine that does other things too.
    assert time.monotonic() - start < 120
    assert [one.value for (one,) in outcomes] == [None if index == 2 else float(index) for index in range(24)]
    assert outcomes[2][0].failure == failure
    assert detail in outcomes[2][0].detail
    assert any(f"reward misbehave: completion 2: {failure}" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("print", "printed 6 bytes: 'hello\\n'"),
        ("write", "printed 9 bytes: 'raw error'"),
        ("close", None),
        ("fork", "forked 1 processes"),
    ],
)
def test_a_reward_that_prints_or_forks_keeps_its_value_and_is_noted(tmp_path, capfd, what, note):
    with pool_of(HOSTILE, tmp_path) as pool:
        first, second, third = (one for (one,) in pool.score(items("1", what, "3")))
        assert (first.value, second.value, third.value) == (1.0, 5.0, 3.0)
        assert second.notes == (() if note is None else (note,))
        assert first.notes == third.notes == ()
        assert pool.restarts == 0
    assert capfd.readouterr().out == ""


def test_a_machine_that_stands_still_is_no_rewards_fault(tmp_path, monkeypatch):
    """A pause of 100 s in the middle of each of the first waits: no deadline of 2 s or call of 5 s is over."""
    paused, real = [0.0], time.monotonic
    clock = SimpleNamespace(monotonic=lambda: real() + paused[0], sleep=time.sleep)
    monkeypatch.setattr(pool_module, "time", clock)
    monkeypatch.setattr(worker_process, "time", clock)
    with pool_of(HOSTILE, tmp_path, num_workers=1, item_seconds=2.0, call_seconds=5.0) as pool:
        pool.start()
        select, waits = selectors.DefaultSelector.select, []

        def interrupted(selector, seconds):
            waits.append(seconds)
            if len(waits) < 4:
                paused[0] += 100.0
                return []
            return select(selector, seconds)

        monkeypatch.setattr(selectors.DefaultSelector, "select", interrupted)
        outcomes = pool.score(items("1", "2", "hang", "3"))
    assert len(waits) > 4
    assert [(one.value, one.failure) for (one,) in outcomes] == [
        (1.0, None), (2.0, None), (None, "timeout"), (3.0, None)
    ]  # fmt: skip


def test_a_reward_that_writes_into_the_pools_socket_forges_no_value(tmp_path):
    with pool_of(HOSTILE, tmp_path) as pool:
        outcomes = pool.score(items("1", "socket", "3", "4"))
    values = [one.value for (one,) in outcomes]
    assert values[0] == 1.0
    assert values[2:] == [3.0, 4.0]
    assert outcomes[1][0].failure in ("died", None)


def test_booleans_and_integers_are_numbers(tmp_path):
    with pool_of(HOSTILE, tmp_path) as pool:
        assert [one.value for (one,) in pool.score(items("bool", "0"))] == [1.0, 0.0]


def test_many_hostile_completions_come_back_in_order_and_in_time(tmp_path):
    kinds = ["kill", "raise", "nan", "_exit", "print"]
    asked = [kinds[index % 5] if index % 10 == 3 else str(index % 100) for index in range(200)]
    with pool_of(HOSTILE, tmp_path) as pool:
        outcomes = pool.score(items(*asked))
    for (one,), what in zip(outcomes, asked, strict=True):
        assert (one.value is None) if what in ("kill", "raise", "nan", "_exit") else True
        assert one.value == float(what) if what.isdigit() else True


def test_a_call_has_a_deadline_of_its_own(tmp_path):
    start = time.monotonic()
    with pool_of(HOSTILE, tmp_path, call_seconds=2.0) as pool:
        outcomes = pool.score(items(*["hang"] * 40))
        # Twenty deadlines of a completion, one after the other, would take 20 minutes.
        assert time.monotonic() - start < 120
        assert {one.failure for (one,) in outcomes} == {"timeout"}
        assert outcomes[-1][0].detail == "the call's 2 s were over"
        assert pool.failures["misbehave", "timeout"] == 40
        # A worker has to start first, which may take more than 2 s.
        pool._limits = limits()
        assert pool.score(items("7"))[0][0].value == 7.0


def test_one_reward_that_fails_leaves_the_completions_others_alone(tmp_path):
    specs = [RewardSpec("gsm8k_exact"), RewardSpec("length", 0.5, {"target": 1})]
    with pool_of(HOSTILE, tmp_path, specs) as pool:
        assert pool.start() == (
            RewardInfo("gsm8k_exact", 1.0, 0.0, 1.0),
            RewardInfo("length", 0.5, -1.0, 0.0),
            RewardInfo("misbehave", 1.0, 0.0, 100.0),
        )
        for outcomes in pool.score(items("kill", "kill")):
            assert [one.reward for one in outcomes] == ["gsm8k_exact", "length", "misbehave"]
            assert [one.value for one in outcomes] == [0.0, 0.0, None]


def test_rewards_of_the_registry_agree_with_a_call_in_this_process():
    completions = [f"<answer>{index}</answer>" for index in range(150)]
    specs = [RewardSpec("gsm8k_exact"), RewardSpec("format_approximate")]
    with RewardPool(specs, tags=Tags(), reward_file=None, limits=limits(num_workers=3)) as pool:
        outcomes = pool.score(items(*completions))
    assert [[one.value for one in of_item] for of_item in outcomes] == [
        [float(index == 72), 0.5] for index in range(150)
    ]


def test_an_expression_that_algebra_never_finishes_is_killed():
    specs = [RewardSpec("numbers")]
    with RewardPool(specs, tags=Tags(), reward_file=None, limits=limits(num_workers=1, item_seconds=5)) as pool:
        fine, hung = pool.score(items(r"<answer>\frac{144}{2}</answer>", "<answer>9^{9^{9^9}}</answer>"))
    assert hung[0].failure == "timeout"
    assert fine[0].value == 1.0


def test_nothing_starts_before_it_is_needed_and_no_more_than_the_limit(tmp_path):
    pool = pool_of(HOSTILE, tmp_path, num_workers=2)
    assert pool._workers == []
    assert pool.score([]) == []
    pool.score(items("1"))
    assert len(pool._workers) == 1
    pool.score(items(*["1"] * 100))
    assert len(pool._workers) == 2
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    assert not any(map(is_running, pids))


def test_an_interrupted_call_leaves_no_answer_for_the_next(tmp_path, monkeypatch):
    with pool_of(HOSTILE, tmp_path, num_workers=1) as pool:
        pool.start()
        listen = pool._listen

        def interrupted(until, call):
            raise KeyboardInterrupt

        monkeypatch.setattr(pool, "_listen", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.score(items("1"))
        monkeypatch.setattr(pool, "_listen", listen)
        assert pool.score(items("7"))[0][0].value == 7.0


PARENT = """
import sys, time
from rewards.base import RewardInput, Tags
from rewards.pool import PoolLimits, RewardPool
limits = PoolLimits(num_workers=1, item_seconds=600, call_seconds=600, start_seconds=300, memory_bytes=None)
pool = RewardPool([], tags=Tags(), reward_file=sys.argv[1], limits=limits)
pool.start()
print(pool._workers[0].process.pid, "jax" in sys.modules, flush=True)
if sys.argv[2] != "idle":
    pool.score([RewardInput("q", sys.argv[2], "72")])
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "hang", "compute"])
def test_a_worker_dies_with_the_pools_process_whatever_it_is_doing(tmp_path, state):
    file = tmp_path / "my_rewards.py"
    file.write_text(HOSTILE)
    command = [sys.executable, "-c", PARENT, str(file), state]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid, has_jax = parent.stdout.readline().split()
    assert has_jax == "False"
    time.sleep(0.5)
    assert is_running(int(pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 120
    while is_running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid))


def test_the_file_runs_in_the_workers_only_and_without_jax(tmp_path):
    source = "import os, sys\ndef reward_pid(): return os.getpid()\ndef reward_jax(): return 'jax' in sys.modules\n"
    with pool_of(source, tmp_path) as pool:
        pid, has_jax = pool.score(items("x"))[0]
    assert pid.value != os.getpid()
    assert has_jax.value == 0.0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def reward_a(", "it cannot be run (SyntaxError"),
        ("import not_there", "it cannot be run (ModuleNotFoundError"),
        ("raise SystemExit(1)", "it cannot be run (SystemExit"),
        ("x = 1", "no function whose name begins with reward_"),
        ("def reward_length(completion): return 1", "the recipe names a reward length too"),
    ],
)
def test_a_bad_reward_file_is_the_users_error(tmp_path, source, said):
    with (
        pool_of(source, tmp_path, [RewardSpec("length", 1.0, {"target": 5})]) as pool,
        pytest.raises(ValueError, match=re.escape(said)),
    ):
        pool.start()


def test_a_file_that_kills_every_worker_at_import_ends_the_pool(tmp_path):
    pool = pool_of("import os\nprint('my last words', flush=True)\nos._exit(4)\n", tmp_path)
    # The remedies are keys of a recipe.
    said = (
        r"3 workers in a row .*exit status 4, having written 'my last words'.*rewards\.num_workers, or raise rewards\."
    )
    with pool, pytest.raises(RewardPoolError, match=said):
        pool.start()


def test_a_file_that_hangs_at_import_ends_the_pool_in_bounded_time(tmp_path):
    pool = pool_of("import time\ntime.sleep(60)\n", tmp_path, start_seconds=0.5)
    with pool, pytest.raises(RewardPoolError, match=r"within 0\.5 s"):
        pool.score(items("1"))


def test_columns_reach_the_reward_and_others_than_json_are_refused(tmp_path):
    source = "def reward_level(level, prompt): return level * len(prompt)\n"
    with pool_of(source, tmp_path) as pool:
        assert pool.score(items("x", level=3, other=[1, None]))[0][0].value == 3.0
        (missing,) = pool.score(items("x"))[0]
        assert missing.failure == "exception"
        assert "missing 1 required positional argument: 'level'" in missing.detail
        with pytest.raises(ValueError, match=r"column 'level': set: columns reach rewards as JSON"):
            pool.score(items("x", level={1}))
        with pytest.raises(ValueError, match="rewards know this name already"):
            pool.score([RewardInput("q", "x", "72", {"answer": "5"})])


def test_a_pool_without_a_reward_or_with_impossible_limits_is_refused():
    with pytest.raises(ValueError, match="without a reward nothing can be learnt"):
        RewardPool([], tags=Tags(), reward_file=None, limits=limits())
    with pytest.raises(ValueError, match="item_seconds=0: it has to be positive"):
        limits(item_seconds=0)


def is_running(pid: int) -> bool:
    """Whether a process runs: one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
