"""A step's completions, from sampling to advantages: three plain functions over host data.

completions = sample(sampler, problems, ...)      token ids with the sampler's log-probabilities
judged      = judge(pool, problems, completions)  every reward of every completion, and one total
advantages  = weigh(judged, ...)                  relative to the group
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.tokenizer import Tokenizer
from posttrain.advantages import group_advantages, has_signal
from posttrain.data.policy_rows import SampledSequence
from posttrain.data.problems import TAGS
from posttrain.data.prompts import PromptRow
from posttrain.losses.policy import ALGORITHMS
from posttrain.samplers.base import Completion, Prompt, Sampler, SamplerError, Sampling
from recipes.schema import RewardsSection, RLSection
from rewards.base import Outcome, RewardFailure, RewardInfo
from rewards.combination import Combined, FailureRule, combine
from rewards.pool import PoolLimits, RewardPool
from rewards.registry import specs_of

CAUSES_NAMED = 4
"""Causes that an error about groups without signal names, the most frequent first."""


class RewardStop(RewardFailure, ValueError):
    """A reward gave no value and rewards.on_failure=stop: a user's own mistake, and these are the completions."""

    def __init__(self, message: str, judged: "Judged") -> None:
        super().__init__(message)
        self.judged = judged


class NoSignal(ValueError):
    """Resampling came to its bound with groups that teach nothing, and these are all that were sampled."""

    def __init__(self, message: str, judged: "Judged") -> None:
        super().__init__(message)
        self.judged = judged


@dataclass(frozen=True)
class Judged:
    """Completions of G each for P problems, with their rewards; flat fields have the problems' order."""

    problems: list[PromptRow]
    """[P]."""
    completions: list[Completion]
    """[P * G]."""
    texts: list[str]
    """[P * G]: without special tokens."""
    outcomes: list[tuple[Outcome, ...]]
    """[P * G]: what each reward said."""
    combined: Combined
    """Totals, and which completions may be learnt from."""

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.completions) // len(self.problems)

    def totals(self) -> np.ndarray:
        """Total rewards, float64 [P, G]."""
        return self.combined.totals.reshape(len(self.problems), -1)

    def kept(self, rl: RLSection) -> np.ndarray:
        """Which completions may be learnt from, bool [P, G]: by the rule for failures, and by rl.mask_truncated."""
        kept = self.combined.kept.reshape(len(self.problems), -1)
        if not rl.mask_truncated:
            return kept
        return kept & np.array([one.finish_reason == "stop" for one in self.completions]).reshape(kept.shape)

    def signal(self, rl: RLSection) -> np.ndarray:
        """Which groups teach anything, bool [P]."""
        return has_signal(self.totals(), kept=self.kept(rl))


@dataclass(frozen=True)
class Rollout:
    """All that a step learns from, and what was sampled for it beside."""

    judged: Judged
    advantages: np.ndarray
    """float64 [P, G]."""
    sequences: list[SampledSequence]
    """[P * G]."""
    sample_seconds: float
    reward_seconds: float
    replaced: Judged | None
    """The groups that others took the place of, because their rewards did not differ; None where there are none."""

    @property
    def resampled(self) -> int:
        """How many groups were replaced."""
        return len(self.replaced.problems) if self.replaced is not None else 0

    def sampled(self) -> Judged:
        """Every completion of the step: those that it takes, then those that were replaced."""
        return self.judged if self.replaced is None else merge([self.judged, self.replaced])


def sample(sampler: Sampler, problems: Sequence[PromptRow], sampling: Sampling) -> list[Completion]:
    """Samples completions of one weight version.

    Raises:
        SamplerError: the engine failed, or gave completions of several versions or of the wrong prompts.
    """
    prompts = [Prompt(tuple(problem.token_ids), problem.prompt_id) for problem in problems]
    completions = sampler.generate(prompts, sampling)
    wanted = [(prompt.prompt_id, index) for prompt in prompts for index in range(sampling.num_samples)]
    if [(one.prompt_id, one.sample_index) for one in completions] != wanted:
        raise SamplerError("sampler: completions came back in another order than the prompts': a fault of the engine")
    versions = {one.weight_version for one in completions}
    if versions != {sampler.weight_version}:
        raise SamplerError(
            f"sampler: completions of weight versions {sorted(versions)} in one step; a fault of the engine"
        )
    return completions


