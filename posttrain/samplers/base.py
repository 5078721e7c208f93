"""The sampler's protocol: token ids in, token ids with their log-probabilities out, and weights by version.

Nothing is re-tokenised between sampling and training. A completion's log-probabilities are those of the distribution it
was drawn from: at temperature t, of softmax(logits / t); greedy sampling reports the unscaled log-softmax.

Seeds are derived from (seed, step, prompt id, sample index), so a completion does not depend on what else is in the
batch, on its order, or on a restart.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete."""

    token_ids: tuple[int, ...]
    prompt_id: int
    """The caller's number for it; part of the seed, and given back with each completion."""


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    max_tokens: int
    """Bound on a completion's length, stop token included."""
    temperature: float
    """0 is greedy."""
    top_k: int | None = None
    """Sample among the k most probable tokens; None for all."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together have this probability; 1 for all."""
    stop_ids: tuple[int, ...] = ()
    """A completion ends with the first of these, which it keeps."""
    stop_strings: tuple[str, ...] = ()
    """A completion ends once its text holds one of these; the tokens that spelled it are kept."""
    num_samples: int = 1
    """Completions of each prompt."""
    seed: int = 0
    step: int = 0
    """Part of the seed: the training step, so that the same prompt is sampled anew."""


@dataclass(frozen=True)
class Completion:
    """One sampled completion."""

    prompt_id: int
    sample_index: int
    token_ids: np.ndarray
    """int32 [n], n >= 1, the stop token included."""
    logprobs: np.ndarray
    """float32 [n], in nats: log-probability of each token under the sampling distribution."""
    finish_reason: FinishReason
    weight_version: int
    """The version of the weights that sampled all of it."""


class SamplerError(RuntimeError):
    """An engine failed, did not answer in time, or holds other weights than the trainer."""


class Sampler(Protocol):
    """An engine that samples from the policy. It is closed by the one who made it."""

    @property
    def weight_version(self) -> int:
        """The version last synced; -1 before the first sync."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Completes prompts.

        Returns:
            `sampling.num_samples` completions for each prompt, in the prompts' order, samples ascending.

        Raises:
            ValueError: a prompt is empty, too long, or holds ids outside the vocabulary.
            SamplerError: the engine failed or did not answer in time.
        """

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities at temperature 1 of each token after the first, float32 [n - 1] for a sequence of n."""

    def sync(self, params: Any, version: int) -> None:
        """Takes over the trainer's parameters (Linen naming, any sharding), and proves that it did.

        Raises:
            SamplerError: the engine's weights are not the trainer's; the message names the tensor or layer.
        """

    def close(self) -> None:
        """Frees the engine. May be called twice."""


def sample_seed(seed: int, step: int, prompt_id: int, sample_index: int) -> int:
    """The seed of one completion, in [0, 2**31)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{sample_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, *, vocab_size: int, max_length: int) -> None:
    """Checks what every engine refuses.

    Args:
        prompts: as given to `generate`.
        sampling: as given to `generate`.
        vocab_size: ids must be below it.
        max_length: bound on prompt and completion together, in tokens.

    Raises:
        ValueError: naming the prompt, its length or id, and the rule.
    """
    check_sampling(sampling, vocab_size=vocab_size)
    for prompt in prompts:
        where, length = f"prompt {prompt.prompt_id}", len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"{where}: is empty: a completion continues at least one token; give it a BOS token")
        if length + sampling.max_tokens > max_length:
            raise ValueError(
                f"{where}: {length} tokens with up to {sampling.max_tokens} sampled ones: the sampler holds "
                f"{max_length} tokens a sequence; shorten the prompt, lower max_tokens or raise the sampler's length"
            )
        _check_ids(where, prompt.token_ids, vocab_size)


def check_sampling(sampling: Sampling, *, vocab_size: int) -> None:
    """Checks that the settings describe a distribution and an end.

    Raises:
        ValueError: naming the setting, its value and the rule.
    """
    problems = (
        ("max_tokens", sampling.max_tokens >= 1, "a completion has a token at least; set it to 1 or more"),
        ("temperature", 0.0 <= sampling.temperature < math.inf, "it divides the logits; set 0 (greedy) or more"),
        ("top_k", sampling.top_k is None or sampling.top_k >= 1, "one token must remain; set 1 or more, or None"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "it is a probability, and one token must remain; set it in (0, 1]"),
        ("num_samples", sampling.num_samples >= 1, "a prompt gets a completion at least; set it to 1 or more"),
        ("stop_strings", "" not in sampling.stop_strings, "every text holds the empty string; remove it"),
    )
    for name, holds, rule in problems:
        if not holds:
            raise ValueError(f"sampling.{name}={getattr(sampling, name)!r}: {rule}")
    _check_ids("sampling.stop_ids", sampling.stop_ids, vocab_size)


def check_sequences(sequences: Sequence[Sequence[int]], *, vocab_size: int, max_length: int) -> None:
    """Checks what every engine refuses to score.

    Raises:
        ValueError: naming the sequence by its index, its length or id, and the rule.
    """
    for index, sequence in enumerate(sequences):
        where = f"sequence {index}"
        if not 1 <= len(sequence) <= max_length:
            raise ValueError(
                f"{where}: {len(sequence)} tokens: the sampler scores 1 to {max_length} tokens a sequence; drop or "
                "shorten it, or raise the sampler's length"
            )
        _check_ids(where, sequence, vocab_size)


def _check_ids(where: str, ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{where}: token id {wrong}: the vocabulary has ids 0 to {vocab_size - 1}; use its tokenizer")
