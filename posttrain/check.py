"""What a run would see, before it trains: the prompts of its first step sampled and scored, or its first rows.

prompts = the first that training draws          rows = the first that training reads
completions, rewards = as in the first step      tokens = which of them are trained

The parts are the trainer's own, and so are the seeds: what is shown is what the first step would learn from. Nothing
is trained, and no directory of a run is made.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoints.hf_config import resolve_config
from models.checkpoints.loader import Placement
from models.functional import Params
from models.sharding import activation_mesh
from models.tokenizer import Tokenizer, load_tokenizer
from posttrain.data.policy_rows import SampledSequence, pack
from posttrain.doctor import AT_THE_END, watched_symptoms
from posttrain.rollout_log import rollout_metrics
from posttrain.rollouts import Judge, Judged, Rollout, sample, weigh
from posttrain.samplers.base import Sampling
from posttrain.samplers.choose import make_sampler
from posttrain.trainers.grpo_setup import Prompts, make_evaluator, prepare, sampled_model, weights_section
from posttrain.trainers.on_policy import require_one_process
from posttrain.verbs.inspect_data import Counts, Row, Segment, open_iterator, rows_of
from pretrain.data.iterators import RowIterator
from pretrain.runtime import runtime
from pretrain.setup import ModelSetup
from pretrain.start import role_params
from recipes.schema import DistillRecipe, DPORecipe, GRPORecipe, PretrainRecipe, Recipe, RLSection, SFTRecipe
from rewards.base import RewardInfo
from rewards.combination import total_range


@dataclass(frozen=True)
class PolicyFindings:
    """What the policy wrote before training, and what its rewards say of it."""

    engine: str
    rollout: Rollout
    infos: tuple[RewardInfo, ...]
    metrics: dict[str, float]
    """As the trainer logs them."""
    symptoms: dict[str, str]
    """What the doctor would name if it lasted, with its advice."""
    hopeless: tuple[str, ...]
    """Why nothing can be learned; empty where something can."""
    segment: Segment
    """The first prompt with its first completion; trained is what the update predicts."""
    tokenizer: Tokenizer
    random_weights: bool
    """Whether the recipe names no weights, so that the policy is one that was drawn."""


@dataclass(frozen=True)
class RowFindings:
    """What the first rows of a recipe hold."""

    counts: Counts
    """Of all rows that were looked at."""
    num_rows: int
    first: Row
    tallies: dict[str, int]
    """Of the records that were read for them; empty where the data is not of records."""
    decode: Any
    """Ids to text."""
    tokenizer_ids: int | None
    """Ids of the tokenizer; None for synthetic data."""
    vocab_size: int
    """Of the model."""

    @property
    def hopeless(self) -> tuple[str, ...]:
        """Why nothing can be learned; empty where something can."""
        if self.counts.trained:
            return ()
        return (f"none of the {self.counts.predicted} tokens of the first {self.num_rows} rows is trained",)


# --- a policy and its rewards ---


def sample_policy(recipe: GRPORecipe, *, num_prompts: int, reward_file: Path | None) -> PolicyFindings:
    """Samples and scores the first prompts of a run, with its engine, its rewards and the seeds of its first step.

    Args:
        recipe: of the run.
        num_prompts: prompts to sample, at most; fewer where the data has fewer.
        reward_file: a user's Python file of rewards, which join the recipe's.

    Raises:
        ValueError: the recipe does not fit its model, its data or the devices.
        SamplerError: the engine failed, or does not hold the policy.
    """
    rl = recipe.rl
    with runtime(recipe.train, recipe.mesh), tempfile.TemporaryDirectory(prefix="posttrain-check-") as folder:
        require_one_process()
        tokenizer = load_tokenizer(recipe.tokenizer)
        setup, prompts = prepare(recipe, tokenizer)
        # Failures are to be shown, whatever the run would do about them.
        shown = "zero" if recipe.rewards.on_failure == "stop" else recipe.rewards.on_failure
        section = recipe.rewards.model_copy(update={"on_failure": shown})
        with activation_mesh(setup.mesh, setup.rules), Judge(section, reward_file=reward_file) as judge:
            make_evaluator(recipe, prompts.held_out, tokenizer, judge)
            problems = first_prompts(prompts, num_prompts)
            model, place = sampled_model(setup), Path(folder) / "sampler"
            sampler = make_sampler(recipe.sampler, model, tokenizer, folder=place, max_length=rl.longest_sequence)
            try:
                sampler.sync(first_policy(recipe, setup), 0)
                completions = sample(sampler, problems, first_sampling(recipe, tokenizer))
            finally:
                sampler.close()
            judged = judge(problems, completions, tokenizer)
            infos = judge.infos
    engine = type(sampler).__name__.removesuffix("Sampler")
    return findings(recipe, judged, infos, tokenizer, engine="vLLM" if engine == "VLLM" else engine.lower())


def findings(
    recipe: GRPORecipe, judged: Judged, infos: tuple[RewardInfo, ...], tokenizer: Tokenizer, *, engine: str
) -> PolicyFindings:
    """What a step's scored completions say of the run."""
    advantages, sequences = weigh(judged, recipe.rl)
    rollout = Rollout(judged, advantages, sequences, 0.0, 0.0, None)
    metrics = rollout_metrics(rollout, recipe.rl)
    # Without a kept completion there is no mean for the doctor to look at, and the step would be refused.
    kept = bool(judged.combined.kept.any())
    lowest, highest = total_range(infos)
    named = watched_symptoms(recipe.doctor, lowest, highest) if kept else {}
    symptoms = {name: advice for name, (shows, advice) in named.items() if shows(metrics)}
    model = recipe.model
    sources = (model.hf_path, model.load_parameters_path, model.load_full_state_path)
    return PolicyFindings(
        engine=engine,
        rollout=rollout,
        infos=infos,
        metrics=metrics,
        symptoms=symptoms,
        hopeless=tuple(_hopeless(recipe, rollout, symptoms)),
        segment=trained_segment(sequences[0]),
        tokenizer=tokenizer,
        random_weights=not any(sources),
    )


