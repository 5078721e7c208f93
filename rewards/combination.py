"""From outcomes to one number for each completion: weights, and the rule for rewards that gave no value."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewards.base import FailureKind, Outcome, RewardFailure, RewardInfo

FailureRule = Literal["zero", "drop_group", "stop"]
"""What a failed reward does: it counts 0 in its completion's total; its completion's whole group is left out of the
update; or the run stops."""


@dataclass(frozen=True, eq=False)
class Combined:
    """The rewards of a step's completions.

    Attributes:
        totals: float64 [n], the weighted sums; every one is finite.
        kept: bool [n], False for a completion that must not be learnt from.
        parts: float64 [n] by reward, before weighting; NaN where the reward failed.
        failures: number of failures by reward and kind.
    """

    totals: np.ndarray
    kept: np.ndarray
    parts: dict[str, np.ndarray]
    failures: dict[tuple[str, FailureKind], int]

    def metrics(self) -> dict[str, float]:
        """Means under the names of the log, over the completions that have a value.

        Returns:
            `rewards/total/mean` over the kept completions; `rewards/<name>/mean` (absent where all failed) and
            `rewards/<name>/failures`; `rewards/dropped`, the number of completions that are not kept.
        """
        found = {"rewards/dropped": float((~self.kept).sum())}
        if self.kept.any():
            found["rewards/total/mean"] = float(self.totals[self.kept].mean())
        for name, values in self.parts.items():
            valid = np.isfinite(values)
            found[f"rewards/{name}/failures"] = float((~valid).sum())
            if valid.any():
                found[f"rewards/{name}/mean"] = float(values[valid].mean())
        return found


def combine(
    outcomes: Sequence[Sequence[Outcome]],
    infos: Sequence[RewardInfo],
    *,
    groups: Sequence[int],
    on_failure: FailureRule,
) -> Combined:
    """Weights and adds up rewards, and applies the rule for failures.

    Args:
        outcomes: for each of n completions, what each reward said; as `RewardPool.score` returns them.
        infos: the rewards, in the outcomes' order.
        groups: for each completion, the number of its group: completions of one prompt share it.
        on_failure: the rule.

    Returns:
        Totals, parts, and which completions to keep.

    Raises:
        ValueError: an unknown rule.
        RewardFailure: the rule is `stop`, and a reward failed.
    """
    if on_failure not in ("zero", "drop_group", "stop"):
        raise ValueError(
            f"rewards: on_failure={on_failure!r}: the rules are zero, drop_group and stop; set one of them"
        )
    assert len(outcomes) == len(groups), (len(outcomes), len(groups))
    failed = [(index, outcome) for index, of_item in enumerate(outcomes) for outcome in of_item if outcome.failure]
    if failed and on_failure == "stop":
        index, first = failed[0]
        raise RewardFailure(
            f"reward {first.reward}: completion {index}: {first.failure} ({first.detail}): {len(failed)} rewards gave "
            "no value, and rewards.on_failure=stop; set rewards.on_failure to zero or drop_group, or mend the reward, "
            "with rewards.changed_file=accept where a run that has saved goes on"
        )
    values = np.array(
        [[np.nan if one.value is None else one.value for one in of_item] for of_item in outcomes], np.float64
    ).reshape(len(outcomes), len(infos))
    weights = np.array([info.weight for info in infos], np.float64)
    # The failed ones are put to zero by name: NaN is no number that a sum may pass over.
    totals = np.where(np.isnan(values), 0.0, values) @ weights
    kept = np.ones(len(outcomes), bool)
    if on_failure == "drop_group":
        dropped = {groups[index] for index, _ in failed}
        kept = np.array([group not in dropped for group in groups], bool)
    counts = Counter((outcome.reward, outcome.failure) for _, outcome in failed if outcome.failure is not None)
    parts = {info.name: values[:, place] for place, info in enumerate(infos)}
    return Combined(totals, kept, parts, dict(counts))


def total_range(infos: Sequence[RewardInfo]) -> tuple[float, float]:
    """The smallest and largest total that the rewards can give; infinite where one of them states no range.

    Args:
        infos: the rewards.

    Returns:
        `(low, high)`. A reward of weight 0 adds nothing.
    """
    ends = [sorted((info.weight * info.low, info.weight * info.high)) for info in infos if info.weight != 0]
    return sum(low for low, _ in ends), sum(high for _, high in ends)
