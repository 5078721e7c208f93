"""What the tests of policy losses share: sequences, ways to lay them out in rows, and the losses in plain NumPy.

The oracle works on lists of sequences, in float64, one token at a time, and knows neither rows nor masks. Its gradient
is the complex step, Im f(x + ih) / h, which is exact to rounding; what a loss holds constant for differentiation comes
from `constants`, a copy of the sequences that isn't moved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.losses.base import LossOutput
from posttrain.losses.policy import policy_loss

STEP = 1e-30


@dataclass(frozen=True)
class Sampled:
    """One completion: an advantage, and arrays of its tokens [n]."""

    logps: np.ndarray
    old: np.ndarray
    sampler: np.ndarray
    ref: np.ndarray
    entropy: np.ndarray
    advantage: float


def draw(seed: int, lengths: Sequence[int], spread: float = 0.4) -> list[Sampled]:
    """Completions whose ratios lie on both sides of the clips, with advantages of both signs."""
    rng = np.random.default_rng(seed)
    made = []
    for index, n in enumerate(lengths):
        logps = -rng.exponential(1.5, n)
        near = [logps + spread * rng.normal() / 2 + spread * rng.normal(size=n) for _ in range(3)]
        made.append(Sampled(logps, *near, rng.random(n), (-1) ** index * rng.uniform(0.3, 2.0)))
    return made


SETTINGS: dict[str, Any] = {
    "algorithm": "grpo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "dual_clip": None,
    "kl_coefficient": 0.0,
    "kl_estimator": "low_var_kl",
    "entropy_coefficient": 0.0,
    "aggregation": "token-mean",
    "length_norm": None,
    "sampler_correction": "off",
    "sampler_cap": 2.0,
}


# Every term at once; none of it is a default.
EVERYTHING = {
    "kl_coefficient": 0.2,
    "entropy_coefficient": 0.1,
    "sampler_correction": "sequence",
    "dual_clip": 3.0,
}


def with_aggregation(name: str) -> dict[str, Any]:
    """The settings of an aggregation, with a length where it takes one."""
    return {"aggregation": name, "length_norm": 7.0 if name == "sequence-mean-token-sum-norm" else None}


@dataclass(frozen=True)
class Layout:
    """Which sequences share a row, where the padding goes, and how many uncounted tokens precede a sequence."""

    rows: Sequence[Sequence[int]]
    length: int
    pad_left: bool = False
    prompt: int = 0


def lay_out(sequences: Sequence[Sampled], layout: Layout, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Rows for `policy_loss`; whatever isn't a completion's token is NaN, its segment id included where it has one."""
    shape = (len(layout.rows), layout.length)
    names = {"logps": "logps", "old_logps": "old", "sampler_logps": "sampler", "ref_logps": "ref", "entropy": "entropy"}
    arrays = {name: np.full(shape, np.nan, dtype) for name in [*names, "advantages"]}
    arrays |= {"mask": np.zeros(shape, bool), "segment_ids": np.zeros(shape, np.int32)}
    for row, members in enumerate(layout.rows):
        used = sum(layout.prompt + len(sequences[i].logps) for i in members)
        at = layout.length - used if layout.pad_left else 0
        for segment, i in enumerate(members, 1):
            one = sequences[i]
            start, stop = at + layout.prompt, at + layout.prompt + len(one.logps)
            arrays["segment_ids"][row, at:stop] = segment
            arrays["mask"][row, start:stop] = True
            arrays["advantages"][row, start:stop] = one.advantage
            for name, field in names.items():
                arrays[name][row, start:stop] = getattr(one, field)
            at = stop
    return arrays


def sums_and_grads(arrays: dict[str, np.ndarray], **settings: Any) -> tuple[LossOutput, np.ndarray, np.ndarray]:
    """The output, and the gradients of its numerator with respect to logps and entropy."""
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    logps, entropy = given.pop("logps"), given.pop("entropy")

    def numerator(logps, entropy):
        out = policy_loss(logps, entropy=entropy, **given, **{**SETTINGS, "max_segments": 4, **settings})
        return out.loss_sum, out

    (_, out), grads = jax.value_and_grad(numerator, argnums=(0, 1), has_aux=True)(logps, entropy)
    return out, np.asarray(grads[0]), np.asarray(grads[1])


def assert_near(found, expected, tolerance):
    """Relative to the largest magnitude expected."""
    expected = np.asarray(expected, np.float64)
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


def oracle(sequences: Sequence[Sampled], **settings: Any) -> tuple[float, float, list[np.ndarray]]:
    """The numerator, the divisor, and the numerator's gradient with respect to each sequence's logps."""
    settings = {**SETTINGS, **settings}
    value, weight = _sums(sequences, sequences, settings)
    grads = []
    for i, one in enumerate(sequences):
        grad = np.zeros(len(one.logps))
        for t in range(len(grad)):
            moved = one.logps.astype(complex)
            moved[t] += 1j * STEP
            changed = [*sequences[:i], replace(one, logps=moved), *sequences[i + 1 :]]
            grad[t] = np.imag(_sums(changed, sequences, settings)[0]) / STEP
        grads.append(grad)
    return float(np.real(value)), weight, grads


def _sums(sequences, constants, s):
    total = 0.0
    for one, fixed in zip(sequences, constants, strict=True):
        n = len(one.logps)
        per_token = [
            -_weight(fixed, t, s) * _objective(one, fixed, t, s)
            + s["kl_coefficient"] * KL[s["kl_estimator"]](one.ref[t] - one.logps[t])
            - s["entropy_coefficient"] * one.entropy[t]
            for t in range(n)
        ]
        norm = {"sequence-mean-token-mean": n, "sequence-mean-token-sum-norm": s["length_norm"]}
        total += sum(per_token) / norm.get(s["aggregation"], 1.0)
    by_tokens = s["aggregation"] == "token-mean"
    return total, float(sum(len(one.logps) for one in sequences) if by_tokens else len(sequences))


def _ratio(one, fixed, t, algorithm):
    mean = np.mean(one.logps - one.old)
    fixed_mean = np.mean(fixed.logps - fixed.old)
    if algorithm == "gspo":
        return np.exp(mean)
    if algorithm == "gspo-token":
        return np.exp(fixed_mean) * np.exp(one.logps[t]) / np.exp(fixed.logps[t])
    return np.exp(one.logps[t] - one.old[t])


def _objective(one, fixed, t, s):
    ratio, advantage = _ratio(one, fixed, t, s["algorithm"]), one.advantage
    if s["algorithm"] == "rloo":
        return ratio * advantage
    low, high = 1 - s["epsilon"], 1 + (s["epsilon_high"] if s["epsilon_high"] is not None else s["epsilon"])
    clipped = low if ratio.real < low else high if ratio.real > high else ratio
    objective = min(ratio * advantage, clipped * advantage, key=np.real)
    if s["dual_clip"] is not None and advantage < 0:
        objective = max(objective, s["dual_clip"] * advantage, key=np.real)
    return objective


def _weight(fixed, t, s):
    difference = fixed.old - fixed.sampler
    log_weight = {"off": 0.0, "token": difference[t], "sequence": difference.sum()}[s["sampler_correction"]]
    return min(np.exp(log_weight), s["sampler_cap"]) if s["sampler_correction"] != "off" else 1.0


KL: dict[str, Callable] = {
    "low_var_kl": lambda d: np.exp(d) - 1 - d,
    "mse_kl": lambda d: d**2 / 2,
    "abs": lambda d: d if d.real > 0 else -d,
    "kl": lambda d: -d,
}
