"""vLLM through our protocol against vLLM itself, and a sync against a copy of the same bytes.

    python -m bench.vllm_engine [--rounds 7]

Contestants take turns within a round and a ratio is taken within a round, so that a machine whose speed drifts gives
fair ratios; medians of the rounds are printed. What is timed:

    generate  tokens a second of the protocol and of LLM.generate on one engine: the same 64 requests of 64 tokens each,
              seeds and log-probabilities included, on reference model R (preset bench-r, head dim 32)
    fixed     a sync of R, without and with its proof: what a sync costs where there is little to copy
    sync      a sync of a Llama of 134M parameters, without and with its proof, and NumPy's copy of the same arrays
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel, Params
from models.parameters import count_params
from models.tokenizer import load_tokenizer
from posttrain.samplers import proof
from posttrain.samplers.base import Prompt, Sampling, sample_seed
from posttrain.samplers.vllm import VLLMSampler
from posttrain.samplers.vllm_settings import EngineSettings
from recipes.schema import ModelSection, TokenizerSection

R = load_preset("bench-r")
LARGE = R.replace(
    vocab_size=32_000, embed_dim=768, mlp_dim=2048, num_layers=12, num_heads=12, num_kv_heads=12, head_dim=64
)
PROMPTS, SAMPLES, MAX_TOKENS = 16, 4, 64


def start(config: TransformerConfig, folder: Path) -> tuple[VLLMSampler, Params]:
    """An engine, and weights for it."""
    model = FunctionalModel(config, ModelSection(preset="bench-r"))
    settings = EngineSettings(
        folder=folder,
        max_length=256,
        max_sequences=64,
        cache_gib=0.5,
        memory_share=None,
        eager=True,
        start_seconds=600,
        answer_seconds=600,
    )
    sampler = VLLMSampler(
        model,
        load_tokenizer(TokenizerSection(path="bytes")),
        settings=settings,
        proof_settings=proof.proof_settings("float32", every=1),
    )
    return sampler, jax.block_until_ready(model.init(jax.random.key(0)))


def seconds(work: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rounds_of(rounds: int, contestants: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each contestant in each round, after one round that is not counted; the order turns."""
    times: list[list[float]] = []
    for number in range(rounds + 1):
        row = [0.0] * len(contestants)
        for offset in range(len(contestants)):
            index = (number + offset) % len(contestants)
            row[index] = seconds(contestants[index])
        times.append(row)
    return times[1:]


def plain_vllm(sampler: VLLMSampler, prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """LLM.generate on the engine's own thread, as a user writes it; returns the number of tokens."""
    from vllm import SamplingParams

    llm = sampler._llm
    requests, params = [], []
    for prompt in prompts:
        for index in range(sampling.num_samples):
            requests.append({"prompt_token_ids": list(prompt.token_ids)})
            params.append(
                SamplingParams(
                    max_tokens=sampling.max_tokens,
                    temperature=sampling.temperature,
                    seed=sample_seed(sampling.seed, sampling.step, prompt.prompt_id, index),
                    logprobs=0,
                    ignore_eos=True,
                    detokenize=False,
                )
            )
    outputs = llm.generate(requests, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def bench_generate(sampler: VLLMSampler, rounds: int) -> None:
    """Prints both rates and their ratio."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(tuple(rng.integers(0, R.vocab_size, 32).tolist()), number) for number in range(PROMPTS)]
    sampling = Sampling(max_tokens=MAX_TOKENS, temperature=1.0, num_samples=SAMPLES)
    tokens = PROMPTS * SAMPLES * MAX_TOKENS
    plain = partial(plain_vllm, sampler, prompts, sampling)
    assert plain() == tokens
    ours = partial(sampler.generate, prompts, sampling)
    times = rounds_of(rounds, [ours, lambda: sampler._call(plain, what="sampling as LLM.generate does")])
    rates = [statistics.median(tokens / row[index] for row in times) for index in (0, 1)]
    share = statistics.median(theirs / mine for mine, theirs in times)
    print(f"generate  ours {rates[0]:.0f} tokens/s, LLM.generate {rates[1]:.0f} tokens/s: {share:.3f} of its rate")


def bench_sync(sampler: VLLMSampler, params: Params, rounds: int, label: str) -> None:
    """Prints the seconds of a sync with and without its proof, and of a copy."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    proven, unproven = sampler._proof, replace(sampler._proof, every=0)

    def sync(settings: proof.ProofSettings) -> None:
        sampler._proof = settings
        sampler.sync(params, sampler.weight_version + 1)

    def copy() -> None:
        for array in arrays:
            array.copy()

    times = rounds_of(rounds, [lambda: sync(unproven), lambda: sync(proven), copy])
    medians = [statistics.median(row[index] for row in times) for index in range(3)]
    ratios = [statistics.median(row[index] / row[2] for row in times) for index in (0, 1)]
    size = sum(array.nbytes for array in arrays) / 2**20
    print(
        f"{label:<9} {size:.0f} MiB: sync {medians[0] * 1e3:.0f} ms, with proof {medians[1] * 1e3:.0f} ms, copy "
        f"{medians[2] * 1e3:.0f} ms: {ratios[0]:.2f} and {ratios[1]:.2f} times a copy"
    )


def main() -> None:
    """Runs all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        sampler, params = start(R, Path(folder) / "r")
        with sampler:
            sampler.sync(params, 0)
            bench_generate(sampler, rounds)
            bench_sync(sampler, params, rounds, "fixed")
        sampler, params = start(LARGE, Path(folder) / "large")
        with sampler:
            print(f"          {count_params(LARGE):,} parameters")
            bench_sync(sampler, params, rounds, "sync")


if __name__ == "__main__":
    main()
