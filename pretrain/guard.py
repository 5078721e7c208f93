"""What stops a run: numbers that are not finite, and a request to end."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from pretrain.data.batch import FIELD_NAMES, TokenBatch

EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM or SIGINT: the state is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)."""
EXIT_NOT_FINITE = 3
"""Exit code where the loss or a gradient was not finite and train.on_nonfinite=stop."""


class NonFiniteError(FloatingPointError):
    """The loss or its gradient is not a number, and the recipe says stop."""


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
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._before[number])


def save_batch(batch: TokenBatch, path: Path) -> Path:
    """Writes this host's rows of a batch as .npz, to be looked at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {}
    for name in FIELD_NAMES:
        field = getattr(batch, name)
        if isinstance(field, jax.Array):
            field = np.concatenate(
                [np.asarray(shard.data) for shard in field.addressable_shards if shard.replica_id == 0]
            )
        fields[name] = field
    np.savez_compressed(path, **fields)
    return path
