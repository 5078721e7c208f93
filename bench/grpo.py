"""A step of GRPO on reference model R: ours on both engines against TRL's GRPOTrainer and Tunix's GRPOLearner.

    python -m bench.grpo [--workload mixed|equal|both] [--rounds 5] [--skip-trl]

R is the preset bench-r: a Llama of 6.45M parameters, float32, AdamW with clipping, beta 0.04, so with a reference. A
step samples eight completions for each of four prompts (questions of GSM8K, 41 to 75 tokens), the same in each step.
Prompts may have 128 tokens (95 % of GSM8K's have fewer). Two workloads:

    mixed   lengths are the quantiles of a log-normal with median 40 and sigma 0.8, 7 to 224 tokens; they may have 256
    equal   every completion has 128 tokens, and may have no more

Everyone's completions have the same lengths, and each is told so in the way that costs it least. Ours: a bound on each
completion's tokens. TRL and Tunix: the end token is impossible before a completion's last place and certain there, so
that they see completions that ended by themselves, stop sampling after the longest, and mask what they padded. The
reward is a length of text for all.

    ours    `posttrain grpo` as it runs, on the native engine and on vLLM: a proof of each sync, the ledger, the log.
            Layers are unrolled, and rows are as long as one group of completions, or two
    trl     GRPOTrainer with transformers' generation, in an environment of its own; all 32 in one batch, padded to
            the longest prompt and completion
    tunix   GRPOLearner with its own sampler on its own Llama; all 32 in one batch, padded to the limits. Its sampler
            reads the trainer's weights, so nothing is synced

Each has a process that computes only in its turn. A ratio is taken within a round, so that a machine whose speed drifts
gives fair ratios; medians are printed. The peak is that of 2048 x 2048 x 2048 float32 matmuls in JAX, measured before
and behind our turns. An update's share of it takes 6 N floating-point operations for each real token of its rows, as
bench.sft does: padding is left out, and a prompt that a group shares counts once. The second share counts it for each
completion, as if rows held it so often; that is the speed at which others would have to compute.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from bench.grpo_data import BETA, GROUP, REWARD_CHARACTERS, Workload, make_workload
from bench.sft import PEAK_MATMULS, PEAK_SIZE, peak_turn, ratios, report
from bench.sft_data import LEARNING_RATE
from bench.sft_trl import OFFLINE, Unavailable, llama_sizes, trl_python
from bench.turns import TurnProcess
from models.config import load_preset
from pretrain.performance import train_flops_per_token

ENGINES = ("native", "vllm")
PHASES = ("rollout", "reference", "reward", "update", "sync", "other")
TARGETS = {"mixed": {"trl": 2.2, "tunix": 4.0}, "equal": {"trl": 1.2, "tunix": 2.0}}
"""At least: times as fast as."""
UPDATE_SHARE, OTHER_SHARE = 0.45, 0.05
WARMUP_STEPS = 2


@dataclass(frozen=True)
class Step:
    """One step of a contestant."""

    seconds: float
    processor: float
    """Seconds that the process spent on processors, over all threads."""
    split: dict[str, float]
    """Seconds by phase; what is in none of them is `other`."""
    rows: float | None = None
    fill: float | None = None
    """The part of the rows' cells that holds tokens."""

    @property
    def phases(self) -> dict[str, float]:
        """The split, with the rest."""
        return {**self.split, "other": self.seconds - sum(self.split.values())}


def worker(module: str, *arguments: str) -> list[str]:
    """The command that runs the `main` of a module in a process of this environment."""
    return [sys.executable, "-c", f"from {module} import main; main()", *arguments]


def trl_process(workload: Workload, path: Path) -> TurnProcess | None:
    """TRL's process; None, and a line that says so, where it cannot be installed."""
    settings = {
        "rows": workload.completions,
        "group": GROUP,
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "characters": REWARD_CHARACTERS,
    }
    try:
        command = [str(trl_python()), "-c", "from bench.grpo_trl_worker import main; main()"]
    except Unavailable as reason:
        print(f"TRL: left out, it could not be installed: {reason}")
        return None
    arguments = {
        "workload": str(path),
        "sizes": json.dumps(llama_sizes(load_preset("bench-r"))),
        "output": tempfile.mkdtemp(dir=workload.folder),
        "settings": json.dumps(settings),
    }
    return TurnProcess(
        [*command, *(part for name, value in arguments.items() for part in (f"--{name}", value))], OFFLINE
    )


def start(workload: Workload, args: argparse.Namespace) -> dict[str, TurnProcess]:
    """The contestants that were not left out."""
    path = workload.write()
    processes: dict[str, TurnProcess] = {}
    for engine in ENGINES:
        if engine not in args.skip:
            arguments = ("--workload", str(path), "--engine", engine, *args.overrides)
            processes[f"ours {engine}"] = TurnProcess(worker("bench.grpo_ours", *arguments), {})
    if "tunix" not in args.skip:
        processes["tunix"] = TurnProcess(worker("bench.grpo_tunix", "--workload", str(path)), {})
    if "trl" not in args.skip:
        trl = trl_process(workload, path)
        if trl is not None:
            processes["trl"] = trl
    return processes


