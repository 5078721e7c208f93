"""Step times, tokens a second and model FLOP utilisation."""

import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.parameters import flatten, param_specs

WARMUP_STEPS = 2
"""Steps left out of throughput: the first compiles, the second may still fill caches."""


def matmul_parameters(config: TransformerConfig) -> int:
    """Parameters that multiply every token: all but lookup tables (a tied table counts once, as the head)."""
    total = 0
    for path, spec in flatten(param_specs(config, scan_layers=True, param_scan_axis=1)):
        looked_up = path[-1] == "embedding" and not (path[0] == "token_embedder" and config.tied_embeddings)
        size = 1
        for extent in spec.shape:
            size *= extent
        total += 0 if looked_up else size
    return total


def train_flops_per_token(config: TransformerConfig) -> int:
    """6 N floating-point operations a token, forward and backward (Kaplan et al. 2020); attention is not counted."""
    return 6 * matmul_parameters(config)


def measure_peak_flops(device: jax.Device, dtype: str, *, size: int, repeats: int) -> float:
    """The fastest of `repeats` square matmuls, in floating-point operations a second."""
    left = jax.device_put(jnp.ones((size, size), jnp.dtype(dtype)), device)
    matmul = jax.jit(jnp.matmul)
    matmul(left, left).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        matmul(left, left).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_cache_path() -> Path:
    """Where measured peaks are remembered."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "posttrain" / "peak_flops.json"


def peak_flops(device: jax.Device, dtype: str, given: float | None, cache: Path) -> float:
    """The peak of one device: as given, as remembered for its kind, or measured now (about a second) and remembered.

    On a CPU all fake devices share the cores, so one of n counts as an n-th.
    """
    if given is not None:
        return given
    share = len(jax.local_devices()) if device.platform == "cpu" else 1
    key = f"{device.device_kind} x {os.cpu_count() if device.platform == 'cpu' else 1}: {dtype}"
    known: dict[str, float] = {}
    if cache.is_file():
        try:
            known = json.loads(cache.read_text())
        except json.JSONDecodeError:
            known = {}
    if key not in known:
        known[key] = measure_peak_flops(device, dtype, size=2048 if device.platform == "cpu" else 8192, repeats=10)
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(known, indent=1))
        aside.replace(cache)
    return known[key] / share


class StepTimer:
    """Seconds between completed steps, warm-up left out of the summary."""

    def __init__(self, flops_per_token: int, peak: float) -> None:
        """`peak` is the sum over devices, in floating-point operations a second."""
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._last: float | None = None
        self._seen = 0
        self.seconds: list[float] = []

    def start(self) -> None:
        """Starts the clock, also after something that is no step (evaluation, a save)."""
        self._last = time.perf_counter()

    def step(self, tokens: float) -> dict[str, float]:
        """Ends a step of `tokens` trained tokens and returns its perf metrics; empty during warm-up."""
        now = time.perf_counter()
        seconds = now - (now if self._last is None else self._last)
        self._last = now
        self._seen += 1
        if self._seen <= WARMUP_STEPS or seconds <= 0.0:
            return {}
        self.seconds.append(seconds)
        rate = tokens / seconds
        return {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": rate,
            "perf/mfu": rate * self._flops_per_token / self._peak,
        }

    def median_seconds(self) -> float | None:
        """The median step, or None before the end of warm-up."""
        return statistics.median(self.seconds) if self.seconds else None