class Judge:
    """A recipe's rewards: their processes, and the rule for those that fail. Use it in a `with` statement."""

    def __init__(self, section: RewardsSection, *, reward_file: Path | None) -> None:
        specs = specs_of(section.functions, section.options)
        limits = PoolLimits(
            num_workers=section.num_workers,
            item_seconds=section.timeout_seconds,
            call_seconds=section.call_seconds,
            start_seconds=section.start_seconds,
            memory_bytes=None if section.memory_gib is None else int(section.memory_gib * 2**30),
        )
        self._pool = RewardPool(specs, tags=TAGS, reward_file=reward_file, limits=limits)
        self._on_failure: FailureRule = section.on_failure
        self.infos: tuple[RewardInfo, ...] = ()

    def __enter__(self) -> "Judge":
        self.infos = self._pool.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def __call__(self, problems: list[PromptRow], completions: list[Completion], tokenizer: Tokenizer) -> Judged:
        """Scores completions, and adds the rewards of each up.

        Raises:
            RewardStop: a reward gave no value and the rule is to stop.
            RewardPoolError: the processes cannot be kept alive.
        """
        group = len(completions) // len(problems)
        texts = [tokenizer.decode(one.token_ids.tolist(), skip_special=True) for one in completions]
        outcomes = self._pool.score([problems[number // group].reward_input(text) for number, text in enumerate(texts)])
        groups = [number // group for number in range(len(completions))]
        try:
            combined = combine(outcomes, self.infos, groups=groups, on_failure=self._on_failure)
        except RewardFailure as error:
            dropped = combine(outcomes, self.infos, groups=groups, on_failure="drop_group")
            raise RewardStop(str(error), Judged(problems, completions, texts, outcomes, dropped)) from error
        return Judged(problems, completions, texts, outcomes, combined)


def weigh(judged: Judged, rl: RLSection) -> tuple[np.ndarray, list[SampledSequence]]:
    """Advantages [P, G], and each completion as a sequence of the update."""
    kept = judged.kept(rl)
    estimator = rl.advantage or ALGORITHMS[rl.loss_algo].advantage
    advantages = group_advantages(judged.totals(), estimator=estimator, kept=kept)
    group = judged.num_generations
    sequences = [
        SampledSequence(
            judged.problems[number // group].token_ids,
            one.token_ids,
            one.logprobs,
            float(advantages.flat[number]),
            bool(kept.flat[number]),
        )
        for number, one in enumerate(judged.completions)
    ]
    return advantages, sequences


def collect(
    draw: Callable[[int, set[int]], list[PromptRow]],
    complete: Callable[[list[PromptRow]], list[Completion]],
    judge_all: Callable[[list[PromptRow], list[Completion]], Judged],
    rl: RLSection,
) -> Rollout:
    """One step's rollout: samples, judges and weighs; replaces groups without signal for some rounds.

    Args:
        draw: the next so many problems, none of which has one of the given ids.
        complete: samples their completions.
        judge_all: judges them.
        rl: the recipe's section; where `resample_rounds` is 0 every group is taken as it is.

    Raises:
        NoSignal: some groups had still no difference in reward after the last round; why is counted.
        RewardStop: of `judge_all`, with the completions of earlier rounds added.
    """
    sample_seconds = reward_seconds = 0.0
    taken: list[Judged] = []
    replaced: list[Judged] = []
    flat: Counter[str] = Counter()
    seen: set[int] = set()
    wanted = rl.prompts_per_step
    for round_number in range(rl.resample_rounds + 1):
        try:
            problems = draw(wanted, seen)
        except ValueError as error:
            if not replaced:
                raise
            said = _no_signal(wanted, flat, rl, round_number - 1)
            raise NoSignal(f"{said} ({error})", merge([*taken, *replaced])) from error
        seen |= {problem.prompt_id for problem in problems}
        start = time.perf_counter()
        completions = complete(problems)
        sampled = time.perf_counter()
        try:
            judged = judge_all(problems, completions)
        except RewardStop as stop:
            stop.judged = merge([*taken, *replaced, stop.judged])
            raise
        sample_seconds += sampled - start
        reward_seconds += time.perf_counter() - sampled
        keeps = judged.signal(rl) | (rl.resample_rounds == 0)
        taken.append(_only(judged, keeps))
        if keeps.all():
            break
        replaced.append(_only(judged, ~keeps))
        wanted -= int(keeps.sum())
        flat.update(_why_flat(judged, group, rl) for group in np.flatnonzero(~keeps))
        if round_number == rl.resample_rounds:
            raise NoSignal(_no_signal(wanted, flat, rl, round_number), merge([*taken, *replaced]))
    merged = merge(taken)
    advantages, sequences = weigh(merged, rl)
    return Rollout(merged, advantages, sequences, sample_seconds, reward_seconds, merge(replaced) if replaced else None)


def _why_flat(judged: Judged, group: int, rl: RLSection) -> str:
    """Why a group has no difference in reward, in words."""
    own = slice(group * judged.num_generations, (group + 1) * judged.num_generations)
    if any(outcome.failure for outcomes in judged.outcomes[own] for outcome in outcomes):
        return "a reward failed"
    if all(one.finish_reason == "length" for one in judged.completions[own]):
        return "all truncated"
    kept = judged.kept(rl)[group]
    points = judged.totals()[group][kept][0]
    return f"all rewarded {points:g}" if kept.all() else f"all that ended rewarded {points:g}"


def _no_signal(wanted: int, flat: "Counter[str]", rl: RLSection, rounds: int) -> str:
    causes = ", ".join(f"{count} groups {cause}" for cause, count in flat.most_common(CAUSES_NAMED))
    return (
        f"rl.max_resamples={rl.resample_rounds}: {wanted} of {rl.prompts_per_step} groups have still no difference in "
        f"reward after {rounds} rounds ({causes}), so nothing can be learnt from them; use easier or harder problems, "
        "more generations or a reward with parts, raise rl.max_resamples, or set it to 0 to take groups as they are"
    )


def _only(judged: Judged, chosen: np.ndarray) -> Judged:
    """The chosen groups, of bool [P]."""
    flat = np.repeat(chosen, judged.num_generations)
    combined = judged.combined

    def of(values: list, which: np.ndarray) -> list:
        return [value for value, keep in zip(values, which, strict=True) if keep]

    outcomes = of(judged.outcomes, flat)
    failures = Counter((one.reward, one.failure) for several in outcomes for one in several if one.failure is not None)
    parts = {name: values[flat] for name, values in combined.parts.items()}
    return Judged(
        of(judged.problems, chosen),
        of(judged.completions, flat),
        of(judged.texts, flat),
        outcomes,
        Combined(combined.totals[flat], combined.kept[flat], parts, dict(failures)),
    )


def merge(several: list[Judged]) -> Judged:
    """Several rounds, or parts of rounds, as one."""
    combined = [one.combined for one in several]
    failures: Counter = Counter()
    for one in combined:
        failures.update(one.failures)
    return Judged(
        [problem for one in several for problem in one.problems],
        [completion for one in several for completion in one.completions],
        [text for one in several for text in one.texts],
        [outcome for one in several for outcome in one.outcomes],
        Combined(
            np.concatenate([one.totals for one in combined]),
            np.concatenate([one.kept for one in combined]),
            {name: np.concatenate([one.parts[name] for one in combined]) for name in combined[0].parts},
            dict(failures),
        ),
    )
