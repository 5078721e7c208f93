"""Learning rate schedules, as functions of the number of completed steps."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from recipes.schema import ScheduleSection

Shape = Callable[[Float[Array, ""]], Float[Array, ""]]


def make_schedule(section: ScheduleSection, peak: float, total_steps: int) -> optax.Schedule:
    """Builds the recipe's schedule: a warm-up, then the kind's shape, then 0.

    With S steps in all, of which W = int(S * warmup_fraction) warm up, the rate of step t is

        t < W        peak * t / W: the first step's is 0
        W <= t < S   cosine, linear: falls from peak at t = W to final = peak * final_fraction at t = S - 1
                     constant: peak
                     wsd: peak, then falls to final over the last int(S * decay_fraction) steps
        t >= S       0

    A fall over n steps is at i / (n - 1) of its way at its i-th step (i = 0, 1, ...), so that its first step has the
    peak rate and its last the final one; a fall of a single step has the peak rate.

    Args:
        section: the recipe's `schedule`.
        peak: the largest rate.
        total_steps: the schedule's length where the section names none.

    Returns:
        A function from a step number (0 is the first step; int, or an int32 scalar) to the rate, a float32 scalar.
    """
    steps = total_steps if section.steps is None else section.steps
    warmup = int(steps * section.warmup_fraction)
    final = peak * section.final_fraction
    shape = _SHAPES[section.decay_shape if section.kind == "wsd" else section.kind]
    fall = int(steps * section.decay_fraction) if section.kind == "wsd" else steps - warmup

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((step - (steps - fall)) / max(fall - 1, 1), 0.0, 1.0)
        kept = shape(progress)
        rate = peak * kept + final * (1 - kept)
        rate = jnp.where(step < warmup, peak * step / max(warmup, 1), rate)
        return jnp.where(step < steps, rate, 0.0)

    return schedule


def _cosine(progress: Float[Array, ""]) -> Float[Array, ""]:
    """Half a cosine from 1 to 0 (SGDR, arXiv:1608.03983, equation 5)."""
    return 0.5 * (1 + jnp.cos(math.pi * progress))


def _linear(progress: Float[Array, ""]) -> Float[Array, ""]:
    return 1 - progress


def _hold(progress: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.ones_like(progress)


_SHAPES: dict[str, Shape] = {"cosine": _cosine, "linear": _linear, "constant": _hold}
