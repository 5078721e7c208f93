"""From final hidden states to token log-probabilities and cross entropy, a chunk of tokens at a time.

The logits of a batch are its largest array by far (16k tokens of a 50k vocabulary take 3.3 GB in float32), and no loss
needs them all at once. Every function here scans over chunks of tokens and keeps, of each chunk's logits, only what a
loss reads.

- `cross_entropy_sum` differentiates while it runs: one chunk's logits yield the loss and, where a gradient is asked
  for, the gradients with respect to the hidden states and the head. Nothing is computed twice (three matrix products
  a chunk, as in the unchunked loss), because the loss is a plain sum and its cotangent only scales the result.
- `token_logprobs` serves losses that are any function of the log-probabilities (DPO, GRPO, distillation): cotangents
  differ by token, so the backward pass computes each chunk's logits again.

The head is a pure function `head_fn(head_params, hidden_BCD) -> logits_BCV`, static under `jit`. It may hold the final
norm, a scale and a soft cap, for all of which the gradients are exact; it must not close over traced arrays. Leaves of
`head_params` that are not floating point (a quantised kernel) get no gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

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

HeadFn = Callable[[Any, Float[Array, "B C D"]], Float[Array, "B C V"]]

# One chunk's float32 logits. On a CPU small chunks win, since they stay in its caches, until the matrix products
# starve: of 32 to 4096 tokens, 128 were the best or within noise of it for vocabularies from 512 to 50304
# (bench/chunked_loss.py). An accelerator reads the head and adds to its gradient once a chunk, and where the head is
# sharded over the batch's axes it gathers and reduces them too: it wants as many tokens as memory can spare.
_CPU_CHUNK_BYTES = 2**20
_ACCELERATOR_CHUNK_BYTES = 512 * 2**20
_MIN_CHUNK_TOKENS = 128


class TokenStats(NamedTuple):
    """What `token_logprobs` keeps of each token's logits, all float32 (float64 where the hidden states are).

    Attributes:
        logprob_BT: log-probability of the target, in nats, at the given temperature.
        logsumexp_BT: log of the softmax's denominator, of the logits divided by the temperature.
        entropy_BT: entropy of the softmax in nats, or None where it was not asked for.
    """

    logprob_BT: Float[Array, "B T"]
    logsumexp_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"] | None


class LossSum(NamedTuple):
    """A cross entropy before division, all float32 scalars (float64 where the hidden states are).

    Attributes:
        loss_sum: weighted sum over tokens of the cross entropy and the z term. The only differentiable field.
        z_sum: the z term's part of `loss_sum`, a metric: its cotangent is ignored.
        weight_sum: sum of the weights, the divisor of a mean: a constant.
    """

    loss_sum: Float[Array, ""]
    z_sum: Float[Array, ""]
    weight_sum: Float[Array, ""]


class _StatsSpec(NamedTuple):
    chunk_size: int
    temperature: float
    with_entropy: bool


class _LossSpec(NamedTuple):
    chunk_size: int
    z_loss: float


def default_chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Chooses how many tokens' logits exist at a time, from a byte budget for the backend in use.

    Args:
        num_tokens: tokens of the batch (B * T). A batch sharded over k devices splits each chunk over them, so pass
            one device's tokens and multiply the result by k.
        vocab_size: columns of the head.

    Returns:
        A number of tokens in [1, num_tokens]: a power of two unless it is `num_tokens` itself.
    """
    budget = _CPU_CHUNK_BYTES if jax.default_backend() == "cpu" else _ACCELERATOR_CHUNK_BYTES
    affordable = max(budget // (4 * vocab_size), _MIN_CHUNK_TOKENS)
    return max(1, min(num_tokens, 2 ** int(math.log2(affordable))))


def token_logprobs(
    head_fn: HeadFn,
    head_params: Any,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    *,
    chunk_size: int,
    temperature: float,
    with_entropy: bool,
) -> TokenStats:
    """Computes each target's log-probability without materialising the batch's logits.

    Differentiable with respect to `head_params` and `hidden_BTD`, through all fields of the result. A token whose
    cotangents are all zero contributes exactly zero, even where its hidden state is not finite. Accumulation over
    chunks is float32, whatever the parameters' dtype.

    Args:
        head_fn: maps (head_params, hidden_BCD) to logits_BCV.
        head_params: pytree of the head's arrays.
        hidden_BTD: final hidden states.
        targets_BT: token ids. Ids outside the vocabulary (the filler of padding) are clamped into it: mask them out.
        chunk_size: tokens whose logits exist at a time, rounded down to whole columns of B tokens (at least one).
        temperature: positive divisor of the logits; 1.0 for the model's own distribution.
        with_entropy: whether to compute the entropy.

    Raises:
        ValueError: `chunk_size` or `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(
            f"token_logprobs: temperature={temperature}: log-probabilities need a positive divisor; greedy decoding "
            "is scored at temperature=1.0"
        )
    spec = _StatsSpec(checked_chunk_size(chunk_size), float(temperature), with_entropy)
    return _token_stats(head_fn, spec, head_params, hidden_BTD, targets_BT)


def cross_entropy_sum(
    head_fn: HeadFn,
    head_params: Any,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Shaped[Array, "B T"],
    *,
    z_loss: float,
    chunk_size: int,
) -> LossSum:
    """Sums weight * (logsumexp - logit[target] + z_loss * logsumexp**2) over tokens, without division.

    The z term keeps the softmax's denominator near one (PaLM, arXiv:2204.02311, section 5). Differentiable with respect
    to `head_params` and `hidden_BTD`; the weights are constants. A token of weight 0 contributes exactly zero to values
    and gradients, whatever its hidden state and its target hold. When differentiated, the gradients are computed in the
    forward pass and kept ([B, T, D] and the head's shape), not the logits.

    Args:
        head_fn: maps (head_params, hidden_BCD) to logits_BCV.
        head_params: pytree of the head's arrays.
        hidden_BTD: final hidden states.
        targets_BT: token ids. One outside the vocabulary makes the sums NaN, unless its weight is 0.
        weights_BT: a mask or a factor per token (bool, integer or floating point).
        z_loss: coefficient of the z term; 0.0 leaves it out.
        chunk_size: tokens whose logits exist at a time, rounded down to whole columns of B tokens (at least one).

    Raises:
        ValueError: `chunk_size` is not positive.
    """
    spec = _LossSpec(checked_chunk_size(chunk_size), float(z_loss))
    weights_BT = lax.stop_gradient(jnp.asarray(weights_BT, stat_dtype(hidden_BTD)))
    return _loss_sum(head_fn, spec, head_params, hidden_BTD, targets_BT, weights_BT)


# --- cross entropy: gradients in the forward pass ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sum(head_fn, spec, head_params, hidden_BTD, targets_BT, weights_BT) -> LossSum:
    def body(carry, chunk):
        hidden, targets, weights = chunk
        logits = _apply_head(head_fn, head_params, zero_where(weights == 0, hidden))
        loss, z, _, _ = _weighted_loss(logits.astype(weights.dtype), targets, weights, spec.z_loss)
        return (carry[0] + loss, carry[1] + z), None

    zero = jnp.zeros((), weights_BT.dtype)
    chunks = split_chunks((hidden_BTD, targets_BT, weights_BT), spec.chunk_size)
    (loss, z), _ = lax.scan(body, (zero, zero), chunks)
    return LossSum(loss, z, weights_BT.sum())


def _loss_sum_fwd(head_fn, spec, head_params, hidden_BTD, targets_BT, weights_BT):
    def body(carry, chunk):
        hidden, targets, weights = chunk
        dead = weights == 0
        # A masked token's hidden state may be anything, and NaN * 0 is NaN in the head's gradient.
        logits, vjp_fn = jax.vjp(functools.partial(_apply_head, head_fn), head_params, zero_where(dead, hidden))
        loss, z, softmax_scale, exp = _weighted_loss(logits.astype(weights.dtype), targets, weights, spec.z_loss)
        grad_logits = exp * softmax_scale[..., None] - jnp.where(is_target(targets, logits), weights[..., None], 0)
        head_grads, hidden_grad = vjp_fn(grad_logits.astype(logits.dtype))
        carry = (carry[0] + loss, carry[1] + z, accumulate(carry[2], head_grads))
        return carry, zero_where(dead, hidden_grad)

    zero = jnp.zeros((), weights_BT.dtype)
    chunks = split_chunks((hidden_BTD, targets_BT, weights_BT), spec.chunk_size)
    (loss, z, head_grads), hidden_grad = lax.scan(body, (zero, zero, accumulators(head_params)), chunks)
    residuals = (head_params, head_grads, join_chunks(hidden_grad, hidden_BTD.shape[1]))
    return LossSum(loss, z, weights_BT.sum()), residuals


def _loss_sum_bwd(head_fn, spec, residuals, cotangents: LossSum):
    head_params, head_grads, hidden_grad = residuals
    scale = cotangents.loss_sum
    head_grads = cast_like(jax.tree.map(lambda grad: grad * scale, head_grads), head_params)
    return head_grads, (hidden_grad * scale).astype(hidden_grad.dtype), None, None


_loss_sum.defvjp(_loss_sum_fwd, _loss_sum_bwd)


def _weighted_loss(logits_BCV, targets_BC, weights_BC, z_loss):
    """Returns the chunk's loss and z sums, and the two factors of d loss / d logsumexp * softmax: scale_BC, exp_BCV."""
    exp, total, logsumexp = _exponentials(logits_BCV)
    target_logit = jnp.where(is_target(targets_BC, logits_BCV), logits_BCV, 0).sum(-1)
    valid = ((targets_BC >= 0) & (targets_BC < logits_BCV.shape[-1])) | (weights_BC == 0)
    z = z_loss * jnp.square(logsumexp)
    loss = jnp.where(valid, logsumexp - target_logit + z, jnp.nan)
    softmax_scale = weights_BC * (1 + 2 * z_loss * logsumexp) / total
    return (weights_BC * loss).sum(), (weights_BC * z).sum(), softmax_scale, exp


# --- token log-probabilities: logits computed again in the backward pass ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_stats(head_fn, spec, head_params, hidden_BTD, targets_BT) -> TokenStats:
    def body(_, chunk):
        hidden, targets = chunk
        logits = _apply_head(head_fn, head_params, hidden).astype(stat_dtype(hidden)) / spec.temperature
        exp, total, logsumexp = _exponentials(logits)
        targets = jnp.clip(targets, 0, logits.shape[-1] - 1)
        target_logit = jnp.where(is_target(targets, logits), logits, 0).sum(-1)
        entropy = None
        if spec.with_entropy:
            # Shifted logits, so that the two terms do not cancel where the logits are large.
            shifted = logits - logits.max(-1, keepdims=True)
            entropy = jnp.log(total) - (exp * shifted).sum(-1) / total
        return None, TokenStats(target_logit - logsumexp, logsumexp, entropy)

    _, stats = lax.scan(body, None, split_chunks((hidden_BTD, targets_BT), spec.chunk_size))
    return jax.tree.map(lambda x: join_chunks(x, hidden_BTD.shape[1]), stats)


def _token_stats_fwd(head_fn, spec, head_params, hidden_BTD, targets_BT):
    stats = _token_stats(head_fn, spec, head_params, hidden_BTD, targets_BT)
    return stats, (head_params, hidden_BTD, targets_BT, stats)


def _token_stats_bwd(head_fn, spec, residuals, cotangents: TokenStats):
    head_params, hidden_BTD, targets_BT, stats = residuals

    def body(head_grads, chunk):
        hidden, targets, stats, cotangents = chunk
        dead = functools.reduce(jnp.logical_and, [cotangent == 0 for cotangent in jax.tree.leaves(cotangents)])
        logits, vjp_fn = jax.vjp(functools.partial(_apply_head, head_fn), head_params, zero_where(dead, hidden))
        grad_logits = _stats_grad(logits, targets, stats, cotangents, spec.temperature)
        more, hidden_grad = vjp_fn(zero_where(dead, grad_logits).astype(logits.dtype))
        return accumulate(head_grads, more), zero_where(dead, hidden_grad)

    chunks = split_chunks((hidden_BTD, targets_BT, stats, cotangents), spec.chunk_size)
    head_grads, hidden_grad = lax.scan(body, accumulators(head_params), chunks)
    return cast_like(head_grads, head_params), join_chunks(hidden_grad, hidden_BTD.shape[1]), None


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)


def _stats_grad(logits_BCV, targets_BC, stats: TokenStats, cotangents: TokenStats, temperature: float):
    """Pulls the statistics' cotangents back to the logits.

    With p the softmax and H its entropy: d logprob = onehot - p, d logsumexp = p, d H = -p * (log p + H).
    """
    logprobs = logits_BCV.astype(stats.logsumexp_BT.dtype) / temperature - stats.logsumexp_BT[..., None]
    softmax_cotangent = (cotangents.logsumexp_BT - cotangents.logprob_BT)[..., None]
    if stats.entropy_BT is not None and cotangents.entropy_BT is not None:
        surprise = logprobs + stats.entropy_BT[..., None]
        softmax_cotangent = softmax_cotangent - cotangents.entropy_BT[..., None] * surprise
    targets_BC = jnp.clip(targets_BC, 0, logits_BCV.shape[-1] - 1)
    onehot_term = jnp.where(is_target(targets_BC, logits_BCV), cotangents.logprob_BT[..., None], 0)
    return (jnp.exp(logprobs) * softmax_cotangent + onehot_term) / temperature


def _apply_head(head_fn, head_params, hidden_BCD):
    # Not flattened to [B * C, D], so that B and C may be sharded over different mesh axes.
    return head_fn(head_params, hidden_BCD)


def _exponentials(logits_BCV):
    """Returns exp(logits - max), its sum and the logsumexp, with one exponential per logit."""
    peak = logits_BCV.max(-1, keepdims=True)
    exp = jnp.exp(logits_BCV - peak)
    total = exp.sum(-1)
    return exp, total, jnp.log(total) + peak[..., 0]
