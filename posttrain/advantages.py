"""Advantages of completions relative to their group: NumPy in, NumPy out, on the host.

A group is the G completions of one prompt. With r the rewards of its members, of which n are kept:

| name      | advantage of member i                                     | source                            |
|-----------|-----------------------------------------------------------|-----------------------------------|
| `group`   | (r_i - mean(r)) / (std(r) + 1e-6), std with divisor n - 1 | GRPO, arXiv:2402.03300, 4.1.2     |
| `dr_grpo` | r_i - mean(r)                                             | Dr. GRPO, arXiv:2503.20783        |
| `rloo`    | r_i - mean of the others' rewards                         | RLOO, arXiv:2402.14740, section 2 |

A member may be dropped (its reward could not be computed): it counts nowhere, its reward may be anything, and its
advantage is 0. A group whose kept rewards are all equal, or that has kept fewer than two, says nothing: its advantages
are exactly 0.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

STD_FLOOR = 1e-6
"""Added to the standard deviation, as in TRL and Tunix."""


def _group(centred, kept, count):
    variance = (centred**2).sum(1, keepdims=True) / np.maximum(count - 1, 1)
    return centred / (np.sqrt(variance) + STD_FLOOR)


def _dr_grpo(centred, kept, count):
    return centred


def _rloo(centred, kept, count):
    # r_i - (sum - r_i) / (n - 1) = (r_i - mean) * n / (n - 1).
    return centred * count / np.maximum(count - 1, 1)


ADVANTAGES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "group": _group,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
}


def group_advantages(
    rewards: Float[np.ndarray, "P G"], *, estimator: str, kept: Bool[np.ndarray, "P G"] | None
) -> Float[np.ndarray, "P G"]:
    """Computes each completion's advantage over its group.

    Args:
        rewards: total reward of each of the G completions of P prompts.
        estimator: one of ADVANTAGES.
        kept: False for members that were dropped; None keeps all.

    Returns:
        Advantages in float64.

    Raises:
        ValueError: the estimator is unknown, a group has fewer than two members, or a kept reward isn't finite.
    """
    if estimator not in ADVANTAGES:
        raise ValueError(f"advantage: {estimator!r}: no such estimator; use {', '.join(ADVANTAGES)}")
    rewards, kept = _checked(rewards, kept)
    count = kept.sum(1, keepdims=True)
    clean = np.where(kept, rewards, 0.0)
    centred = np.where(kept, clean - clean.sum(1, keepdims=True) / np.maximum(count, 1), 0.0)
    # Equal rewards differ from their rounded mean by an ulp, which the floor would leave as a tiny advantage.
    centred[~has_signal(rewards, kept=kept)] = 0.0
    return ADVANTAGES[estimator](centred, kept, count)


def has_signal(rewards: Float[np.ndarray, "P G"], *, kept: Bool[np.ndarray, "P G"] | None) -> Bool[np.ndarray, " P"]:
    """Whether a group's kept rewards differ, so that it has anything to teach (DAPO samples the others anew).

    Args:
        rewards: total reward of each of the G completions of P prompts.
        kept: False for members that were dropped; None keeps all.

    Raises:
        ValueError: a group has fewer than two members, or a kept reward isn't finite.
    """
    rewards, kept = _checked(rewards, kept)
    highest = np.where(kept, rewards, -np.inf).max(1)
    lowest = np.where(kept, rewards, np.inf).min(1)
    return highest > lowest


def _checked(rewards, kept):
    rewards = np.asarray(rewards, np.float64)
    kept = np.ones(rewards.shape, bool) if kept is None else np.asarray(kept, bool)
    if rewards.ndim != 2 or kept.shape != rewards.shape:
        raise ValueError(
            f"advantages: rewards {rewards.shape}, kept {kept.shape}: both are one row a prompt and one column a "
            "completion; reshape them to [prompts, num_generations]"
        )
    if rewards.shape[1] < 2:
        raise ValueError(
            f"rl.num_generations={rewards.shape[1]}: advantages are relative to the group's mean, so a group needs "
            "at least 2 completions; set rl.num_generations >= 2"
        )
    broken = np.argwhere(kept & ~np.isfinite(rewards))
    if len(broken):
        prompt, member = broken[0]
        raise ValueError(
            f"advantages: reward {rewards[prompt, member]} of prompt {prompt}, completion {member} "
            f"({len(broken)} such in all): rewards must be finite; drop the member or the group, or stop"
        )
    return rewards, kept
