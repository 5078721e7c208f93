"""The sampler's protocol: token ids in, token ids with their log-probabilities out, and weights by version.

Nothing is re-tokenised between sampling and training. A completion's log-probabilities are those of the distribution it
was drawn from: at temperature t, of softmax(logits / t); greedy sampling reports the unscaled log-softmax.

Seeds are derived from (seed, step, prompt id, sample index), so a completion does not depend on what else is in the
batch, on its order, or on a restart.
"""

import hashlib
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
    for prompt in prompts:
        where, length = f"prompt {prompt.prompt_id}", len(prompt.token_ids)
        if length == 0:
            raise ValueError(f"{where}: is empty: a completion continues at least one token; give it a BOS token")
        if length + sampling.max_tokens > max_length:
            raise ValueError(
                f"{where}: {length} tokens with up to {sampling.max_tokens} sampled ones: the sampler holds "
                f"{max_length} tokens a sequence; shorten the prompt, lower max_tokens or raise the sampler's length"
            )
        worst = max(prompt.token_ids, key=lambda token: token if token >= 0 else vocab_size - token)
        if not 0 <= worst < vocab_size:
            raise ValueError(
                f"{where}: token id {worst}: the vocabulary has ids 0 to {vocab_size - 1}; use its tokenizer"
            )
