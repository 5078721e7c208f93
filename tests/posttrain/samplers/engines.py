"""A real vLLM engine with a small model, and what its samples are held to; shared by the tests of it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel, Params
from models.tokenizer import Tokenizer, load_tokenizer
from posttrain.samplers import proof
from posttrain.samplers.base import Prompt, Sampling
from posttrain.samplers.vllm import VLLMSampler
from posttrain.samplers.vllm_settings import EngineSettings
from recipes.schema import ModelSection, TokenizerSection

LLAMA = load_preset("tiny-llama-rl").replace(num_kv_heads=4)
"""As many key heads as query heads, so that their weights can be mistaken for each other; the head is tied."""
TOLERANCE = 1e-4
MAX_LENGTH = 256


def byte_tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerSection(path="bytes"))


def make_model(config: TransformerConfig, **options: Any) -> FunctionalModel:
    return FunctionalModel(config, ModelSection(preset="tiny-llama-rl", **options))


def make_sampler(model: FunctionalModel, folder: Path) -> VLLMSampler:
    settings = EngineSettings(
        folder=folder,
        max_length=MAX_LENGTH,
        max_sequences=256,
        cache_gib=0.25,
        memory_share=None,
        threads=1,
        eager=True,
        start_seconds=300,
        answer_seconds=120,
    )
    return VLLMSampler(
        model,
        byte_tokenizer(),
        settings=settings,
        proof_settings=proof.proof_settings(model.options.compute_dtype, every=1),
    )


def mixed_prompts(count: int, vocab_size: int, *, longest: int = 150) -> list[Prompt]:
    """Prompts of 1 to `longest` tokens, some longer than a block of the prefix cache."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(1, longest, count).astype(int)
    return [Prompt(tuple(rng.integers(0, vocab_size, n).tolist()), 100 + i) for i, n in enumerate(lengths)]


def weights(model: FunctionalModel, seed: int) -> Params:
    return model.init(jax.random.key(seed))


def assert_greedy_is_the_forward_pass(sampler: VLLMSampler, model: FunctionalModel, params: Params) -> None:
    """Every greedy token is the argmax of a full-context forward pass over all that stands before it."""
    prompts = mixed_prompts(32, model.config.vocab_size)
    completions = sampler.generate(prompts, Sampling(max_tokens=64, temperature=0.0))
    tokens = np.zeros((32, MAX_LENGTH), np.int32)
    for row, prompt, completion in zip(tokens, prompts, completions, strict=True):
        ids = (*prompt.token_ids, *completion.token_ids)
        row[: len(ids)] = ids
    logits = np.asarray(jax.jit(lambda params, tokens: model(params, tokens)[0])(params, tokens))
    for row, prompt, completion in zip(logits, prompts, completions, strict=True):
        start = len(prompt.token_ids) - 1
        assert completion.token_ids.tolist() == row[start : start + 64].argmax(-1).tolist()


def assert_logprobs_follow_five_syncs(sampler: VLLMSampler, model: FunctionalModel, tolerance: float) -> None:
    prompts = mixed_prompts(8, model.config.vocab_size)
    for version in range(1, 6):
        params = weights(model, version)
        sampler.sync(params, version)
        for temperature in (1.0, 0.7, 0.0):
            sampling = Sampling(max_tokens=16, temperature=temperature, num_samples=2, step=version)
            completions = sampler.generate(prompts, sampling)
            worst = proof.check_completions(
                model, params, prompts, completions, sampling=sampling, version=version, tolerance=tolerance
            )
            assert 0 < worst <= tolerance
