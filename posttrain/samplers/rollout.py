"""Tunix's rollout on any engine of ours: `functools.partial(SamplerRollout, sampler=..., ...)` as `rollout_engine`.

Tunix passes prompts as strings and would encode them. Here a string is a key, by which the prompt's token ids are
looked up, so what is trained on is what was sampled from. Tunix repeats a key for each completion that it wants; the
repeats are a prompt's samples 0, 1, 2, ... of the step, and each has its own seed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from posttrain.samplers.base import Completion, Prompt, Sampler, Sampling

KEY = "prompt "


@dataclass
class PromptBook:
    """The prompts of a step by key."""

    seed: int
    """Of the run; part of each completion's seed."""
    stop_ids: tuple[int, ...]
    """What ends a completion, unless Tunix's configuration names other tokens."""
    step: int = 0
    _prompts: dict[str, Prompt] = field(default_factory=dict)
    _drawn: Counter[str] = field(default_factory=Counter)

    def begin_step(self, step: int) -> None:
        """Forgets the prompts of the step before, and counts samples from 0 again."""
        self.step = step
        self._prompts.clear()
        self._drawn.clear()

    def add(self, prompt: Prompt) -> str:
        """Takes a prompt of the step; returns the key to give to Tunix."""
        key = f"{KEY}{prompt.prompt_id}"
        known = self._prompts.setdefault(key, prompt)
        if known != prompt:
            raise ValueError(
                f"{key}: step {self.step} has another prompt of this id; give each prompt an id of its own"
            )
        return key

    def __getitem__(self, key: str) -> Prompt:
        prompt = self._prompts.get(key)
        if prompt is None:
            raise ValueError(
                f"rollout: {key[:60]!r}: no key of step {self.step}: prompts reach the sampler as ids, never as text; "
                "add() each prompt and give Tunix the key"
            )
        return prompt

    def draw(self, key: str, count: int) -> int:
        """Notes that `count` more samples of a prompt are wanted; returns how many there were before."""
        before = self._drawn[key]
        self._drawn[key] += count
        return before


