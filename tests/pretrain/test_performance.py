"""6 N by hand, the remembered peak, the clock of steps, and the trace of a span of them."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.config import load_preset
from pretrain import performance
from pretrain.performance import (
    WARMUP_STEPS,
    StepTimer,
    Trace,
    matmul_parameters,
    measure_peak_flops,
    peak_cache_path,
    peak_flops,
    train_flops_per_token,
)

CPU = jax.local_devices()[0]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # Untied: all but the token table. 139,584 - 512 * 64.
        ("tiny-llama", 139_584 - 512 * 64),
        # Tied: the table is the head, and counts once. Nothing is looked up besides.
        ("tiny-qwen3", 131_520),
        # Learned positions are looked up: 52,464 - 2048 * 16.
        ("gpt3-52k", 52_464 - 2048 * 16),
        # 8,030,261,248 less a table of 128,256 * 4,096.
        ("llama3.1-8b", 8_030_261_248 - 128_256 * 4096),
    ],
)
def test_six_operations_a_parameter_and_token(preset: str, parameters: int) -> None:
    config = load_preset(preset)
    assert matmul_parameters(config) == parameters
    assert train_flops_per_token(config) == 6 * parameters


def test_a_given_peak_is_taken_as_it_is(tmp_path: Path) -> None:
    assert peak_flops(CPU, "float32", 2.5e12, tmp_path / "peaks.json") == 2.5e12
    assert not list(tmp_path.iterdir())


def test_a_peak_is_measured_once_for_a_kind_of_device_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(device: Any, dtype: str, **rest: Any) -> float:
        calls.append(dtype)
        return 8e10 if dtype == "float32" else 4e10

    monkeypatch.setattr(performance, "measure_peak_flops", measured)
    cache = tmp_path / "below" / "peaks.json"
    assert [peak_flops(CPU, dtype, None, cache) for dtype in ("float32", "bfloat16", "float32")] == [8e10, 4e10, 8e10]
    assert calls == ["float32", "bfloat16"]
    assert sorted(json.loads(cache.read_text()).values()) == [4e10, 8e10]
    assert [path.name for path in cache.parent.iterdir()] == ["peaks.json"], "nothing is left beside it"


def test_fake_devices_share_the_cores_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "measure_peak_flops", lambda *_, **__: 8e10)
    monkeypatch.setattr(jax, "local_devices", lambda: [CPU] * 8)
    assert peak_flops(CPU, "float32", None, tmp_path / "peaks.json") == 1e10


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"cpu": "fast"}'])
def test_a_damaged_memory_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(performance, "measure_peak_flops", lambda *_, **__: 8e10)
    cache = tmp_path / "peaks.json"
    cache.write_bytes(content)
    assert peak_flops(CPU, "float32", None, cache) == 8e10
    assert list(json.loads(cache.read_text()).values()) == [8e10]


def test_a_folder_that_cannot_be_written_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(performance, "measure_peak_flops", lambda *_, **__: 8e10)
    (tmp_path / "file").write_text("a file where the folder would be")
    log = logging.getLogger("pretrain.performance")
    log.addHandler(caplog.handler)
    try:
        assert peak_flops(CPU, "float32", None, tmp_path / "file" / "peaks.json") == 8e10
    finally:
        log.removeHandler(caplog.handler)
    assert any("the measured peak is not remembered" in message for message in caplog.messages)


def test_peaks_are_remembered_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert peak_cache_path() == tmp_path / "posttrain/peak_flops.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert peak_cache_path() == Path.home() / ".cache/posttrain/peak_flops.json"


def test_a_measured_peak_is_the_operations_of_the_fastest_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n^3 operations, in 4, 2 and 3 seconds of a clock that is wound by hand: 2 * 64^3 / 2."""
    ticks = iter([0.0, 4.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(performance.time, "perf_counter", lambda: next(ticks))
    assert measure_peak_flops(CPU, "float32", size=64, repeats=3) == 64**3


def test_the_clock_counts_from_step_to_step_and_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(performance.time, "perf_counter", lambda: now[0])
    timer = StepTimer(flops_per_token=10, peak=1e4)
    timer.start()
    ends = [130.0, 131.0, 133.0, 135.5]
    rows = [timer.step(500.0, end) for end in ends]
    assert rows[:WARMUP_STEPS] == [{}, {}]
    assert rows[2] == {"perf/step_seconds": 2.0, "perf/tokens_per_second": 250.0, "perf/mfu": 0.25}
    assert rows[3]["perf/step_seconds"] == 2.5
    # An evaluation of 60 seconds is no part of the next step.
    now[0] = 195.5
    timer.start()
    assert timer.step(500.0, 196.5)["perf/step_seconds"] == 1.0


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 9, ["start before 3", "stop after 5"]),
        # Resumed within the span; ended within it; the span lies outside the attempt.
        (4, 9, ["start before 4", "stop after 5"]),
        (1, 4, ["start before 3", "stop after 4"]),
        (6, 9, []),
        (1, 2, []),
    ],
)
def test_a_trace_covers_what_an_attempt_has_of_its_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, last: int, expected: list[str]
) -> None:
    events: list[str] = []
    at = [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(f"start before {at[0]}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(f"stop after {at[0]}"))
    trace = Trace(tmp_path, (3, 5))
    for step in range(first, last + 1):
        at[0] = step
        trace.before(step)
        trace.after(step, np.zeros(1))
    trace.close()
    trace.close()
    assert events == expected


def test_no_span_traces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: pytest.fail("a trace was started"))
    trace = Trace(tmp_path, None)
    trace.before(1)
    trace.after(1, None)
    trace.close()
