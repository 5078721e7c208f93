"""Supervised fine-tuning of reference model R against Tunix's trainer, TRL's, and the machine's matmul peak.

    python -m bench.sft [--steps 4] [--rounds 7] [--skip-trl]

R is the preset bench-r: a Llama of 6.45M parameters, float32, AdamW with clipping. All train the completions of the
same GSM8K examples, tokenised alike by a BPE of 4096 ids trained on them; without that data, of generated problems.
A token counts where it predicts another: padding doesn't, nor does an example's last. Contestants take turns of a few
steps, and a ratio is taken within a round, so that a machine whose speed drifts gives fair ratios; medians are printed.

    peak    2048 x 2048 x 2048 float32 matmuls in JAX
    ours    packed rows, 8 x 512 cells: the session's jitted step, fed by its data pipeline, which reads and tokenises
    tunix   PeftTrainer with its default loss, 8 examples padded to 512; its batches are made beforehand
    trl     SFTTrainer in PyTorch with dynamic padding, in an environment of its own; its tokens are read from a file

The share of the peak takes 6 N floating-point operations a token. Memory is XLA's account of the compiled step at the
vocabulary of Qwen: temporaries, and outputs that don't reuse an argument's memory; with its arguments besides.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.sft_data import (
    LENGTH,
    ROWS,
    Corpus,
    Turn,
    make_corpus,
    make_recipe,
    predicted_tokens,
    read_examples,
    write_labelled,
)
from bench.sft_trl import TrlProcess, Unavailable
from bench.sft_tunix import TunixSteps
from models.config import load_preset
from models.sharding import activation_mesh
from posttrain.data.examples import Example
from posttrain.trainers.sft import prepare_rows
from pretrain.batching import place
from pretrain.data.batch import padding_batch
from pretrain.performance import train_flops_per_token
from pretrain.setup import Setup
from pretrain.state import init_state
from pretrain.trainer import token_work
from recipes.schema import SFTRecipe

LARGE_VOCABULARY = 151_936
PEAK_SIZE = 2048
TARGETS = {"tunix": 5.0, "trl": 1.2, "peak": 0.5, "memory": 3.0}
"""At least: times Tunix's tokens a second, times TRL's, of the peak; and Tunix's memory over ours."""


class OurSteps:
    """What `posttrain sft` repeats: the next batch of the pipeline, and the jitted step on it."""

    def __init__(self, recipe: SFTRecipe) -> None:
        """Builds the run's parts."""
        self.setup: Setup = prepare_rows(recipe)
        self.work = token_work(recipe, self.setup, sequence_length=LENGTH)
        self.key = jax.random.key(1)
        self.proceed = jax.device_put(jnp.asarray(True), self.setup.shardings.state.step)
        self.cells = self.filled = self.trained = 0
        self.state = self.first_state()

    def first_state(self) -> Any:
        """Random weights and the optimizer's first state."""
        return init_state(self.setup.model, self.setup.tx, self.setup.shardings, None, seed=0)

    def take(self, steps: int) -> Turn:
        """Takes steps, each dispatched while the one before may still run, as a session's are."""
        start, tokens = time.perf_counter(), 0
        with activation_mesh(self.setup.mesh, self.setup.rules):
            for _ in range(steps):
                batch = self.work.next_batch()
                tokens += int(np.count_nonzero(batch.inputs_segmentation))
                self.trained += int(np.count_nonzero(batch.targets_segmentation))
                self.state, metrics = self.work.train_step(self.state, batch, self.key, self.proceed)
            jax.block_until_ready((self.state, metrics))
        self.cells, self.filled = self.cells + steps * ROWS * LENGTH, self.filled + tokens
        return time.perf_counter() - start, tokens


def compiled_step(recipe: SFTRecipe) -> Any:
    """Our step compiled for ROWS rows of LENGTH tokens, without taking it and without a state."""
    setup = prepare_rows(recipe)
    work: Any = token_work(recipe, setup, sequence_length=LENGTH)
    batch = place(padding_batch(ROWS, LENGTH), setup.batch_sharding, setup.share)
    with activation_mesh(setup.mesh, setup.rules):
        lowered = work.train_step.lower(setup.abstract, batch, jax.random.key(1), jnp.asarray(True))
    setup.close()
    return lowered.compile()


def peak_turn(square: jax.Array, matmul: Callable[..., jax.Array], count: int) -> float:
    """Floating-point operations a second over `count` square matmuls."""
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(matmul(square, square))
    return count * 2 * PEAK_SIZE**3 / (time.perf_counter() - start)


def step_memory(compiled: Any) -> tuple[int, int]:
    """Bytes that a step needs beyond its arguments, and with them."""
    found = compiled.memory_analysis()
    beyond = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return beyond, beyond + found.argument_size_in_bytes


