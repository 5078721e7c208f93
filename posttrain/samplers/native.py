"""The native engine behind the sampler's protocol: JAX alone, on whatever device the policy lives."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.functional import FunctionalModel, Params
from models.inference.attention import CPU_BLOCK
from models.inference.engine import Chunk, Engine, Request, inference_model, inference_params, padded_length
from models.inference.stop_text import StopText
from models.ops.head import output_logits
from models.ops.vocab import default_chunk_size, token_logprobs
from models.parameters import flatten
from models.tokenizer import Tokenizer
from posttrain.samplers import proof
from posttrain.samplers.base import (
    Completion,
    Prompt,
    SamplerError,
    Sampling,
    check_prompts,
    check_sequences,
    sample_seed,
)

STOP_STRING_STEPS = 8
"""Tokens sampled between two looks at the text; what follows a stop string is sampled in vain."""
SCORE_ROWS = 8
PLAIN_LOGIT = 2.0
"""Size of logits up to which a proof's tolerance holds as it is. Rounding grows with them, and so does the tolerance:
bfloat16 keeps 8 bits, so one rounding of a logit of 16 is 0.06 nats."""


@dataclass(frozen=True)
class Progress:
    """How far a call of `generate` is."""

    completed: int
    total: int
    """Completions."""
    tokens: int
    seconds: float


@dataclass(frozen=True)
class SyncReport:
    """What the last sync took and showed."""

    seconds: float
    """All of it."""
    proof_seconds: float
    """The part that was spent on proving it."""
    logprob_deviation: float | None
    """Largest deviation of a sampled token's log-probability, in nats; None where no proof was due."""


