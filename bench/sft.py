"""Supervised fine-tuning of reference model R against Tunix's trainer, TRL's, and the machine's matmul peak.

    python -m bench.sft [--steps 4] [--rounds 7] [--skip-trl]

R is the preset bench-r: a Llama of 6.45M parameters, float32, AdamW with clipping. All train the completions of the
same GSM8K examples, tokenised alike by a BPE of 4096 ids trained on them; without that data, of generated problems.
A token counts where it predicts another: padding doesn't, nor does an example's last. Contestants take turns of a few
steps, and a ratio is taken within a round, so that a machine whose speed drifts gives fair ratios; medians are printed.
Where other work shares the machine, pin the bench to one core (`taskset -c 0 python -m bench.sft`): PyTorch's threads
wait for each other, so a core that is taken away costs them far more than its share.

    peak    2048 x 2048 x 2048 float32 matmuls in JAX
    ours    packed rows, 8 x 512 cells: the session's jitted step, fed by its data pipeline, which reads and tokenises
    tunix   PeftTrainer with its default loss, 8 examples padded to 512; its batches are made beforehand
    trl     SFTTrainer in PyTorch with dynamic padding, in an environment of its own; its tokens are read from a file

The share of the peak takes 6 N floating-point operations a token. Memory is XLA's account of the compiled step at the
vocabulary of Qwen: temporaries, and outputs that don't reuse an argument's memory; with its arguments besides.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
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
PEAK_SIZE, PEAK_MATMULS = 2048, 5
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


def timed_on_processor(take: Callable[[], Turn]) -> tuple[Turn, float]:
    """A turn, and the seconds that this process spent on processors for it, over all threads."""
    start = time.process_time()
    return take(), time.process_time() - start


def peak_turn(square: jax.Array, matmul: Callable[..., jax.Array], count: int) -> Turn:
    """Seconds of `count` square matmuls, and their floating-point operations."""
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(matmul(square, square))
    return time.perf_counter() - start, count * 2 * PEAK_SIZE**3


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


@dataclass(frozen=True)
class Rounds:
    """What was measured, round by round."""

    rates: dict[str, list[float]]
    """Tokens a second of each contestant; of `peak`, floating-point operations a second."""
    processor_rates: dict[str, list[float]]
    """The same a second of this process on a processor, which other work on the machine doesn't lengthen."""
    steps: dict[str, list[Turn]]
    """Seconds and tokens of a step."""


def time_rounds(contestants: dict[str, Callable[[int], Turn]], *, steps: int, rounds: int) -> Rounds:
    """Takes turns, after one that compiles and warms up; the peak is taken before and behind our own turn."""
    square, matmul = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32), jax.jit(jnp.matmul)
    peak_turn(square, matmul, 1)
    for take in contestants.values():
        take(max(2, steps))
    names = ("peak", *contestants)
    found = Rounds({name: [] for name in names}, {name: [] for name in names}, {name: [] for name in names})
    for _ in range(rounds):
        peaks = []
        for name, take in contestants.items():
            if name == "ours":
                peaks.append(timed_on_processor(partial(peak_turn, square, matmul, PEAK_MATMULS)))
            (seconds, tokens), processor = timed_on_processor(partial(take, steps))
            found.rates[name].append(tokens / seconds)
            found.processor_rates[name].append(tokens / max(processor, 1e-9))
            found.steps[name].append((seconds / steps, tokens // steps))
            if name == "ours":
                peaks.append(timed_on_processor(partial(peak_turn, square, matmul, PEAK_MATMULS)))
        work = sum(turn[1] for turn, _ in peaks)
        found.rates["peak"].append(work / sum(turn[0] for turn, _ in peaks))
        found.processor_rates["peak"].append(work / sum(processor for _, processor in peaks))
    return found


def print_table(found: Rounds) -> None:
    """Medians, and the medians of ratios within a round, beside their targets."""
    flops = train_flops_per_token(load_preset("bench-r"))
    peaks = found.rates["peak"]
    print(f"\npeak: {median(peaks) / 1e9:.1f} GFLOP/s ({min(peaks) / 1e9:.1f} to {max(peaks) / 1e9:.1f})")
    print(f"{'':6s} {'tokens/s':>9s} {'least':>9s} {'most':>9s} {'s/step':>7s} {'tokens/step':>11s} {'of peak':>8s}")
    for name, own in found.rates.items():
        if name != "peak":
            seconds, tokens = (median(step[part] for step in found.steps[name]) for part in (0, 1))
            print(
                f"{name:6s} {median(own):9.0f} {min(own):9.0f} {max(own):9.0f} {seconds:7.3f} {tokens:11.0f} "
                f"{median(ratios(own, peaks)) * flops:8.1%}"
            )
    for name, own in found.rates.items():
        if name not in ("ours", "peak"):
            over = ratios(found.rates["ours"], own)
            report(f"ours over {name} ({min(over):.2f} to {max(over):.2f})", median(over), TARGETS[name], "x")
    report("ours, of the peak", median(ratios(found.rates["ours"], peaks)) * flops, TARGETS["peak"], "%")
    print("by this process's time on processors, which other work on the machine doesn't lengthen:")
    processor = found.processor_rates
    if "tunix" in processor:
        report("ours over tunix", median(ratios(processor["ours"], processor["tunix"])), TARGETS["tunix"], "x")
    report("ours, of the peak", median(ratios(processor["ours"], processor["peak"])) * flops, TARGETS["peak"], "%")


def ratios(mine: list[float], theirs: list[float]) -> list[float]:
    """Quotients within a round."""
    return [own / other for own, other in zip(mine, theirs, strict=True)]


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
        found = time_rounds(contestants, steps=args.steps, rounds=args.rounds)
        print(
            f"packing fills {ours.filled / ours.cells:.1%} of the cells; load after the rounds {os.getloadavg()[0]:.1f}"
        )
        print_table(found)
        ours.setup.close()
        if trl is not None:
            trl.close()
        if not args.skip_memory:
            compare_memory(corpus)


if __name__ == "__main__":
    main()
