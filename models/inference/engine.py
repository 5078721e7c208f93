"""Continuous batching over the slots: requests in, tokens out as they come, and a finished request's slot refilled."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.functional import FunctionalModel, Params
from models.inference.cache import KVCache
from models.inference.steps import decode, init_slots, insert_request, prefill
from models.parameters import flatten, unflatten, unstack_layers

SLOT_MULTIPLE = 8
"""CPU matmuls treat rows in groups of up to 8, and round those of an incomplete group otherwise."""
SHORTEST_PREFILL = 16
"""Tokens; shorter prompts are padded to it, longer ones to the next power of two."""
PREFILL_CHUNK = 512
"""Tokens; longer prompts are put through in chunks of this length."""
STOP_IDS_MULTIPLE = 8


@dataclass(frozen=True)
class Request:
    """One completion to sample."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int


class Chunk(NamedTuple):
    """New tokens of one request."""

    request: int
    """As `Engine.submit` numbered it."""
    token_ids: np.ndarray
    """int32 [n], n >= 1."""
    logprobs: np.ndarray
    """float32 [n]."""
    finished: bool


class _Prefix(NamedTuple):
    prompt: tuple[int, ...]
    logits: jax.Array
    cache: KVCache


def inference_model(model: FunctionalModel) -> FunctionalModel:
    """The same function with layers unrolled, and without what only training has."""
    options = model.options.model_copy(update={"scan_layers": False, "remat": "none", "dropout_rate": 0.0})
    return FunctionalModel(model.config, options)


def inference_params(model: FunctionalModel, params: Params) -> Params:
    """Copies a trainer's parameters into the engine's layout: a subtree a layer, kernels in the compute dtype.

    The engine's own copy outlives the trainer's, which a step donates. Norms keep their dtype, as the model reads them
    in float32.
    """
    if model.options.scan_layers:
        params = unstack_layers(params, model.config.num_layers, model.options.param_scan_axis)
    dtype = jnp.dtype(model.options.compute_dtype)
    castable = model.options.quantization == "none"
    return unflatten(
        {
            path: leaf.astype(dtype) if castable and path[-1] in ("kernel", "embedding") else jnp.copy(leaf)
            for path, leaf in flatten(params)
        }
    )


