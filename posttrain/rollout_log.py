"""What is written down of a step's completions: numbers for the log, and rows for the ledger."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.ledger import storable
from posttrain.rollouts import Judged, Rollout
from recipes.schema import RLSection


def rollout_metrics(rollout: Rollout, rl: RLSection) -> dict[str, float]:
    """A step's rewards and lengths under the names of the log.

    Rewards and lengths are those of the groups that the step takes; a truncated completion counts there even where
    rl.mask_truncated leaves it out of the update. Over all that was sampled, groups that were replaced included, are
    `rewards/<name>/failures`, `rewards/dropped` and `completions/tokens`; the update's own tokens alone are
    `completions/trained_tokens`.
    """
    judged, sampled = rollout.judged, rollout.sampled()
    lengths = np.array([len(one.token_ids) for one in judged.completions])
    flat = judged.combined.totals[judged.combined.kept]
    lost = {
        name: value
        for name, value in sampled.combined.metrics().items()
        if name == "rewards/dropped" or name.endswith("/failures")
    }
    return {
        **judged.combined.metrics(),
        **lost,
        "rewards/total/std": float(flat.std()) if flat.size else 0.0,
        "rewards/total/min": float(flat.min()) if flat.size else 0.0,
        "rewards/total/max": float(flat.max()) if flat.size else 0.0,
        "groups/without_signal": float((~judged.signal(rl)).mean()),
        "groups/resampled": float(rollout.resampled),
        "completions/tokens": float(sum(len(one.token_ids) for one in sampled.completions)),
        "completions/trained_tokens": float(sum(len(one.completion) for one in rollout.sequences if one.counts)),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/min_length": float(lengths.min()),
        "completions/truncated": float(np.mean([one.finish_reason == "length" for one in judged.completions])),
    }


def mismatch_metrics(rollout: Rollout, trainer_logps: Sequence[np.ndarray | None]) -> dict[str, float]:
    """The worst of a step's tokens, sampler against trainer; the means are the loss's metrics.

    Args:
        rollout: the completions with the sampler's log-probabilities.
        trainer_logps: as for `ledger_rows`.
    """
    pairs = zip(trainer_logps, rollout.judged.completions, strict=True)
    differences = np.concatenate([logps - one.logprobs for logps, one in pairs if logps is not None]).astype(np.float64)
    return {
        "sampler/logp_diff_max": float(np.abs(differences).max()),
        "sampler/ratio_min": float(np.exp(differences.min())),
        "sampler/ratio_max": float(np.exp(differences.max())),
    }


def unlearnt(judged: Judged) -> Rollout:
    """Completions of which nothing is learnt, for the ledger of a step that was not made."""
    none = np.zeros((len(judged.problems), judged.num_generations))
    return Rollout(judged, none, [], 0.0, 0.0, None)


def ledger_rows(step: int, rollout: Rollout, trainer_logps: Sequence[np.ndarray | None]) -> list[dict[str, Any]]:
    """A step's completions as `posttrain.ledger` keeps them: those that it takes, then those that were replaced.

    Args:
        step: completed steps, the update made of these completions included.
        rollout: the completions with rewards and advantages.
        trainer_logps: of those that the step takes, the trainer's log-probabilities before the update, float32 [n]
            each; None for those left out.
    """
    judged = rollout.sampled()
    others = len(judged.completions) - len(rollout.judged.completions)
    advantages = [*rollout.advantages.flat, *[0.0] * others]
    group = judged.num_generations
    rows = []
    for number, (one, logps) in enumerate(zip(judged.completions, [*trainer_logps, *[None] * others], strict=True)):
        problem, outcomes = judged.problems[number // group], judged.outcomes[number]
        rows.append(
            {
                "step": step,
                "prompt_id": one.prompt_id,
                "sample_index": one.sample_index,
                "prompt": storable(problem.text),
                "completion": storable(judged.texts[number]),
                "answer": storable(problem.answer),
                "prompt_ids": problem.token_ids,
                "completion_ids": one.token_ids,
                "sampler_logps": one.logprobs,
                "trainer_logps": logps,
                "reward_parts": [(outcome.reward, outcome.value) for outcome in outcomes],
                "reward_failures": [
                    (outcome.reward, storable(f"{outcome.failure}: {outcome.detail}"))
                    for outcome in outcomes
                    if outcome.failure
                ],
                "reward": float(judged.combined.totals[number]),
                "advantage": float(advantages[number]),
                "counted": logps is not None,
                "finish_reason": one.finish_reason,
                "weight_version": one.weight_version,
            }
        )
    return rows
