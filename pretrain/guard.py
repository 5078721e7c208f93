"""What stops a run: numbers that are not finite, and a request to end."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM or SIGINT: the state is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)."""
EXIT_NOT_FINITE = 3
"""Exit code where the loss or a gradient was not finite and train.on_nonfinite=stop."""


class NonFiniteError(FloatingPointError):
    """The loss or its gradient is not a number, and the recipe says stop."""


class DataEnded(ValueError):
    """The data of all hosts ended before train.steps steps were made."""


class Interrupted(Exception):
    """The run was asked to end; its state is saved."""


class StopRequest:
    """Notes SIGTERM and SIGINT while it is entered, so that a step can finish and the state be saved.

    A second signal of the same kind acts as it would without us.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # Known before the handler is there, which may be called at once.
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[number])


class StopVote:
    """Whether any host was asked to end, as all hosts see it after the same step.

    A host that is alone answers at once. Several sum their answers on the devices and read the sum one step later, so
    that none waits for the step it has just handed to its devices.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._cast: jax.Array | None = None
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._split = NamedSharding(mesh, PartitionSpec("device"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Called once a step, on every host."""
        asked = self._request.name is not None
        if jax.process_count() == 1:
            return asked
        own = np.full(jax.local_device_count(), asked)
        before, self._cast = self._cast, self._any(jax.make_array_from_process_local_data(self._split, own))
        return before is not None and bool(before)


def save_batch(batch: Any, path: Path) -> None:
    """Writes this host's rows of a batch, a dataclass of arrays, as .npz, to be looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    fields: dict[str, Any] = {
        jax.tree_util.keystr(keys, simple=True, separator="."): _own_part(leaf) for keys, leaf in leaves
    }
    np.savez_compressed(path, **fields)


def _own_part(field: jax.Array) -> np.ndarray:
    """The part of an array that this host's devices hold, pieced together from their shards."""
    starts = [
        sorted({part.start or 0 for part in parts})
        for parts in zip(*(shard.index for shard in field.addressable_shards), strict=True)
    ]
    pieces = {
        tuple(part.start or 0 for part in shard.index): np.asarray(shard.data) for shard in field.addressable_shards
    }

    def join(prefix: tuple[int, ...]) -> Any:
        if len(prefix) == len(starts):
            return pieces[prefix]
        return [join((*prefix, start)) for start in starts[len(prefix)]]

    return np.block(join(()))
