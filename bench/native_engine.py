"""The native engine against Tunix's own sampler: tokens a second on 32 prompts whose completions differ in length.

    python -m bench.native_engine [--rounds 7]

The model is R, the preset bench-r (a Llama of 6.45M parameters, float32). Completion lengths are log-normal with median
40, at most 256; each request ends at its length in both, as nothing else ends it. Both sample at temperature 1 and give
log-probabilities. Tunix's sampler has one length for the batch, so it samples up to the longest, and only the tokens
that were asked for count. Each round times both in turn; the ratio is the median of the rounds' ratios. It is given for
the time on the wall and for that of the processor, which other work on the machine disturbs less.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel
from models.inference.engine import Engine, Request
from recipes.schema import ModelSection

NUM_PROMPTS, PROMPT_TOKENS = 32, (8, 64)
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 40, 0.8, 256


def requests(config: TransformerConfig) -> tuple[list[tuple[int, ...]], list[int]]:
    """Prompts, and the length of each completion; no prompt holds Tunix's padding id 0."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_TOKENS), SPREAD, NUM_PROMPTS)).round()
    prompts = [tuple(rng.integers(1, config.vocab_size, n).tolist()) for n in rng.integers(*PROMPT_TOKENS, NUM_PROMPTS)]
    return prompts, [int(length) for length in np.clip(lengths, 1, MOST_TOKENS)]


def ours(config: TransformerConfig, num_slots: int) -> Callable[[int], None]:
    """The native engine with its slots refilled as requests end."""
    model = FunctionalModel(config, ModelSection(preset="bench-r"))
    prompts, lengths = requests(config)
    engine = Engine(model, num_slots=num_slots, max_length=PROMPT_TOKENS[1] + MOST_TOKENS, steps_per_call=32)
    engine.load(model.init(jax.random.key(0)))

    def run(seed: int) -> None:
        engine.begin([])
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            engine.submit(
                Request(prompt, length, temperature=1.0, top_k=None, top_p=1.0, seed=seed * NUM_PROMPTS + index)
            )
        made = 0
        while engine.busy:
            made += sum(len(chunk.token_ids) for chunk in engine.step(engine.steps_per_call))
        assert made == sum(lengths)

    return run


class Words:
    """The tokenizer that Tunix's sampler asks for: prompts are numbers in text."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """Text is not needed, and costs Tunix no time."""
        return ""

    def bos_id(self) -> int:
        """0 is none to Tunix."""
        return 0

    def eos_id(self) -> int:
        """Not used; the call names its own."""
        return 1

    def pad_id(self) -> int:
        """No prompt holds it."""
        return 0


def tunix(config: TransformerConfig) -> Callable[[int], None]:
    """Tunix's sampler on its own Llama of that size, with the smallest cache that holds the batch."""
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import Llama3, ModelConfig

    sizes = ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        hidden_dim=config.mlp_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=10_000,
        norm_eps=config.norm_eps,
    )
    prompts, lengths = requests(config)
    cache = CacheConfig(PROMPT_TOKENS[1] + max(lengths), config.num_layers, config.num_kv_heads, config.head_dim)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        sampler = Sampler(Llama3(sizes, rngs=nnx.Rngs(0)), Words(), cache)

    def run(seed: int) -> None:
        with mesh:
            output = sampler(
                [" ".join(map(str, prompt)) for prompt in prompts],
                max_generation_steps=max(lengths),
                max_prompt_length=PROMPT_TOKENS[1],
                temperature=1.0,
                top_p=1.0,
                seed=seed,
                return_logprobs=True,
                # An id past the vocabulary, so that only the length ends a completion.
                eos_tokens=[config.vocab_size],
            )
        assert all(len(tokens) == max(lengths) for tokens in output.tokens)

    return run


def main() -> None:
    """Times both in interleaved rounds and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    config = load_preset("bench-r")
    contestants = {"ours": ours(config, args.slots), "tunix": tunix(config)}
    tokens = sum(requests(config)[1])
    for run in contestants.values():
        run(0)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[tuple[str, str], list[float]] = {(clock, name): [] for clock in clocks for name in contestants}
    for seed in range(1, args.rounds + 1):
        for name, run in contestants.items():
            starts = {clock: read() for clock, read in clocks.items()}
            run(seed)
            for clock, read in clocks.items():
                seconds[clock, name].append(read() - starts[clock])
    for clock in clocks:
        for name in contestants:
            median = statistics.median(seconds[clock, name])
            print(f"{clock:9s} {name:6s} median {median:6.3f} s  {tokens / median:7.0f} tokens/s")
        ratios = [b / a for a, b in zip(seconds[clock, "ours"], seconds[clock, "tunix"], strict=True)]
        middle = statistics.median(ratios)
        print(f"{clock:9s} ours makes {middle:.2f} x tunix's tokens/s ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