def compare_memory(corpus: Corpus) -> None:
    """Prints the memory of both steps at the large vocabulary."""
    recipe = make_recipe(corpus, vocab_size=LARGE_VOCABULARY)
    ours = step_memory(compiled_step(recipe))
    tunix = step_memory(
        TunixSteps(load_preset("bench-r").model_copy(update={"vocab_size": LARGE_VOCABULARY})).compiled()
    )
    print(f"\nmemory of the step, {ROWS} x {LENGTH} tokens, V = {LARGE_VOCABULARY:,}, GiB:")
    for name, own, theirs in zip(("beyond its arguments", "with its arguments"), ours, tunix, strict=True):
        print(f"  {name:21s} ours {own / 2**30:6.2f}   tunix {theirs / 2**30:6.2f}   ratio {theirs / own:5.2f}")
    report("tunix's memory over ours, arguments included", tunix[1] / ours[1], TARGETS["memory"], "x")


def report(name: str, value: float, target: float, unit: str) -> None:
    """A figure beside its target."""
    shown, wanted = (f"{value:.1%}", f"{target:.0%}") if unit == "%" else (f"{value:.2f} x", f"{target:g} x")
    print(f"  {name}: {shown} (target: at least {wanted}) {'met' if value >= target else 'MISSED'}")


def start_trl(examples: list[Example], corpus: Corpus, folder: Path, rows: int) -> TrlProcess | None:
    """TRL's process; None, and a line that says so, where it cannot be installed."""
    path = write_labelled(examples, folder / "labelled.jsonl")
    try:
        return TrlProcess(load_preset("bench-r"), examples=path, tokenizer=corpus.tokenizer, rows=rows)
    except Unavailable as reason:
        print(f"TRL: left out, it could not be installed: {reason}")
        return None


def time_rounds(
    contestants: dict[str, Callable[[int], Turn]], *, steps: int, rounds: int
) -> tuple[dict[str, list[Turn]], list[float]]:
    """Turns of every contestant and the peak beside them, round by round, after a turn that compiles and warms up."""
    square, matmul = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32), jax.jit(jnp.matmul)
    peak_turn(square, matmul, 1)
    for take in contestants.values():
        take(max(2, steps))
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    peaks = []
    for _ in range(rounds):
        peaks.append(peak_turn(square, matmul, 5))
        for name, take in contestants.items():
            turns[name].append(take(steps))
    return turns, peaks


def print_table(turns: dict[str, list[Turn]], peaks: list[float], *, steps: int) -> None:
    """Medians, and the medians of ratios within a round, beside their targets."""
    flops = train_flops_per_token(load_preset("bench-r"))
    rates = {name: [tokens / seconds for seconds, tokens in own] for name, own in turns.items()}
    print(f"\npeak: {statistics.median(peaks) / 1e9:.1f} GFLOP/s ({min(peaks) / 1e9:.1f} to {max(peaks) / 1e9:.1f})")
    print(f"{'':6s} {'tokens/s':>9s} {'least':>9s} {'most':>9s} {'s/step':>7s} {'tokens/step':>11s} {'of peak':>8s}")
    for name, own in rates.items():
        seconds, tokens = (statistics.median(turn[part] for turn in turns[name]) / steps for part in (0, 1))
        share = statistics.median(rate * flops / peak for rate, peak in zip(own, peaks, strict=True))
        least, middle, most = min(own), statistics.median(own), max(own)
        print(f"{name:6s} {middle:9.0f} {least:9.0f} {most:9.0f} {seconds:7.3f} {tokens:11.0f} {share:8.1%}")
        if name == "ours":
            our_share = share
    for name, own in rates.items():
        if name != "ours":
            ratios = [mine / theirs for mine, theirs in zip(rates["ours"], own, strict=True)]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            report(f"ours over {name} ({spread})", statistics.median(ratios), TARGETS[name], "x")
    report("ours, share of the peak on real tokens", our_share, TARGETS["peak"], "%")


def main() -> None:
    """Times the contestants in interleaved rounds, compares the memory, and prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps of a contestant's turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trl-rows", type=int, default=8, help="examples in a batch of TRL's")
    for name in ("--skip-trl", "--skip-tunix", "--skip-memory"):
        parser.add_argument(name, action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        recipe = make_recipe(corpus, vocab_size=load_preset("bench-r").vocab_size)
        examples = read_examples(recipe)
        trained = sum(int(example.trained[1:].sum()) for example in examples) / predicted_tokens(examples)
        print(f"data: {corpus.origin}")
        length = predicted_tokens(examples) / len(examples)
        print(f"{len(examples)} examples of {length:.0f} tokens, {trained:.0%} of them trained")
        ours = OurSteps(recipe)
        contestants: dict[str, Callable[[int], Turn]] = {"ours": ours.take}
        if not args.skip_tunix:
            tunix = TunixSteps(load_preset("bench-r"))
            tunix.feed(examples)
            contestants["tunix"] = tunix.take
        trl = None if args.skip_trl else start_trl(examples, corpus, folder, args.trl_rows)
        if trl is not None:
            contestants["trl"] = trl.take
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.rounds} rounds of {args.steps} steps each")
        turns, peaks = time_rounds(contestants, steps=args.steps, rounds=args.rounds)
        print(
            f"packing fills {ours.filled / ours.cells:.1%} of the cells; load after the rounds {os.getloadavg()[0]:.1f}"
        )
        print_table(turns, peaks, steps=args.steps)
        ours.setup.close()
        if trl is not None:
            trl.close()
        if not args.skip_memory:
            compare_memory(corpus)


if __name__ == "__main__":
    main()