class SamplerRollout(BaseRollout):
    """A `BaseRollout` over a `Sampler`."""

    def __init__(
        self,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        rollout_config: RolloutConfig,
        *,
        sampler: Sampler,
        sync: Callable[[], None],
        prompts: PromptBook | None = None,
    ) -> None:
        """The first four arguments are Tunix's.

        Args:
            rollout_actor: the policy as Tunix knows it; not read.
            tokenizer: Tunix's adapter of the tokenizer.
            mesh: the policy's; engines have their own.
            rollout_config: of training; truncated sampling is refused there.
            sampler: the engine; closed by whoever made it.
            sync: hands the whole policy to the engine, adapters merged. What Tunix passes under LoRA is adapters alone.
            prompts: where keys are looked up; None for a run that samples without Tunix.
        """
        check_training_config(rollout_config)
        self._tokenizer = tokenizer
        self._sampler, self._sync, self._prompts = sampler, sync, prompts
        self._logprobs: dict[bytes, list[Completion]] = {}

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """Completes prompts.

        Args:
            prompts: keys of the prompt book.
            rollout_config: temperature, truncation, lengths, and eos_tokens where they replace the book's stop ids.
            **kwargs: refused, as no engine here takes more.

        Returns:
            Completions in the order of the keys: text, token ids without padding, their log-probabilities, and the
            prompts [B, max_prompt_length] padded on the left.
        """
        assert not kwargs, kwargs
        assert self._prompts is not None, "this rollout was made without a prompt book"
        sampling = sampling_of(rollout_config, self._prompts)
        samples = self._sample(prompts, sampling)
        completions = [samples[key].pop(0) for key in prompts]
        padded = self._left_padded([self._prompts[key].token_ids for key in prompts], rollout_config.max_prompt_length)
        self._logprobs = {}
        for row, completion in zip(padded, completions, strict=True):
            self._logprobs.setdefault(row.tobytes(), []).append(completion)
        return RolloutOutput(
            text=[self._tokenizer.decode(completion.token_ids.tolist()) for completion in completions],
            logits=None,
            tokens=[completion.token_ids for completion in completions],
            left_padded_prompt_tokens=padded,
            logprobs=[completion.logprobs for completion in completions],
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """The log-probabilities that the last call of `generate` gave, float32 [B, T], 0 behind a completion's end.

        Args:
            prompt_tokens: [B, max_prompt_length] as returned.
            completion_tokens: [B, T], padded on the right.

        Raises:
            ValueError: a row was not sampled by the last call.
        """
        rows, padded = np.asarray(completion_tokens), np.asarray(prompt_tokens).astype(np.int32)
        logprobs = np.zeros(rows.shape, np.float32)
        for index, (row, prompt) in enumerate(zip(rows, padded, strict=True)):
            for completion in self._logprobs.get(prompt.tobytes(), []):
                length = len(completion.token_ids)
                if np.array_equal(row[:length], completion.token_ids) and (row[length:] == self.pad_id()).all():
                    logprobs[index, :length] = completion.logprobs
                    break
            else:
                raise ValueError(
                    f"rollout: row {index}: these tokens were not sampled by the last call: their log-probabilities "
                    "are not known; score them with the policy"
                )
        return jax.numpy.asarray(logprobs)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Hands the policy to the engine; `params` is not read, as it may be adapters alone."""
        del params, filter_types
        self._sync()

    def pad_id(self) -> int:
        """The tokenizer's."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """The tokenizer's."""
        return self._tokenizer.eos_id()

    def model(self) -> None:
        """None: the engine's weights are its own, and Tunix syncs what it does not see shared."""
        return None

    def _sample(self, keys: Sequence[str], sampling: Sampling) -> dict[str, list[Completion]]:
        """As many new completions of each key as it occurs, all that start at the same sample index in one call."""
        assert self._prompts is not None
        alike: dict[tuple[int, int], list[str]] = {}
        for key, count in Counter(keys).items():
            self._prompts[key]
            alike.setdefault((self._prompts.draw(key, count), count), []).append(key)
        samples: dict[str, list[Completion]] = {}
        for (before, count), group in alike.items():
            total = before + count
            wanted = replace(sampling, num_samples=total)
            found = self._sampler.generate([self._prompts[key] for key in group], wanted)
            for number, key in enumerate(group):
                samples[key] = found[number * total + before : (number + 1) * total]
        return samples

    def _left_padded(self, prompts: Sequence[Sequence[int]], length: int) -> np.ndarray:
        padded = np.full((len(prompts), length), self.pad_id(), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            if len(prompt) > length:
                raise ValueError(
                    f"rollout: max_prompt_length={length}: a prompt has {len(prompt)} tokens, and is never cut; raise "
                    "it, or filter the prompts"
                )
            row[length - len(prompt) :] = prompt
        return padded


def sampling_of(config: RolloutConfig, prompts: PromptBook) -> Sampling:
    """Tunix's configuration as ours; seeds come from the prompt book."""
    return Sampling(
        max_tokens=config.max_tokens_to_generate,
        temperature=config.temperature,
        top_k=None if config.top_k in (None, -1, 0) else config.top_k,
        top_p=1.0 if config.top_p is None else config.top_p,
        stop_ids=tuple(config.eos_tokens) if config.eos_tokens is not None else prompts.stop_ids,
        seed=prompts.seed,
        step=prompts.step,
    )


def check_training_config(config: RolloutConfig) -> None:
    """Refuses truncated sampling in training.

    The sampler's log-probabilities would be those of the truncated distribution, the trainer's are of the whole one,
    and the ratio of the two would be biased.
    """
    if config.top_k not in (None, -1, 0) or config.top_p not in (None, 1.0):
        raise ValueError(
            f"rollout: top_k={config.top_k}, top_p={config.top_p}: training on truncated samples biases the importance "
            "ratio, for the trainer's probabilities are of the whole vocabulary; sample without truncation"
        )
