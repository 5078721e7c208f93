"""The process-wide settings of a run: distributed start, partitioner, matmul precision; undone when the run ends."""

import contextlib
from collections.abc import Iterator

import jax

from recipes.schema import MeshSection, TrainSection

INITIALIZATION_TIMEOUT_SECONDS = 300


@contextlib.contextmanager
def runtime(train: TrainSection, mesh: MeshSection) -> Iterator[None]:
    """Applies `train.shardy` and `train.matmul_precision`, and joins the other hosts where there are several."""
    start_distributed(mesh)
    settings = {
        "jax_use_shardy_partitioner": train.shardy,
        "jax_default_matmul_precision": train.matmul_precision,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def start_distributed(mesh: MeshSection) -> None:
    """Connects to the other processes of the run, in bounded time; does nothing for a single process."""
    if mesh.num_processes is None or mesh.num_processes == 1 or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=mesh.coordinator_address,
        num_processes=mesh.num_processes,
        process_id=mesh.process_id,
        initialization_timeout=INITIALIZATION_TIMEOUT_SECONDS,
    )