def _hopeless(recipe: GRPORecipe, rollout: Rollout, symptoms: dict[str, str]) -> list[str]:
    failures = sum(rollout.judged.combined.failures.values())
    reasons = list(symptoms)
    if recipe.rewards.on_failure == "stop" and failures:
        reasons.append(f"{failures} rewards failed, and rewards.on_failure=stop ends the run at the first")
    if not any(one.counts for one in rollout.sequences):
        reasons.append("no completion may be learnt from: rewards failed, or rl.mask_truncated leaves all out")
    return reasons


def first_prompts(prompts: Prompts, count: int) -> list[Any]:
    """The first prompts that training draws, as many as there are."""
    stream = prompts.train
    return stream.take(min(count, stream.get_state()["fingerprint"]["rows"]), exclude=())


def first_sampling(recipe: GRPORecipe, tokenizer: Tokenizer) -> Sampling:
    """How the first step samples."""
    return Sampling(
        max_tokens=recipe.rl.max_completion_length,
        temperature=recipe.sampler.temperature,
        stop_ids=tuple(sorted(tokenizer.stop_ids)),
        num_samples=recipe.rl.num_generations,
        seed=recipe.train.seed,
        step=1,
    )


def first_policy(recipe: GRPORecipe, setup: ModelSetup) -> Params:
    """The weights that training starts from."""
    section = weights_section(recipe.model)
    placement, verify = Placement(setup.mesh, setup.rules), recipe.checkpoint.verify
    return role_params(section, sampled_model(setup), placement, verify=verify, seed=recipe.train.seed)


def trained_segment(sequence: SampledSequence) -> Segment:
    """A prompt with its completion, and which of the tokens a row of the update predicts."""
    tokens = (*sequence.prompt, *sequence.completion.tolist())
    trained = np.zeros(len(tokens), bool)
    batch = pack([sequence], row_length=len(tokens), rows_multiple=1, microbatch_rows=1).batch
    trained[1 + batch.where[0][batch.target_segments[0] != 0]] = True
    return Segment(tokens, tuple(trained.tolist()))


@dataclass(frozen=True)
class Spread:
    """How a reward, or the total, is spread over the completions."""

    name: str
    mean: float
    std: float
    low: float
    high: float
    at_floor: float | None
    """The share of values at the lowest that there can be; None where that is unbounded."""
    at_ceiling: float | None
    failed: int