class Engine:
    """Samples requests from one model. They wait in order, and each takes the first slot that is free.

    A request's tokens and log-probabilities are the same, to the bit, whatever else is submitted, in whatever order:
    every program has one shape for all slots, and no slot reads another.
    """

    def __init__(self, model: FunctionalModel, *, num_slots: int, max_length: int, steps_per_call: int) -> None:
        """Builds the programs; they compile when first used.

        Args:
            model: the policy as the trainer has it.
            num_slots: requests in progress at a time, a multiple of 8.
            max_length: bound on prompt and completion together, in tokens.
            steps_per_call: tokens a slot samples between two looks from the host, unless a request ends.

        Raises:
            ValueError: the slots are no multiple of 8, or the length is beyond the model's positions.
        """
        _check_sizes(model, num_slots, max_length, steps_per_call)
        self.num_slots, self.max_length, self.steps_per_call = num_slots, max_length, steps_per_call
        self._model = inference_model(model)
        self._capacity = -(-max_length // SHORTEST_PREFILL) * SHORTEST_PREFILL
        self._convert = jax.jit(partial(inference_params, model))
        # Under jit each leaf is a buffer of its own, as donation wants them.
        self._init = jax.jit(partial(init_slots, self._model, num_slots=num_slots, capacity=self._capacity))
        self._prefill = jax.jit(partial(prefill, self._model), static_argnames="capacity")
        self._insert = jax.jit(insert_request, donate_argnums=0)
        self._decode = jax.jit(partial(decode, self._model, num_steps=steps_per_call), donate_argnums=1)
        self._params: Params | None = None
        self._slots: Any = None
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, tuple[int, Request]] = {}
        self._submitted = 0
        self._prefix: _Prefix | None = None
        self._stop_ids = np.full((STOP_IDS_MULTIPLE,), -1, np.int32)

    @property
    def params(self) -> Params:
        """The engine's own copy of the parameters, in `inference_params`' layout."""
        assert self._params is not None, "load parameters first"
        return self._params

    @property
    def busy(self) -> bool:
        """Whether requests wait or run."""
        return bool(self._waiting or self._running)

    def load(self, params: Params) -> None:
        """Takes over parameters in the trainer's layout, on one device or a mesh; drops every request and cache."""
        self._params = self._convert(params)
        slots = self._init()
        sharding = jax.tree.leaves(self._params)[0].sharding
        if isinstance(sharding, NamedSharding):
            slots = jax.device_put(slots, NamedSharding(sharding.mesh, PartitionSpec()))
        self._slots = slots
        self._reset()

    def begin(self, stop_ids: Sequence[int]) -> None:
        """Drops every request, numbers new ones from 0, and sets the ids that end a completion."""
        self._reset()
        if self._slots is not None:
            self._release(range(self.num_slots))
        wanted = -(-max(len(stop_ids), 1) // STOP_IDS_MULTIPLE) * STOP_IDS_MULTIPLE
        self._stop_ids = np.full((wanted,), -1, np.int32)
        self._stop_ids[: len(stop_ids)] = sorted(stop_ids)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number. Requests of one prompt share its prefill if submitted in a row."""
        self._waiting.append((self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> None:
        """Forgets a request; its slot is free at once."""
        self._waiting = deque(item for item in self._waiting if item[0] != number)
        slots = [slot for slot, (running, _) in self._running.items() if running == number]
        for slot in slots:
            del self._running[slot]
        self._release(slots)

    def _release(self, slots: Sequence[int]) -> None:
        if len(slots):
            kept = ~np.isin(np.arange(self.num_slots), list(slots))
            self._slots = replace(self._slots, active=self._slots.active & kept)

    def step(self, limit: int) -> list[Chunk]:
        """Fills the free slots and samples on.

        Args:
            limit: bound on the tokens of a request in this call, at most `steps_per_call`. The call returns earlier
                when a request ends while others wait.
        """
        assert self._params is not None, "load parameters first"
        for slot in range(self.num_slots):
            if self._waiting and slot not in self._running:
                self._start(slot, *self._waiting.popleft())
        if not self._running:
            return []
        self._slots, emitted = self._decode(self._params, self._slots, self._stop_ids, bool(self._waiting), limit)
        tokens, logprobs, counts, active = jax.device_get(
            (emitted.tokens, emitted.logprobs, emitted.counts, emitted.active)
        )
        chunks = []
        for slot, (number, _) in sorted(self._running.items()):
            count = counts[slot]
            chunks.append(Chunk(number, tokens[slot, :count], logprobs[slot, :count], not active[slot]))
            if not active[slot]:
                del self._running[slot]
        return chunks

    def _start(self, slot: int, number: int, request: Request) -> None:
        if self._prefix is None or self._prefix.prompt != request.prompt:
            self._prefix = self._prefilled(request.prompt)
        top_k = self._model.config.vocab_size if request.top_k is None else request.top_k
        integers = np.array([slot, len(request.prompt), request.max_tokens, request.seed, top_k], np.int32)
        floats = np.array([request.temperature, request.top_p], np.float32)
        self._slots = self._insert(self._slots, self._prefix.cache, self._prefix.logits, integers, floats)
        self._running[slot] = (number, request)

    def _prefilled(self, prompt: tuple[int, ...]) -> _Prefix:
        """Puts a prompt through the model, a long one in chunks."""
        capacity = padded_length(len(prompt), self._capacity)
        width = min(capacity, PREFILL_CHUNK)
        cache: KVCache | None = None
        for start in range(0, len(prompt), width):
            chunk = prompt[start : start + width]
            tokens = np.zeros((1, width), np.int32)
            tokens[0, : len(chunk)] = chunk
            last = np.array([len(chunk) - 1], np.int32)
            logits, cache = self._prefill(self._params, cache, tokens, last, capacity=capacity)
        assert cache is not None
        return _Prefix(prompt, logits, cache)


def padded_length(length: int, longest: int) -> int:
    """The few lengths that programs are compiled for: a power of two of at least 16, or the longest."""
    return min(max(SHORTEST_PREFILL, 1 << (length - 1).bit_length()), longest)


def _check_sizes(model: FunctionalModel, num_slots: int, max_length: int, steps_per_call: int) -> None:
    if num_slots < 1 or num_slots % SLOT_MULTIPLE:
        raise ValueError(
            f"native engine: num_slots={num_slots}: matmuls treat rows in groups of {SLOT_MULTIPLE}, and a completion "
            f"is the same in every slot only where groups are whole; choose a multiple of {SLOT_MULTIPLE}"
        )
    if not 2 <= max_length <= model.config.max_position:
        raise ValueError(
            f"native engine: max_length={max_length}: a sequence has at least 2 tokens and at most the model's "
            f"{model.config.max_position} positions; choose a length between"
        )
    if steps_per_call < 1:
        raise ValueError(f"native engine: steps_per_call={steps_per_call}: a call samples a token; set it to 1 or more")