class NativeSampler:
    """A `Sampler` in JAX alone; a completion is the same, to the bit, whatever else is sampled.

    Args:
        model: the policy as the trainer has it.
        num_slots: completions sampled at a time, a multiple of 8.
        max_length: bound on prompt and completion together, in tokens.
        steps_per_call: tokens sampled between two looks from the host.
        tokenizer: reads the text for stop strings; None where none are used.
        on_progress: called whenever the host looks.
        proof_settings: of a sync's proof; None proves each sync to the tolerance of the compute dtype.
    """

    def __init__(
        self,
        model: FunctionalModel,
        *,
        num_slots: int,
        max_length: int,
        steps_per_call: int,
        tokenizer: Tokenizer | None,
        on_progress: Callable[[Progress], None] | None,
        proof_settings: proof.ProofSettings | None = None,
    ) -> None:
        """Makes an engine without weights; `sync` brings them. See the class for the arguments."""
        self._model, self._tokenizer, self._on_progress = model, tokenizer, on_progress
        self._engine: Engine | None = Engine(
            model, num_slots=num_slots, max_length=max_length, steps_per_call=steps_per_call
        )
        self._proof = proof_settings or proof.proof_settings(model.options.compute_dtype, every=1)
        self._max_length = max_length
        self._version, self._syncs = -1, 0
        self.last_sync: SyncReport | None = None
        self._score = jax.jit(partial(_sequence_logprobs, inference_model(model)))
        self._largest_logit = jax.jit(partial(_largest_logit, model))
        self._held_checksums = jax.jit(checksums)
        self._given_checksums = jax.jit(lambda params: checksums(inference_params(model, params)))

    @property
    def weight_version(self) -> int:
        """The version last synced; -1 before the first sync."""
        return self._version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        on_tokens: Callable[[int, int, list[int]], None] | None = None,
    ) -> list[Completion]:
        """Completes prompts; see the protocol.

        Args:
            prompts: what to complete. The samples of a prompt share its prefill.
            sampling: how.
            on_tokens: called with (prompt id, sample index, new token ids) as they come, for streaming.
        """
        engine = self._ready()
        check_prompts(prompts, sampling, vocab_size=self._model.config.vocab_size, max_length=self._max_length)
        return self._complete(engine, prompts, sampling, self._version, on_tokens)

    def _complete(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        version: int,
        on_tokens: Callable[[int, int, list[int]], None] | None,
    ) -> list[Completion]:
        jobs = self._submit(engine, prompts, sampling)
        start = time.perf_counter()
        limit = STOP_STRING_STEPS if sampling.stop_strings or on_tokens else engine.steps_per_call
        while engine.busy:
            for chunk in engine.step(limit):
                job = jobs[chunk.request]
                old = len(job.token_ids)
                if job.take(chunk) and not chunk.finished:
                    engine.cancel(chunk.request)
                if on_tokens is not None:
                    on_tokens(job.prompt_id, job.sample_index, job.token_ids[old:])
            if self._on_progress is not None:
                completed = sum(job.finished for job in jobs)
                tokens = sum(len(job.token_ids) for job in jobs)
                self._on_progress(Progress(completed, len(jobs), tokens, time.perf_counter() - start))
        return [job.completion(sampling, version) for job in jobs]

    def _submit(self, engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list["_Job"]:
        """Queues every completion; a job's index is its request's number."""
        if sampling.stop_strings and self._tokenizer is None:
            raise ValueError(
                f"sampling.stop_strings={sampling.stop_strings}: they are found in the text, and this sampler was made "
                "without a tokenizer; give it one, or use stop_ids"
            )
        engine.begin(sampling.stop_ids)
        jobs = []
        for prompt in prompts:
            for index in range(sampling.num_samples):
                seed = sample_seed(sampling.seed, sampling.step, prompt.prompt_id, index)
                engine.submit(
                    Request(
                        prompt=tuple(prompt.token_ids),
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        top_k=sampling.top_k,
                        top_p=sampling.top_p,
                        seed=seed,
                    )
                )
                stop_text = StopText(self._decode_text, sampling.stop_strings) if sampling.stop_strings else None
                jobs.append(_Job(prompt.prompt_id, index, stop_text))
        return jobs

    def _decode_text(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, skip_special=True)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities at temperature 1 of each token after the first; see the protocol."""
        engine = self._ready()
        check_sequences(sequences, vocab_size=self._model.config.vocab_size, max_length=self._max_length)
        by_length: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_length.setdefault(padded_length(len(sequence), self._max_length), []).append(index)
        scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
        for length, indices in sorted(by_length.items()):
            for start in range(0, len(indices), SCORE_ROWS):
                rows = indices[start : start + SCORE_ROWS]
                tokens = np.zeros((SCORE_ROWS, length), np.int32)
                for row, index in enumerate(rows):
                    tokens[row, : len(sequences[index])] = sequences[index]
                logprobs = np.asarray(self._score(engine.params, tokens))
                for row, index in enumerate(rows):
                    scores[index] = logprobs[row, : len(sequences[index]) - 1]
        return scores

    def sync(self, params: Params, version: int) -> None:
        """Copies the trainer's parameters into the engine and, where a proof is due, proves it; see the protocol.

        The proof is a checksum of every tensor, and one sampled completion whose log-probabilities the trainer's own
        model must give again.
        """
        started = time.perf_counter()
        engine = self._open()
        proof.check_tree(self._model, params)
        every = self._proof.every
        due = every > 0 and self._syncs % every == 0
        self._version = -1
        # Tunix forbids transfers between host and device during a sync; these are small.
        with jax.transfer_guard("allow"):
            engine.load(params)
            jax.block_until_ready(engine.params)
            taken = time.perf_counter()
            deviation = self._prove(engine, params, version) if due else None
        self._version = version
        self._syncs += 1
        now = time.perf_counter()
        self.last_sync = SyncReport(now - started, now - taken, deviation)

    def _prove(self, engine: Engine, params: Params, version: int) -> float:
        """Raises SamplerError unless the engine computes with `params`; returns the log-probabilities' deviation."""
        given, held = jax.device_get((self._given_checksums(params), self._held_checksums(engine.params)))
        proof.compare_checksums(
            {name: int(value) for name, value in given.items()}, {name: int(value) for name, value in held.items()}
        )
        prompt, sampling = proof.probe(self._model, CPU_BLOCK, max_length=self._max_length)
        completions = self._complete(engine, [prompt], sampling, version, None)
        largest = float(self._largest_logit(params, np.array([prompt.token_ids], np.int32)))
        return proof.check_completions(
            self._model,
            params,
            [prompt],
            completions,
            sampling=sampling,
            version=version,
            tolerance=self._proof.logprob_tolerance * max(1.0, largest / PLAIN_LOGIT),
        )

    def close(self) -> None:
        """Frees the weights and the cache."""
        self._engine, self._version = None, -1

    def _open(self) -> Engine:
        if self._engine is None:
            raise SamplerError("native engine: it is closed; make a new sampler")
        return self._engine

    def _ready(self) -> Engine:
        engine = self._open()
        if self._version < 0:
            raise SamplerError("native engine: it has no weights yet; call sync first")
        return engine


class _Job:
    """One completion in the making."""

    def __init__(self, prompt_id: int, sample_index: int, stop_text: StopText | None) -> None:
        self.prompt_id, self.sample_index, self._stop_text = prompt_id, sample_index, stop_text
        self.token_ids: list[int] = []
        self.finished = self._stopped = False
        self._logprobs: list[float] = []

    def take(self, chunk: Chunk) -> bool:
        """Takes new tokens, up to the one that completes a stop string; true when the completion is at its end."""
        for token, logprob in zip(chunk.token_ids.tolist(), chunk.logprobs.tolist(), strict=True):
            self.token_ids.append(token)
            self._logprobs.append(logprob)
            if self._stop_text is not None and self._stop_text.push(token):
                self.finished = self._stopped = True
                return True
        self.finished = chunk.finished
        return self.finished

    def completion(self, sampling: Sampling, version: int) -> Completion:
        """The finished completion.

        Raises:
            SamplerError: a log-probability is not finite.
        """
        logprobs = np.array(self._logprobs, np.float32)
        if not np.isfinite(logprobs).all():
            raise SamplerError(
                f"prompt {self.prompt_id}, sample {self.sample_index}: a log-probability is not finite: the logits of "
                f"weight version {version} overflow or are not numbers; look at the training run that made it"
            )
        stopped = self._stopped or self.token_ids[-1] in sampling.stop_ids
        return Completion(
            prompt_id=self.prompt_id,
            sample_index=self.sample_index,
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            weight_version=version,
        )


def checksums(params: Params) -> dict[str, jax.Array]:
    """Of each tensor the sum of its elements' bits, each times an odd number of its own, modulo 2**32.

    It is exact, whatever the order of the summation, and sees an exchange of elements.
    """
    sums = {}
    for path, leaf in flatten(params):
        bits = jax.lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
        weights = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape) * jnp.uint32(2) + jnp.uint32(1)
        mixed = weights * jnp.uint32(0x9E3779B1) ^ (weights >> 15)
        sums["/".join(path)] = (bits.astype(jnp.uint32) * (mixed | jnp.uint32(1))).sum(dtype=jnp.uint32)
    return sums


def _largest_logit(model: FunctionalModel, params: Params, tokens: Int[Array, "1 T"]) -> Float[Array, ""]:
    logits, _ = model(params, tokens)
    return jnp.abs(logits[0, -1].astype(jnp.float32)).max()


def _sequence_logprobs(model: FunctionalModel, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Log-probability of each next token; what stands behind a sequence's last token is rubbish."""
    hidden, _ = model.hidden_states(params, tokens)
    head_fn = partial(output_logits, softcap=model.config.logits_softcap, dtype=jnp.dtype(model.options.logits_dtype))
    stats = token_logprobs(
        head_fn,
        model.head(params),
        hidden,
        jnp.roll(tokens, -1, axis=1),
        chunk_size=default_chunk_size(tokens.size, model.config.vocab_size),
        temperature=1.0,
        with_entropy=False,
    )
    return stats.logprob_BT.astype(jnp.float32)
