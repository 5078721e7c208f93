"""Distillation: a student learns a teacher's distributions over the vocabulary, a chunk of tokens at a time.

With p and q the teacher's and the student's softmax at temperature tau, and p_1, q_1 those at 1, a token's loss is
(Hinton et al., arXiv:1503.02531, section 2)

    alpha * tau^2 * KL + (1 - alpha) * -log q_1(label),    KL = sum p log(p / q)   forward: the student covers p
                                                           or   sum q log(q / p)   reverse: it picks p's modes

tau^2 keeps the soft gradient's size as tau grows, since the gradient of each KL falls as 1 / tau^2.

What crosses from teacher to student is the teacher's final hidden states, with its head applied here, or the k most
probable tokens with their log-probabilities and the probability of all others together. The tail then counts as one
outcome more: that KL is a lower bound of the whole one, equal to it at k = V, and it keeps the student's mass off the
tail, which renormalising both over the k tokens wouldn't.

Logits exist for a chunk of tokens at a time, as in `models.ops.vocab`: the loss is a plain sum, so one pass over a
chunk's logits yields value and gradients, and nothing is computed twice. Gradients with respect to the logits are
spelled out rather than left to autodiff, whose p * sum(q) - q isn't zero to the last bit where p = q: here a model
distilled into itself has a KL of exactly 0 and a gradient of exactly 0. Nothing flows to the teacher.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from models.ops.chunks import (
    accumulate,
    accumulators,
    cast_like,
    checked_chunk_size,
    is_target,
    join_chunks,
    split_chunks,
    stat_dtype,
    zero_where,
)
from models.ops.vocab import HeadFn
from posttrain.losses.base import LossOutput, Mean
from recipes.complaints import nearest

DIVERGENCES = ("forward_kl", "reverse_kl")


class TeacherHidden(NamedTuple):
    """A teacher at hand.

    Attributes:
        hidden_RTE: its final hidden states, of any width E.
        head_params: pytree of its head's arrays.
    """

    hidden_RTE: Float[Array, "R T E"]
    head_params: Any


class TeacherTopK(NamedTuple):
    """A teacher's most probable tokens, all at the loss's temperature.

    Attributes:
        indices_RTK: token ids, distinct within a position.
        logprobs_RTK: their log-probabilities.
        tail_RT: log of the probability of all other tokens together; -inf at k = V.
    """

    indices_RTK: Int[Array, "R T K"]
    logprobs_RTK: Float[Array, "R T K"]
    tail_RT: Float[Array, "R T"]


class _Spec(NamedTuple):
    teacher_head_fn: HeadFn | None
    divergence: str
    temperature: float
    alpha: float
    chunk_size: int


class _Sums(NamedTuple):
    loss: jax.Array
    soft: jax.Array
    hard: jax.Array


def distillation_loss(
    head_fn: HeadFn,
    head_params: Any,
    hidden_RTD: Float[Array, "R T D"],
    teacher: TeacherHidden | TeacherTopK,
    labels_RT: Int[Array, "R T"],
    mask_RT: Bool[Array, "R T"] | Int[Array, "R T"] | Float[Array, "R T"],
    *,
    teacher_head_fn: HeadFn | None,
    divergence: str,
    temperature: float,
    alpha: float,
    chunk_size: int,
) -> LossOutput:
    """The loss of the module's docstring, summed over tokens; differentiable in `head_params` and `hidden_RTD`.

    A token whose mask is 0 contributes exactly zero to value and gradients, whatever the arrays hold there. Metrics:
    `distill/soft_loss` is tau^2 * KL and `distill/hard_loss` the cross entropy, both before alpha.

    Args:
        head_fn: the student's head, (head_params, hidden_BCD) -> logits_BCV; static under `jit`.
        head_params: pytree of its arrays.
        hidden_RTD: the student's final hidden states.
        teacher: what crosses.
        labels_RT: token ids. One outside the vocabulary makes the hard loss NaN where its token counts.
        mask_RT: the weight of each token, or whether it counts.
        teacher_head_fn: the teacher's head, as `head_fn`; None exactly where the teacher is a TeacherTopK.
        divergence: one of DIVERGENCES.
        temperature: tau, positive. A TeacherTopK must have been taken at the same.
        alpha: in [0, 1]: the soft loss's share.
        chunk_size: tokens whose logits exist at a time, rounded down to whole columns of R tokens (at least one).

    Raises:
        ValueError: a setting is unknown or out of range, or the two vocabularies differ in size.
    """
    check_distillation_settings(divergence=divergence, temperature=temperature, alpha=alpha)
    assert (teacher_head_fn is None) == isinstance(teacher, TeacherTopK)
    spec = _Spec(teacher_head_fn, divergence, float(temperature), float(alpha), checked_chunk_size(chunk_size))
    weights = lax.stop_gradient(mask_RT.astype(stat_dtype(hidden_RTD)))
    known: Any = teacher
    teacher_params = None
    if isinstance(teacher, TeacherHidden):
        known, teacher_params = teacher
    sums = _distill(head_fn, spec, head_params, hidden_RTD, known, teacher_params, labels_RT, weights)
    weight_sum = weights.sum()
    means = {"soft_loss": sums.soft, "hard_loss": sums.hard}
    metrics = {f"distill/{name}": Mean(lax.stop_gradient(value), weight_sum) for name, value in means.items()}
    return LossOutput(sums.loss, weight_sum, metrics)


def teacher_top_k(
    head_fn: HeadFn,
    head_params: Any,
    hidden_RTD: Float[Array, "R T D"],
    *,
    k: int,
    temperature: float,
    chunk_size: int,
) -> TeacherTopK:
    """A teacher's k most probable tokens of each position, without the batch's logits in memory.

    Args:
        head_fn: maps (head_params, hidden_BCD) to logits_BCV.
        head_params: pytree of the head's arrays.
        hidden_RTD: final hidden states.
        k: tokens to keep, 1 to V.
        temperature: positive divisor of the logits; that of the loss to come.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        Tokens in the order of falling probability. No gradient flows from it.

    Raises:
        ValueError: k or the temperature is out of range.
    """
    check_distillation_settings(divergence="forward_kl", temperature=temperature, alpha=1.0)

    def body(_, chunk):
        logits = _settled(head_fn(head_params, chunk)).astype(stat_dtype(chunk))
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(
                f"distill.top_k={k}: the vocabulary has {logits.shape[-1]} tokens; set it to 1 or more of them"
            )
        logprobs = _log_softmax(logits / temperature)
        kept, indices = lax.top_k(logprobs, k)
        return None, TeacherTopK(indices, kept, _tail(logprobs, indices))

    _, chunks = lax.scan(body, None, split_chunks(hidden_RTD, checked_chunk_size(chunk_size)))
    return lax.stop_gradient(jax.tree.map(lambda x: join_chunks(x, hidden_RTD.shape[1]), chunks))


def check_distillation_settings(*, divergence: str, temperature: float, alpha: float) -> None:
    """Checks the settings of `distillation_loss`.

    Raises:
        ValueError: in the house form.
    """
    if divergence not in DIVERGENCES:
        guess = nearest(divergence, DIVERGENCES)
        raise ValueError(
            f"distill.divergence: {divergence!r}: no such divergence; "
            + (f"did you mean {guess}? " if guess else "")
            + f"use {', '.join(DIVERGENCES)}"
        )
    if not temperature > 0:
        raise ValueError(
            f"distill.temperature={temperature}: it divides the logits of both models; set it above 0 (1 for none)"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill.alpha={alpha}: it is the soft loss's share of the loss; set it in [0, 1]")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _distill(head_fn, spec, head_params, hidden, known, teacher_params, labels, weights) -> _Sums:
    def body(sums, chunk):
        hidden, known, labels, weights = chunk
        logits = head_fn(head_params, zero_where(weights == 0, hidden))
        more, _ = _chunk(spec, logits, known, teacher_params, labels, weights)
        return jax.tree.map(jnp.add, sums, more), None

    chunks = split_chunks((hidden, known, labels, weights), spec.chunk_size)
    return lax.scan(body, _no_sums(weights), chunks)[0]


def _distill_fwd(head_fn, spec, head_params, hidden, known, teacher_params, labels, weights):
    def body(carry, chunk):
        hidden, known, labels, weights = chunk
        dead = weights == 0
        logits, vjp_fn = jax.vjp(head_fn, head_params, zero_where(dead, hidden))
        more, grad_logits = _chunk(spec, logits, known, teacher_params, labels, weights)
        head_grads, hidden_grad = vjp_fn(grad_logits.astype(logits.dtype))
        carry = (jax.tree.map(jnp.add, carry[0], more), accumulate(carry[1], head_grads))
        return carry, zero_where(dead, hidden_grad)

    chunks = split_chunks((hidden, known, labels, weights), spec.chunk_size)
    (sums, head_grads), hidden_grad = lax.scan(body, (_no_sums(weights), accumulators(head_params)), chunks)
    return sums, (head_params, head_grads, join_chunks(hidden_grad, hidden.shape[1]))


def _distill_bwd(head_fn, spec, residuals, cotangents: _Sums):
    head_params, head_grads, hidden_grad = residuals
    scale = cotangents.loss
    head_grads = cast_like(jax.tree.map(lambda grad: grad * scale, head_grads), head_params)
    return head_grads, (hidden_grad * scale).astype(hidden_grad.dtype), None, None, None, None


_distill.defvjp(_distill_fwd, _distill_bwd)


def _no_sums(weights):
    return _Sums(*(jnp.zeros((), weights.dtype) for _ in range(3)))


def _chunk(spec, logits, known, teacher_params, labels, weights):
    """One chunk's sums, and the gradient of its loss with respect to the student's logits."""
    logits = _settled(logits).astype(weights.dtype)
    student = _log_softmax(logits / spec.temperature)
    if isinstance(known, TeacherTopK):
        teacher = _spread_tail(known, student)
    else:
        teacher_logits = _settled(spec.teacher_head_fn(teacher_params, known)).astype(weights.dtype)
        if teacher_logits.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"distill: the teacher's vocabulary has {teacher_logits.shape[-1]} tokens, the student's "
                f"{logits.shape[-1]}: their probabilities are compared token by token; use models of one tokenizer"
            )
        teacher = _log_softmax(teacher_logits / spec.temperature)
    kl, kl_slope = _divergence(spec.divergence, student, teacher)
    logprobs = student if spec.temperature == 1.0 else _log_softmax(logits)
    is_label = is_target(labels, logits)
    known_label = (labels >= 0) & (labels < logits.shape[-1])
    hard = jnp.where(known_label, -jnp.where(is_label, logprobs, 0).sum(-1), jnp.nan)
    soft = spec.temperature**2 * kl
    # d KL / d logits has a 1 / tau from the temperature, which leaves one of tau^2. A part without a share is left out
    # rather than multiplied by 0, which would let its NaN through.
    loss, slope = jnp.zeros_like(soft), jnp.zeros_like(logits)
    if spec.alpha > 0:
        loss, slope = loss + spec.alpha * soft, slope + spec.alpha * spec.temperature * kl_slope
    if spec.alpha < 1:
        loss, slope = loss + (1 - spec.alpha) * hard, slope + (1 - spec.alpha) * (jnp.exp(logprobs) - is_label)
    dead = weights == 0
    sums = _Sums(*(jnp.where(dead, 0, values * weights).sum() for values in (loss, soft, hard)))
    return sums, zero_where(dead, slope * weights[..., None])


def _divergence(name, student, teacher):
    """KL of log-probabilities [..., V], and its slope with respect to the logits that the student's came from.

    With u the logits over tau: forward, dKL/du = q - p; reverse, dKL/du = q (log(q / p) - KL).
    """
    p, q = jnp.exp(teacher), jnp.exp(student)
    if name == "forward_kl":
        # Where p is 0, so is its term, though log p is -inf.
        return jnp.where(p > 0, p * (teacher - student), 0).sum(-1), q - p
    surprise = jnp.where(q > 0, student - teacher, 0)
    kl = (q * surprise).sum(-1)
    return kl, q * (surprise - kl[..., None])


def _spread_tail(known: TeacherTopK, student):
    """The teacher's log-probabilities [..., V], its tail spread over the other tokens as the student spreads its own.

    Each token of the tail then has the same ratio p / q, that of the two tails: the KL over all tokens, and its slope,
    are those over the k tokens and the tail as one outcome.
    """
    shift = known.tail_RT - _tail(student, known.indices_RTK)
    spread = student + shift[..., None].astype(student.dtype)
    logprobs = known.logprobs_RTK.astype(student.dtype)
    return jnp.put_along_axis(spread, known.indices_RTK, logprobs, axis=-1, inplace=False)


def _tail(logprobs, indices):
    """The log of the probability of all tokens but these."""
    rest = jnp.put_along_axis(logprobs, indices, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(rest, axis=-1)


def _settled(logits):
    # XLA may skip a rounding to bfloat16 that is widened again at once, and does so for one model's logits and not for
    # the other's, as their uses differ; then a model would differ from itself.
    return lax.optimization_barrier(logits)


def _log_softmax(logits):
    return jax.nn.log_softmax(logits, axis=-1)
