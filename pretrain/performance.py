"""Step times, tokens a second and model FLOP utilisation."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.lora import adapted_layer_specs, is_adapter
from models.parameters import flatten, param_specs
from recipes.rundir import write_atomically
from recipes.sections.alignment import LoraSection

logger = logging.getLogger(__name__)

WARMUP_STEPS = 2
"""Steps left out of throughput: the first compiles, the second may still fill caches."""


def matmul_parameters(config: TransformerConfig) -> int:
    """Parameters that multiply every token: all but lookup tables (a tied table counts once, as the head)."""
    total = 0
    for path, spec in flatten(param_specs(config, scan_layers=True, param_scan_axis=1)):
        looked_up = path[-1] == "embedding" and not (path[0] == "token_embedder" and config.tied_embeddings)
        total += 0 if looked_up else math.prod(spec.shape)
    return total


def train_flops_per_token(config: TransformerConfig, adapters: LoraSection | None = None) -> int:
    """6 N floating-point operations a token, forward and backward (Kaplan et al. 2020); attention is not counted.

    Under adapters 4 N, since the base has no weight gradients, and 6 for each of the adapters' parameters.
    """
    if adapters is None:
        return 6 * matmul_parameters(config)
    layer = flatten(adapted_layer_specs(config, adapters))
    trained = config.num_layers * sum(math.prod(spec.shape) for path, spec in layer if is_adapter(path))
    return 4 * matmul_parameters(config) + 6 * trained


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
    known = _read_peaks(cache)
    if key not in known:
        known[key] = measure_peak_flops(device, dtype, size=2048 if device.platform == "cpu" else 8192, repeats=10)
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(known, indent=1))
        except OSError as error:
            logger.warning("%s: the measured peak is not remembered: %s", cache, error)
    return known[key] / share


def _read_peaks(cache: Path) -> dict[str, float]:
    """What is remembered; a file that is missing or damaged remembers nothing."""
    try:
        known = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, float)} if isinstance(known, dict) else {}


class StepTimer:
    """Seconds between completed steps, warm-up left out."""

    def __init__(self, flops_per_token: int, peak: float) -> None:
        """`peak` is the sum over devices, in floating-point operations a second."""
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._last = time.perf_counter()
        self._seen = 0

    def start(self) -> None:
        """Starts the clock, also after something that is no step (evaluation, a save)."""
        self._last = time.perf_counter()

    def step(self, tokens: float, finished: float) -> dict[str, float]:
        """Ends a step of `tokens` trained tokens at `finished` (`time.perf_counter`'s seconds).

        Returns:
            Its perf metrics; empty during warm-up.
        """
        seconds, self._last = finished - self._last, finished
        self._seen += 1
        if self._seen <= WARMUP_STEPS:
            return {}
        rate = tokens / seconds
        return {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": rate,
            "perf/mfu": rate * self._flops_per_token / self._peak,
        }


class Trace:
    """The profiler's trace of a span of steps. An attempt that begins within the span traces what is left of it."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """`steps` are the first and the last to trace, counted from 1; None traces nothing."""
        self._folder = folder
        self._steps = steps
        self._open = False

    def before(self, step: int) -> None:
        """Called before each step."""
        if self._steps is not None and not self._open and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._open = True

    def after(self, step: int, results: Any) -> None:
        """Called after each step has been handed to the devices; waits for its results where the span ends."""
        if self._open and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still open, where the run ends within the span."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
