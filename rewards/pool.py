"""Runs rewards in processes that can be killed, so that no reward can hang, crash or silence a training run.

Every call of a reward on a completion is a task, with a deadline of its own. Tasks are handed out in batches and
answered one by one, so that when a worker has to be killed the pool knows which task was at fault: that one becomes a
failure, and the others go to a new worker. What comes of failures is the caller's rule (`rewards.combination`).
"""

import logging
import selectors
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from rewards.base import (
    FailureKind,
    Outcome,
    RewardInfo,
    RewardInput,
    RewardPoolError,
    RewardSpec,
    Tags,
    check_columns,
)
from rewards.registry import check_specs
from rewards.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

LARGEST_BATCH = 64
"""Tasks that a worker is given at a time: enough that a message's cost is nothing beside them."""
SHARES = 4
"""A worker gets at most one part in this many of its share of the tasks, so that slow ones even out at the end."""
TICK = 0.2
"""Seconds between looks at whether a busy worker still lives: what it forked may hold its socket open."""
STOOD_STILL = 1.0
"""Seconds after the end of a wait from which on this process, or the whole machine, must have stood still."""
DYING = 1.0
"""Seconds that a worker whose socket closed is given to end by itself."""
MOST_BAD_STARTS = 3
"""Workers in a row that end without having answered anything, before the pool gives up."""
LOGGED = 3
"""Failures of one kind of one reward that a call describes in the log; the others are counted."""


