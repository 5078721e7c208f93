"""The process-wide settings of a run: distributed start, partitioner, matmul precision; undone when the run ends."""

import contextlib
import os
from collections.abc import Iterator

import jax

from recipes.schema import MeshSection, RunSection, TrainSection

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
    """Connects to the other processes of the run, in bounded time; does nothing for a single process.

    The group is the recipe's, or the scheduler's where the recipe names none.
    """
    named = mesh.num_processes is not None and mesh.num_processes > 1
    if jax.distributed.is_initialized() or not (named or (mesh.num_processes is None and in_scheduled_group())):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Where the three are None, JAX asks the scheduler.
    jax.distributed.initialize(
        coordinator_address=mesh.coordinator_address,
        num_processes=mesh.num_processes,
        process_id=mesh.process_id,
        initialization_timeout=INITIALIZATION_TIMEOUT_SECONDS,
    )


def in_scheduled_group() -> bool:
    """Whether Slurm, Open MPI or a TPU pod's manager started this process as one of several."""
    tasks = (os.environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(int(count) > 1 for count in tasks) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def require_shared_directory(run: RunSection) -> None:
    """Raises ValueError where several processes would each make a run directory of their own."""
    if run.dir is None and jax.process_count() > 1:
        raise ValueError(
            f"run.dir=null: the {jax.process_count()} processes of a run share one directory; set run.dir to a folder "
            "that all of them see"
        )
