"""How many held-out problems a policy solves: greedy, and over several samples, with 95 % confidence intervals."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.tokenizer import Tokenizer
from posttrain.data.problems import TAGS
from posttrain.data.prompts import PromptRow
from posttrain.rollouts import Judge, sample
from posttrain.samplers.base import Sampler, Sampling
from posttrain.statistics import Estimate, avg_at_k, estimate_mean, estimate_proportion, maj_at_k, pass_at_k
from recipes.metrics import read_metrics
from recipes.rundir import Run, metrics_path, read_attempts, record_fact, write_atomically
from rewards.extraction import final_answer
from rewards.normalization import canonical

NUM_RESAMPLES = 2000
EVALUATION_STEP = 2**30
"""The step that seeds of evaluation derive from: another than any of training, and the same in every evaluation."""

FACT = "evaluation"
"""The entry of an attempt's record that says which evaluation it makes."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    estimates: dict[str, Estimate]
    """By name: `greedy`, `avg@k`, `pass@k`, `maj@k`."""
    problems: list[dict[str, Any]]
    """One record a problem: question, answer, completions, how each ended, and whether it is correct or its reward
    failed."""
    seconds: float

    def failures(self) -> list[str]:
        """Of each completion whose reward gave no value, why; it counts as wrong."""
        return [why for why in self._of_completions("greedy_failure", "sampled_failures") if why is not None]

    def finishes(self) -> list[str]:
        """Of each completion, how it ended."""
        return self._of_completions("greedy_finish", "sampled_finish")

    def _of_completions(self, greedy: str, sampled: str) -> list[Any]:
        return [one for record in self.problems for one in (record[greedy], *record.get(sampled, ()))]

    def counts(self) -> dict[str, float]:
        """How many completions there are and how many rewards failed, and the share that was truncated."""
        finishes = self.finishes()
        truncated = sum(one == "length" for one in finishes) / max(len(finishes), 1)
        return {"completions": len(finishes), "failures": len(self.failures()), "truncated": truncated}

    def metrics(self) -> dict[str, float]:
        """Under the names of the log: `evaluation/<name>`, with `_low` and `_high`; of the counts no bounds."""
        row: dict[str, float] = {}
        for name, estimate in self.estimates.items():
            row |= {
                f"evaluation/{name}": estimate.value,
                f"evaluation/{name}_low": estimate.low,
                f"evaluation/{name}_high": estimate.high,
            }
        counts = {f"evaluation/{name}": float(count) for name, count in self.counts().items()}
        return row | counts | {"evaluation/seconds": self.seconds}

    def table(self) -> str:
        """The estimates as lines of text; and a line where rewards failed, and where completions were truncated."""
        width = max(map(len, self.estimates))
        lines = [
            f"  {name:<{width}}  {100 * one.value:5.1f} %   [{100 * one.low:.1f}, {100 * one.high:.1f}]   "
            f"of {one.num_problems} problems"
            for name, one in self.estimates.items()
        ]
        failures, finishes = self.failures(), self.finishes()
        if failures:
            lines.append(
                f"  {len(failures)} of {len(finishes)} completions count as wrong because their reward failed, as by "
                f"{failures[0]}"
            )
        if truncated := sum(one == "length" for one in finishes):
            lines.append(f"  {truncated} of {len(finishes)} completions ran to the longest length allowed")
        return "\n".join(lines)

    def write(self, folder: Path, name: str) -> None:
        """Writes `<name>.json` with the estimates and counts, and `<name>.jsonl` with the problems."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {key: asdict(one) for key, one in self.estimates.items()} | self.counts()
        write_atomically(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
        write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in self.problems))


@dataclass(frozen=True)
class Evaluator:
    """Held-out problems, and how often each is tried."""

    rows: Sequence[PromptRow]
    tokenizer: Tokenizer
    judge: Judge
    correct: str
    """The reward that says whether a completion is right: it is where its value is the largest it can give."""
    max_tokens: int
    num_samples: int
    temperature: float
    seed: int

    def names(self) -> tuple[str, ...]:
        """Of the estimates, in their order."""
        k = self.num_samples
        several = (f"pass@{k}", f"maj@{k}") if k > 1 else ()
        return ("greedy", *((f"avg@{k}", *several) if k else ()))

    def identity(self) -> str:
        """A hash of what is asked and how, the rewards' own settings left out: those do not change within a run."""
        asked = [(row.prompt_id, row.token_ids, row.answer) for row in self.rows]
        how = (self.correct, self.max_tokens, self.num_samples, self.temperature, self.seed)
        return hashlib.sha256(json.dumps([asked, how]).encode()).hexdigest()

    def is_known(self, attempt: Run, step: int) -> bool:
        """Whether the run's metrics have this evaluation's after so many steps, from this attempt or one before it.

        Every attempt notes the evaluation that it makes (`note`). One that noted none, as earlier versions did not, is
        known by the names of its metrics alone.
        """
        names = {f"evaluation/{name}" for name in self.names()}
        noted = {one["attempt"]: one.get(FACT) for one in read_attempts(attempt.dir)}
        rows = read_metrics(metrics_path(attempt.dir))
        return any(
            row["step"] == step and names <= row.keys() and noted.get(row["attempt"]) in (None, self.identity())
            for row in rows
        )

    def note(self, attempt: Run) -> None:
        """Notes in the attempt's record which evaluation it makes."""
        record_fact(attempt, FACT, self.identity())

    def __call__(self, sampler: Sampler) -> Report:
        """Evaluates the weights that the sampler holds.

        Raises:
            SamplerError: the engine failed.
        """
        start = time.perf_counter()
        greedy = self._tried(sampler, num_samples=1, temperature=0.0)
        figures = [estimate_proportion(int(greedy.correct.sum()), len(self.rows))]
        sampled = None
        if self.num_samples:
            sampled = self._tried(sampler, num_samples=self.num_samples, temperature=self.temperature)
            figures += self._estimates(sampled)
        estimates = dict(zip(self.names(), figures, strict=True))
        return Report(estimates, self._records(greedy, sampled), time.perf_counter() - start)

    def _tried(self, sampler: Sampler, *, num_samples: int, temperature: float) -> "_Tried":
        sampling = Sampling(
            max_tokens=self.max_tokens,
            temperature=temperature,
            stop_ids=tuple(sorted(self.tokenizer.stop_ids)),
            num_samples=num_samples,
            seed=self.seed,
            step=EVALUATION_STEP,
        )
        rows = list(self.rows)
        judged = self.judge(rows, sample(sampler, rows, sampling), self.tokenizer)
        place = [info.name for info in self.judge.infos].index(self.correct)
        highest = self.judge.infos[place].high
        said = [outcomes[place] for outcomes in judged.outcomes]
        # A reward that failed does not say that the answer is right.
        correct = np.array([one.value is not None and one.value >= highest for one in said])
        return _Tried(
            judged.texts,
            correct.reshape(len(rows), num_samples),
            [None if one.failure is None else f"{one.reward}: {one.failure}: {one.detail}" for one in said],
            [one.finish_reason for one in judged.completions],
            num_samples,
        )

    def _estimates(self, tried: "_Tried") -> list[Estimate]:
        """avg@k, and for several samples pass@k and maj@k.

        All go by which samples are correct. For maj@k they vote with their final answers, canonically spelled; a
        correct one whose final answer is not found, since its reward looks elsewhere, votes with the gold answer.
        """
        k = self.num_samples
        figures = [avg_at_k(tried.correct)]
        if k > 1:
            pairs = list(zip(self.rows, tried.correct.tolist(), strict=True))
            votes = [_votes(tried.of(i, tried.texts), correct, row.answer) for i, (row, correct) in enumerate(pairs)]
            figures.append(np.array([pass_at_k(k, sum(correct), k) for _, correct in pairs]))
            figures.append(
                np.array([maj_at_k(one, correct, k) for one, (_, correct) in zip(votes, pairs, strict=True)])
            )
        return [
            estimate_mean(values.astype(np.float64), seed=self.seed, num_resamples=NUM_RESAMPLES) for values in figures
        ]

    def _records(self, greedy: "_Tried", sampled: "_Tried | None") -> list[dict[str, Any]]:
        records = []
        for i, row in enumerate(self.rows):
            record = {
                "prompt_id": row.prompt_id,
                "question": row.question,
                "answer": row.answer,
                "greedy": greedy.texts[i],
                "greedy_correct": bool(greedy.correct[i, 0]),
                "greedy_failure": greedy.failures[i],
                "greedy_finish": greedy.finishes[i],
            }
            if sampled is not None:
                record |= {
                    "sampled": sampled.of(i, sampled.texts),
                    "sampled_correct": sampled.correct[i].tolist(),
                    "sampled_failures": sampled.of(i, sampled.failures),
                    "sampled_finish": sampled.of(i, sampled.finishes),
                }
            records.append(record)
        return records


@dataclass(frozen=True)
class _Tried:
    texts: list[str]
    correct: np.ndarray
    failures: list[str | None]
    """Why the reward that says what is right gave no value."""
    finishes: list[str]
    num_samples: int

    def of(self, problem: int, flat: list[Any]) -> list[Any]:
        """The part of one problem, of what has an entry a completion."""
        return flat[problem * self.num_samples : (problem + 1) * self.num_samples]


def _votes(texts: Sequence[str], correct: Sequence[bool], gold: str) -> list[str | None]:
    found = [final_answer(text, TAGS) for text in texts]
    spoken = [gold if answer is None and right else answer for answer, right in zip(found, correct, strict=True)]
    return [None if answer is None else canonical(answer) for answer in spoken]