def peak_rate(square: jax.Array, matmul: Any) -> float:
    """Floating-point operations a second."""
    seconds, work = peak_turn(square, matmul, PEAK_MATMULS)
    return work / seconds


def time_rounds(processes: dict[str, TurnProcess], rounds: int) -> tuple[dict[str, list[Step]], dict[str, list[float]]]:
    """Steps of each contestant by round, and the peak around each of our turns."""
    square, matmul = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32), jax.jit(jnp.matmul)
    peak_turn(square, matmul, 1)
    for name, process in processes.items():
        first = [one["seconds"] for one in process.take(WARMUP_STEPS)]
        print(f"{name}: warmed up, {', '.join(f'{seconds:.1f}' for seconds in first)} s", flush=True)
    steps: dict[str, list[Step]] = {name: [] for name in processes}
    peaks: dict[str, list[float]] = {name: [] for name in processes if name.startswith("ours")}
    for number in range(rounds):
        for name, process in processes.items():
            before = peak_rate(square, matmul) if name in peaks else 0.0
            steps[name].append(Step(**process.take(1)[0]))
            if name in peaks:
                peaks[name].append((before + peak_rate(square, matmul)) / 2)
        shown = ", ".join(f"{name} {own[-1].seconds:.2f}" for name, own in steps.items())
        print(f"round {number + 1}: {shown} s; load {os.getloadavg()[0]:.1f}", flush=True)
    return steps, peaks


def print_steps(steps: dict[str, list[Step]]) -> None:
    """Medians by contestant and phase."""
    print(f"\n{'seconds':12s} {'step':>7s} {'least':>7s} {'most':>7s}" + "".join(f" {name:>9s}" for name in PHASES))
    for name, own in steps.items():
        totals = [step.seconds for step in own]
        line = f"{name:12s} {median(totals):7.2f} {min(totals):7.2f} {max(totals):7.2f}"
        for phase in PHASES:
            values = [step.phases[phase] for step in own if phase in step.phases]
            line += f" {median(values):9.3f}" if values else f" {'':9s}"
        print(line)
    print("TRL's and Tunix's `other` is their update and all else.")


def print_shares(workload: Workload, steps: dict[str, list[Step]], peaks: dict[str, list[float]]) -> None:
    """What of our step is `other`, and how near to the peak its update is."""
    flops = train_flops_per_token(load_preset("bench-r"))
    for name, own in peaks.items():
        mine = steps[name]
        rows, fill = mine[-1].rows, mine[-1].fill
        print(f"{name}: {rows:.0f} rows, {fill:.1%} filled; peak {median(own) / 1e9:.0f} GFLOP/s")
        share = median(step.phases["other"] / step.seconds for step in mine)
        verdict = "met" if share < OTHER_SHARE else "MISSED"
        print(f"  {name}: other is {share:.1%} of the step (target: below {OTHER_SHARE:.0%}) {verdict}")
        reached = median(ratios([flops / step.split["update"] for step in mine], own))
        report(f"{name}, update, of the peak", reached * workload.distinct, UPDATE_SHARE, "%")
        print(f"  {name}, the same with a prompt for each completion: {reached * workload.predicted:.1%}")


def bench(workload: Workload, args: argparse.Namespace) -> None:
    """Times one workload and prints what came out."""
    print(
        f"\n== {workload.name}: {workload.sampled} tokens sampled, {workload.predicted} trained or attended to a step"
    )
    processes = start(workload, args)
    try:
        steps, peaks = time_rounds(processes, args.rounds)
    finally:
        for process in processes.values():
            process.close()
    print_steps(steps)
    print_shares(workload, steps, peaks)
    for ours in peaks:
        for other, target in TARGETS[workload.name].items():
            if other in steps:
                over = ratios([step.seconds for step in steps[other]], [step.seconds for step in steps[ours]])
                report(f"{ours} over {other} ({min(over):.2f} to {max(over):.2f})", median(over), target, "x")
                busy = ratios([step.processor for step in steps[other]], [step.processor for step in steps[ours]])
                print(f"    in seconds on processors, which other work doesn't lengthen: {median(busy):.2f} x")


def main() -> None:
    """Times the contestants in interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("mixed", "equal", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    for name in ("trl", "tunix", *ENGINES):
        parser.add_argument(f"--skip-{name}", dest="skip", action="append_const", const=name, default=[])
    parser.add_argument("overrides", nargs="*", help="key=value for our recipe")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.rounds} rounds of one step each")
    for name in ("mixed", "equal") if args.workload == "both" else (args.workload,):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            bench(make_workload(name, Path(folder)), args)


if __name__ == "__main__":
    main()
