"""Feature distillation: the student's hidden layers follow the teacher's."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from posttrain.losses.base import LossOutput, Mean


def _cosine(student, teacher):
    """1 - cos of the angle between two vectors, 1 where either is zero."""

    def unit(x):
        square = jnp.square(x).sum(-1, keepdims=True)
        return x * lax.rsqrt(jnp.where(square == 0, 1, square))

    return 1 - (unit(student) * unit(teacher)).sum(-1)


def _l2(student, teacher):
    return jnp.square(student - teacher).mean(-1)


FEATURE_LOSSES: dict[str, Callable] = {"cosine": _cosine, "l2": _l2}


def feature_loss(
    student_LRTD: Float[Array, "L R T D"],
    teacher_LRTE: Float[Array, "L R T E"],
    mask_RT: Bool[Array, "R T"] | Int[Array, "R T"] | Float[Array, "R T"],
    *,
    kind: str,
) -> LossOutput:
    """Distance of hidden states, averaged over layers and summed over tokens; differentiable in the student's alone.

    `cosine` is 1 - cos(s, t), and `l2` the mean of (s - t)^2 over the width. A token whose mask is 0 contributes
    exactly zero.

    Args:
        student_LRTD: hidden states after the selected layers.
        teacher_LRTE: the teacher's after the layers they are paired with; E must be D.
        mask_RT: the weight of each token, or whether it counts.
        kind: one of FEATURE_LOSSES.

    Raises:
        ValueError: the kind is unknown, or the widths differ.
    """
    if kind not in FEATURE_LOSSES:
        raise ValueError(f"distill.feature_loss: {kind!r}: no such loss; use {', '.join(FEATURE_LOSSES)}")
    if student_LRTD.shape[-1] != teacher_LRTE.shape[-1]:
        raise ValueError(
            f"distill.feature_loss={kind}: hidden states of width {student_LRTD.shape[-1]} and of width "
            f"{teacher_LRTE.shape[-1]} in the teacher can't be compared; set distill.feature_coefficient=0"
        )
    dtype = jnp.promote_types(jnp.float32, student_LRTD.dtype)
    weights = lax.stop_gradient(mask_RT.astype(dtype))
    live = (weights != 0)[..., None]
    student, teacher = (jnp.where(live, x.astype(dtype), 0) for x in (student_LRTD, teacher_LRTE))
    per_token = FEATURE_LOSSES[kind](student, lax.stop_gradient(teacher)).mean(0)
    loss_sum, weight_sum = (per_token * weights).sum(), weights.sum()
    return LossOutput(loss_sum, weight_sum, {"distill/feature_loss": Mean(lax.stop_gradient(loss_sum), weight_sum)})


def add_feature_loss(distillation: LossOutput, features: LossOutput, *, coefficient: float) -> LossOutput:
    """The loss of both, over the same tokens: distillation + coefficient * features."""
    return LossOutput(
        distillation.loss_sum + coefficient * features.loss_sum,
        distillation.weight_sum,
        distillation.metrics | features.metrics,
    )