@dataclass(frozen=True)
class PoolLimits:
    """What a pool may use."""

    num_workers: int
    """Processes, at most; as many are started as there is work for."""
    item_seconds: float
    """Time for one reward on one completion."""
    call_seconds: float
    """Time for one call of `score`; what is not done then is a timeout."""
    start_seconds: float
    """Time for a worker to start and to read the reward file."""
    memory_bytes: int | None
    """Address space of a worker; None for no limit of ours."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "item_seconds", "call_seconds", "start_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"reward pool: {name}={value}: it has to be positive; raise it")


class RewardPool:
    """Rewards behind processes. Nothing is started before the first `start` or `score`.

    One call of `score` runs at a time; others wait for it. Close the pool, or use it in a `with` statement; if this
    process ends without, the workers end too.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], *, tags: Tags, reward_file: str | Path | None, limits: PoolLimits
    ) -> None:
        """Names the rewards: those of the registry, then those of the user's file.

        Raises:
            ValueError: no reward at all, or one that cannot be made.
        """
        check_specs(specs, tags)
        if not specs and reward_file is None:
            raise ValueError("rewards: []: without a reward nothing can be learnt; name one, or give a --reward-file")
        self._setup = {
            "specs": [{**asdict(spec), "options": dict(spec.options)} for spec in specs],
            "tags": tags.in_order(),
            "reward_file": None if reward_file is None else str(Path(reward_file).resolve()),
            "memory_bytes": limits.memory_bytes,
        }
        self._limits = limits
        self._workers: list[WorkerProcess] = []
        self._infos: tuple[RewardInfo, ...] = ()
        self._lock = threading.Lock()
        self._bad_starts = 0
        self.failures: Counter[tuple[str, FailureKind]] = Counter()
        """Failures since the pool was made, by reward and kind."""
        self.restarts = 0
        """Workers that were killed or died while they had work."""

    def start(self) -> tuple[RewardInfo, ...]:
        """Starts one worker, and with it reads the reward file.

        Returns:
            The rewards, in the order of each completion's outcomes.

        Raises:
            ValueError: the reward file is not right.
            RewardPoolError: no worker starts.
        """
        with self._lock:
            if not self._infos:
                self._add_worker()
                while not self._infos:
                    self._listen(time.monotonic() + TICK, None)
            return self._infos

    def score(self, items: Sequence[RewardInput]) -> list[tuple[Outcome, ...]]:
        """Judges completions by every reward.

        Args:
            items: the completions.

        Returns:
            For each item, in their order, one outcome for each reward: a value or a failure.

        Raises:
            ValueError: the reward file is not right, or a column holds what JSON cannot.
            RewardPoolError: workers keep ending before they have done anything.
        """
        infos = self.start()
        with self._lock:
            call = _Call(items, infos, time.monotonic() + self._limits.call_seconds)
            try:
                while call.unanswered:
                    self._hand_out(call)
                    self._listen(time.monotonic() + TICK, call)
                    if time.monotonic() >= call.deadline:
                        self._give_up(call)
            finally:
                # After an interruption too: a late answer must not be taken for one of the next call's.
                self._end_busy()
            outcomes = call.in_order()
        self._report(outcomes)
        return outcomes

    def close(self) -> None:
        """Ends the workers and what they forked. The pool may be used again after; it starts anew."""
        with self._lock:
            while self._workers:
                self._workers.pop().end(0)
            self._infos = ()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_worker(self) -> None:
        self._workers.append(WorkerProcess(self._setup, self._limits.start_seconds))

    def _hand_out(self, call: "_Call") -> None:
        """Gives waiting tasks to idle workers, and starts as many workers as there are tasks and the limit allows."""
        limit = min(self._limits.num_workers, len(call.waiting) + sum(bool(worker.tasks) for worker in self._workers))
        while len(self._workers) < limit:
            self._add_worker()
        size = min(LARGEST_BATCH, max(1, len(call.waiting) // (SHARES * self._limits.num_workers)))
        for worker in list(self._workers):
            if worker.ready and not worker.tasks and call.waiting:
                tasks, inputs = call.next_batch(size)
                if not worker.assign(tasks, inputs, self._limits.item_seconds):
                    self._replace(worker, call, None, "")

    def _listen(self, until: float, call: "_Call | None") -> None:
        """Waits for messages or the next deadline, takes the messages in, and ends workers that are late or dead."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.socket, selectors.EVENT_READ)
            nearest = min([until, *(worker.deadline for worker in self._workers if not worker.ready or worker.tasks)])
            selector.select(max(0.0, nearest - time.monotonic()))
        if (late := time.monotonic() - nearest) > STOOD_STILL:
            # The workers may have stood still too, so that no reward is to blame.
            timed: list[WorkerProcess | _Call] = [*self._workers, *([] if call is None else [call])]
            for one in timed:
                one.deadline += late
        for worker in list(self._workers):
            # Asked before reading: what a worker sent before it ended is read all the same.
            ended = worker.has_ended()
            messages, closed = worker.receive()
            sound = all(self._take(worker, message, call) for message in messages)
            if ended or closed or not sound:
                self._replace(worker, call, "died", "")
            elif (worker.tasks or not worker.ready) and time.monotonic() >= worker.deadline:
                self._replace(worker, call, "timeout", f"no answer within {self._limits.item_seconds:g} s; ")

    def _take(self, worker: WorkerProcess, message: Any, call: "_Call | None") -> bool:
        """Takes in one message; whether it is one that a worker sends."""
        if isinstance(message, dict) and not worker.ready:
            if "error" in message:
                self._workers.remove(worker)
                worker.end(0)
                raise ValueError(message["error"])
            worker.ready = True
            self._infos = tuple(RewardInfo(*fields) for fields in message["rewards"])
            return True
        if not _is_answer(message) or not worker.tasks or message[0] != worker.tasks[0]:
            return False
        task, value, failure, detail, notes = message
        worker.tasks.popleft()
        worker.deadline = time.monotonic() + self._limits.item_seconds
        self._bad_starts = 0
        if call is not None:
            call.answer(task, value, failure, detail, tuple(notes))
        return True

    def _replace(self, worker: WorkerProcess, call: "_Call | None", kind: FailureKind | None, detail: str) -> None:
        """Ends a worker; its first task failed with it (if `kind` is given), and its others wait for another worker."""
        self._workers.remove(worker)
        how = worker.end(DYING if kind == "died" else 0)
        tasks = list(worker.tasks)
        if call is not None and tasks:
            self.restarts += 1
            if kind is not None:
                call.answer(tasks.pop(0), None, kind, detail + how, ())
            call.waiting.extendleft(reversed(tasks))
        if kind is not None and worker.tasks:
            return
        self._bad_starts += 1
        if self._bad_starts >= MOST_BAD_STARTS:
            late = f" within {self._limits.start_seconds:g} s" if kind == "timeout" else ""
            raise RewardPoolError(
                f"reward pool: {self._bad_starts} workers in a row ended before they answered{late} ({how}): no reward "
                "is at fault alone; look at the reward file's imports, at rewards.memory_gib and this machine's free "
                "memory, lower rewards.num_workers, or raise rewards.start_seconds where they start slowly"
            )
        if call is None and not self._infos:
            self._add_worker()

    def _give_up(self, call: "_Call") -> None:
        """Ends what is still running, and calls everything unanswered a timeout."""
        self._end_busy()
        for task in sorted(call.unanswered):
            call.answer(task, None, "timeout", f"the call's {self._limits.call_seconds:g} s were over", ())

    def _end_busy(self) -> None:
        for worker in [one for one in self._workers if one.tasks]:
            self._workers.remove(worker)
            self.restarts += 1
            worker.end(0)

    def _report(self, outcomes: Sequence[tuple[Outcome, ...]]) -> None:
        seen: Counter[tuple[str, str]] = Counter()
        for index, of_item in enumerate(outcomes):
            for outcome in of_item:
                if outcome.failure is not None:
                    self.failures[outcome.reward, outcome.failure] += 1
                for what, text in [(outcome.failure or "", outcome.detail), *(("note", one) for one in outcome.notes)]:
                    if what:
                        seen[outcome.reward, what] += 1
                        if seen[outcome.reward, what] <= LOGGED:
                            logger.warning("reward %s: completion %d: %s: %s", outcome.reward, index, what, text)
        for (reward, what), count in seen.items():
            if count > LOGGED:
                logger.warning("reward %s: %s: %d completions in all", reward, what, count)


class _Call:
    """The tasks of one call of `score`: task `t` is reward `t % R` on item `t // R`."""

    def __init__(self, items: Sequence[RewardInput], infos: Sequence[RewardInfo], deadline: float) -> None:
        self._items, self._infos = items, infos
        self._outcomes: list[Outcome | None] = [None] * (len(items) * len(infos))
        self.waiting = deque(range(len(self._outcomes)))
        self.unanswered = set(self.waiting)
        self.deadline = deadline
        for index, item in enumerate(items):
            check_columns(f"rewards: completion {index}", item.columns)

    def next_batch(self, size: int) -> tuple[list[list[int]], list[list[Any]]]:
        """Takes the next tasks `[task, reward, input]`, and the inputs they name, each once."""
        tasks: list[list[int]] = []
        places: dict[int, int] = {}
        while self.waiting and len(tasks) < size:
            task = self.waiting.popleft()
            item, reward = divmod(task, len(self._infos))
            tasks.append([task, reward, places.setdefault(item, len(places))])
        chosen = [self._items[item] for item in places]
        return tasks, [[one.prompt, one.completion, one.answer, dict(one.columns)] for one in chosen]

    def answer(
        self, task: int, value: float | None, failure: FailureKind | None, detail: str, notes: tuple[str, ...]
    ) -> None:
        """Records what came of a task."""
        name = self._infos[task % len(self._infos)].name
        self._outcomes[task] = Outcome(name, value, failure, detail, notes)
        self.unanswered.discard(task)

    def in_order(self) -> list[tuple[Outcome, ...]]:
        """The outcomes of each item."""
        done = [outcome for outcome in self._outcomes if outcome is not None]
        assert len(done) == len(self._outcomes)
        width = len(self._infos)
        return [tuple(done[first : first + width]) for first in range(0, len(done), width)]


def _is_answer(message: Any) -> bool:
    if not isinstance(message, list) or len(message) != 5:
        return False
    _, value, failure, detail, notes = message
    is_known = failure is None if isinstance(value, float) else value is None and failure in get_args(FailureKind)
    return is_known and isinstance(detail, str) and isinstance(notes, list)