def spreads(judged: Judged, infos: Sequence[RewardInfo]) -> list[Spread]:
    """Of each reward, over the completions it gave a value, and of the total, over those that may be learnt from."""
    combined = judged.combined
    rows = [
        spread(f"{info.name} x {info.weight:g}", combined.parts[info.name], (info.low, info.high)) for info in infos
    ]
    totals = np.where(combined.kept, combined.totals, np.nan)
    return [*rows, spread("total", totals, total_range(infos))]


def spread(name: str, values: np.ndarray, ends: tuple[float, float]) -> Spread:
    """The spread of values within a range; NaN is one that failed or is left out."""
    known = values[np.isfinite(values)]
    failed = len(values) - len(known)
    if not len(known):
        return Spread(name, math.nan, math.nan, math.nan, math.nan, None, None, failed)
    width = abs(ends[1] - ends[0])
    slack = AT_THE_END * (width if math.isfinite(width) else 1.0)

    def share(end: float) -> float | None:
        return None if math.isinf(end) else float((np.abs(known - end) <= slack).mean())

    ranges = (float(known.min()), float(known.max()))
    return Spread(name, float(known.mean()), float(known.std()), *ranges, share(ends[0]), share(ends[1]), failed)


@dataclass(frozen=True)
class Groups:
    """How many groups teach something."""

    total: int
    without_signal: int
    at_floor: int
    """Of those without signal: all at the lowest total that there can be."""
    at_ceiling: int


def group_counts(judged: Judged, infos: Sequence[RewardInfo], rl: RLSection) -> Groups:
    """Counts groups whose rewards do not differ, and where they stand."""
    totals, kept = judged.totals(), judged.kept(rl)
    flat = ~judged.signal(rl)
    lowest, highest = total_range(infos)
    slack = AT_THE_END * (highest - lowest if math.isfinite(highest - lowest) else 1.0)

    def at(end: float) -> int:
        if math.isinf(end):
            return 0
        near = np.where(kept, np.abs(totals - end) <= slack, True).all(1) & kept.any(1)
        return int((near & flat).sum())

    return Groups(len(totals), int(flat.sum()), at(lowest), at(highest))


# --- rows ---


def look_at_rows(recipe: Recipe, *, num_rows: int) -> RowFindings:
    """Prepares a run on rows of data as its trainer does, and takes its first rows apart.

    Args:
        recipe: of kind pretrain, sft, dpo or distill.
        num_rows: rows, or pairs, to look at; fewer where the data ends.

    Raises:
        ValueError: the recipe does not fit its model, its data, its tokenizer or the devices; or there are no rows.
    """
    assert isinstance(recipe, PretrainRecipe | SFTRecipe | DPORecipe | DistillRecipe), recipe.kind
    with runtime(recipe.train, recipe.mesh):
        _prepare_rows(recipe)
    iterator, decode = open_iterator(recipe, evaluation=False)
    try:
        batches = enumerate(itertools.islice(iterator, num_rows))
        rows = [row for number, batch in batches for row in rows_of(batch, number)]
        tallies = dict(iterator.tallies) if isinstance(iterator, RowIterator) else {}
    finally:
        iterator.close()
    if not rows:
        raise ValueError("data: there is no row to train on; look at the data section's path, split and filters")
    synthetic = isinstance(recipe, PretrainRecipe) and recipe.data.kind == "synthetic"
    return RowFindings(
        counts=sum((row.counts for row in rows), Counts(0, 0, 0)),
        num_rows=len(rows),
        first=next((row for row in rows if row.counts.trained), rows[0]),
        tallies=tallies,
        decode=decode,
        tokenizer_ids=None if synthetic else load_tokenizer(recipe.tokenizer).vocab_size,
        vocab_size=resolve_config(recipe.model).vocab_size,
    )


def _prepare_rows(recipe: PretrainRecipe | SFTRecipe | DPORecipe | DistillRecipe) -> None:
    """Builds and checks the parts of a run, and lets them go."""
    if isinstance(recipe, PretrainRecipe):
        from pretrain.setup import prepare as prepare_pretraining

        setup = prepare_pretraining(recipe)
    elif isinstance(recipe, DPORecipe):
        from posttrain.trainers.dpo import prepare as prepare_pairs

        setup = prepare_pairs(recipe)
    else:
        from posttrain.trainers.sft import prepare_rows

        setup = prepare_rows(recipe)
    setup.close()
