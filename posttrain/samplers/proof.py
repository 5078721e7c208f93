"""Proofs that an engine holds the trainer's weights and computes with them: the trainer's side, and the comparisons.

Three probes, each of which sees what the one before cannot:

- A checksum of every tensor, bit for bit, as the engine's loader receives it. It shows a tensor that is stale, swapped,
  transposed or gathered wrong on its way. Both sides compute it on their own layout of the tensor.
- The output of every linear layer for a fixed input. It shows a tensor that arrived and was not put to use; engines
  pack weights, so the tensors themselves cannot be read back.
- The log-probabilities of one sampled completion. They show what no single layer does: rotary angles, masks, stale
  caches, a temperature that is not applied, the log-probability of another token.

The probe's prompt is the same every time and longer than a block of the engine's prefix cache, so that a cache that
outlives a sync answers it with old keys and values.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from models.checkpoints.hf_names import HEAD_NAME, Tensor, checkpoint_tensors
from models.functional import FunctionalModel, Params
from models.ops.head import output_logits
from models.ops.vocab import default_chunk_size, token_logprobs
from models.parameters import flatten, param_specs
from posttrain.samplers.base import Completion, Prompt, SamplerError, Sampling

PROBE_TEMPERATURE = 0.7
PROBE_TOKENS = 8
PROBE_ID = -1
"""The prompt id of the probe, which no caller's prompt has."""
_EMBEDDING_ROWS = 3
_LENGTH_STEP = 64


@dataclass(frozen=True)
class ProofSettings:
    """How often a sync proves itself, and what it accepts."""

    every: int
    """Syncs from one proof to the next: 1 proves each, 0 none. The first sync is proven unless this is 0."""
    layer_tolerance: float
    """Of a layer's output, relative to its largest magnitude."""
    logprob_tolerance: float
    """Of a log-probability, absolute, in nats."""


def proof_settings(dtype: str, *, every: int) -> ProofSettings:
    """The settings for an engine that computes in `dtype`: float32, bfloat16 or float16.

    Two sound programs differ by 3e-6 nats in float32. In bfloat16 each of them is 3e-2 off float32 (first weights of a
    small model, temperature 1; more at lower ones), so their difference says little below 0.1; planted faults are
    beyond 0.5.
    """
    layer, logprob = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 0.15), "float16": (5e-3, 2e-2)}[dtype]
    return ProofSettings(every=every, layer_tolerance=layer, logprob_tolerance=logprob)


def leaf_path(tensor: Tensor, *, scanned: bool) -> tuple[str, ...]:
    """Where the leaf that holds a tensor stands in a tree in Linen's naming."""
    if tensor.layer is None:
        return tensor.path
    return ("decoder", "layers" if scanned else f"layers_{tensor.layer}", *tensor.path)


def layer_axis(tensor: Tensor, model: FunctionalModel) -> int | None:
    """The axis of a tensor's leaf that counts layers; None where the leaf holds one tensor."""
    if tensor.layer is None or not model.options.scan_layers:
        return None
    return min(model.options.param_scan_axis, len(tensor.shape))


def check_tree(model: FunctionalModel, params: Params) -> None:
    """Checks that a tree is the whole model: a policy's adapters alone, say, are not.

    Raises:
        ValueError: naming every leaf that is missing, surplus or of another shape.
    """
    options = model.options
    specs = dict(
        flatten(param_specs(model.config, scan_layers=options.scan_layers, param_scan_axis=options.param_scan_axis))
    )
    leaves = dict(flatten(params))
    problems = [f"missing: {'/'.join(path)} {list(spec.shape)}" for path, spec in specs.items() if path not in leaves]
    for path, leaf in leaves.items():
        if path not in specs:
            problems.append(f"surplus: {'/'.join(path)} {list(leaf.shape)}")
        elif tuple(leaf.shape) != specs[path].shape:
            problems.append(f"misshapen: {'/'.join(path)} {list(leaf.shape)}, expected {list(specs[path].shape)}")
    if problems:
        raise ValueError(
            f"sync: {len(problems)} parameters: a sampler takes over the whole policy, with adapters merged; give it "
            "the model's full tree:\n  " + "\n  ".join(problems)
        )


def checksum_weights(count: int, *, salt: int) -> np.ndarray:
    """uint32 [count], odd and without pattern: the factor of each row or column in a checksum.

    The mixing is that of the lowbias32 hash (Wellons, "Prospecting for hash functions").
    """
    mixed = np.arange(count, dtype=np.uint32) + np.uint32(salt)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return (mixed ^ (mixed >> np.uint32(16))) | np.uint32(1)


ROW_SALT, COLUMN_SALT = 1, 0x9E3779B1


def probe_vector(count: int) -> np.ndarray:
    """float32 [count] in [-1, 1]: what every linear layer with that many inputs is given."""
    return (checksum_weights(count, salt=7) / 2.0**31 - 1.0).astype(np.float32)


def probe_rows(count: int) -> list[int]:
    """The rows of an embedding of `count` rows that are compared."""
    return [index * (count - 1) // (_EMBEDDING_ROWS - 1) for index in range(_EMBEDDING_ROWS)]


def probe(model: FunctionalModel, block_tokens: int, *, max_length: int) -> tuple[Prompt, Sampling]:
    """What is completed after a sync: a prompt past one block of the prefix cache, where the engine's length allows.

    The temperature is one at which a log-probability shows whether it was applied.
    """
    max_tokens = min(PROBE_TOKENS, max_length - 1)
    ids = checksum_weights(min(block_tokens + PROBE_TOKENS, max_length - max_tokens), salt=11)
    tokens = tuple(int(token) for token in ids % np.uint32(model.config.vocab_size))
    return Prompt(tokens, PROBE_ID), Sampling(max_tokens=max_tokens, temperature=PROBE_TEMPERATURE)


def trainer_checksums(model: FunctionalModel, params: Params) -> dict[str, int]:
    """The checksum of each tensor under its Hugging Face name, from the trainer's own arrays.

    A checksum is the sum of the elements' bits, each times the weights of its row and column in Hugging Face's layout,
    modulo 2**32: exact, whatever the order of the summation. A vector is one row.
    """
    return {name: int(value) for name, value in _by_name(model, jax.device_get(_leaf_checksums(model, params)))}


def trainer_layer_outputs(model: FunctionalModel, params: Params) -> dict[str, np.ndarray]:
    """What every layer must answer, under the Hugging Face name of its weight.

    A matrix answers `weight @ probe_vector + bias`, an embedding its `probe_rows`, a norm its weight. A tied head has
    no weight of its own and still answers: engines may keep a packed copy for it.
    """
    answers = jax.device_get(_leaf_outputs(model, params))
    outputs = dict(_by_name(model, answers))
    if model.config.tied_embeddings:
        outputs[HEAD_NAME] = answers[HEAD_NAME]
    return outputs


def trainer_logprobs(
    model: FunctionalModel, params: Params, sequences: Sequence[Sequence[int]], *, temperature: float
) -> list[np.ndarray]:
    """The trainer's log-probability of each token after the first, float32 [n - 1] for a sequence of n.

    Args:
        model: the trainer's.
        params: its parameters.
        sequences: token ids.
        temperature: divisor of the logits; 0 stands for greedy, whose log-probabilities are unscaled.
    """
    longest = max(len(sequence) for sequence in sequences)
    # Few lengths make few programs. Padding stands behind the tokens, where causality keeps it out.
    length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    logprobs = np.asarray(_row_logprobs(model, params, jnp.asarray(tokens), temperature=temperature or 1.0))
    return [row[: len(sequence) - 1] for row, sequence in zip(logprobs, sequences, strict=True)]


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def _row_logprobs(
    model: FunctionalModel, params: Params, tokens: Int[Array, "B T"], *, temperature: float
) -> Float[Array, "B T"]:
    hidden, _ = model.hidden_states(params, tokens)
    head_fn = functools.partial(
        output_logits, softcap=model.config.logits_softcap, dtype=jnp.dtype(model.options.logits_dtype)
    )
    stats = token_logprobs(
        head_fn,
        model.head(params),
        hidden,
        jnp.roll(tokens, -1, axis=1),
        chunk_size=default_chunk_size(tokens.size, model.config.vocab_size),
        temperature=temperature,
        with_entropy=False,
    )
    return stats.logprob_BT.astype(jnp.float32)


def compare_checksums(expected: Mapping[str, int], received: Mapping[str, int]) -> None:
    """Raises SamplerError naming the tensors that the loader did not receive as the trainer holds them."""
    missing = [name for name in expected if name not in received]
    wrong = [name for name in expected if name in received and received[name] != expected[name]]
    if missing or wrong:
        lines = [f"not received: {name}" for name in missing] + [
            f"received with other values: {name}" for name in wrong
        ]
        raise SamplerError(
            f"sync: {len(lines)} of {len(expected)} tensors: the engine's loader must receive what the trainer holds, "
            "bit for bit; the engine's weights are unusable until a sync succeeds:\n  " + "\n  ".join(lines[:20])
        )


def compare_layers(
    expected: Mapping[str, np.ndarray], observed: Mapping[str, np.ndarray], *, tolerance: float
) -> float:
    """Compares what the engine's layers answer with what the trainer's do.

    Returns:
        The largest deviation, relative to the largest magnitude of its layer's answer.

    Raises:
        SamplerError: naming the layers that did not answer, or answered otherwise than by `tolerance`.
    """
    worst, lines = 0.0, []
    for name, mine in expected.items():
        theirs = observed.get(name)
        if theirs is None or theirs.shape != mine.shape:
            lines.append(f"{name}: no answer of shape {list(mine.shape)}")
            continue
        scale = max(float(np.abs(mine).max()), 1e-30)
        deviation = float(np.abs(theirs - mine).max()) / scale
        worst = max(worst, deviation)
        if not deviation <= tolerance:
            lines.append(f"{name}: its output is off by {deviation:.1e} of its largest value (accepted {tolerance:g})")
    if lines:
        raise SamplerError(
            f"sync: {len(lines)} of {len(expected)} layers: the engine does not compute with the trainer's weights; "
            "they are unusable until a sync succeeds:\n  " + "\n  ".join(lines[:20])
        )
    return worst


def check_completions(
    model: FunctionalModel,
    params: Params,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    sampling: Sampling,
    version: int,
    tolerance: float,
) -> float:
    """Recomputes the log-probabilities of completions with the trainer's model, and compares.

    Args:
        model: the trainer's.
        params: the weights of `version`.
        prompts: as given to `generate`.
        completions: as returned.
        sampling: as given to `generate`; without truncation, which changes the distribution.
        version: that the completions must have been sampled with.
        tolerance: absolute, in nats.

    Returns:
        The largest absolute deviation.

    Raises:
        ValueError: truncated sampling.
        SamplerError: another weight version, or a deviation beyond the tolerance; the completion and token are named.
    """
    if sampling.top_k is not None or sampling.top_p != 1.0:
        raise ValueError(
            f"sampling: top_k={sampling.top_k}, top_p={sampling.top_p}: the trainer's distribution is over the whole "
            "vocabulary; compare completions that were sampled without truncation"
        )
    by_id = {prompt.prompt_id: prompt.token_ids for prompt in prompts}
    for completion in completions:
        if completion.weight_version != version:
            raise SamplerError(
                f"{_place(completion)}: sampled by weight version {completion.weight_version}: the trainer holds "
                f"version {version}; sync before sampling"
            )
    sequences = [(*by_id[completion.prompt_id], *completion.token_ids.tolist()) for completion in completions]
    worst = 0.0
    trainer = trainer_logprobs(model, params, sequences, temperature=sampling.temperature) if sequences else []
    for completion, logprobs in zip(completions, trainer, strict=True):
        mine = logprobs[-len(completion.token_ids) :]
        deviations = np.abs(mine - completion.logprobs)
        at = int(np.argmax(np.where(np.isnan(deviations), np.inf, deviations)))
        if not deviations[at] <= tolerance:
            raise SamplerError(
                f"{_place(completion)}: token {at} (id {completion.token_ids[at]}): its log-probability is "
                f"{completion.logprobs[at]:.6f} in the sampler and {mine[at]:.6f} in the trainer (accepted difference "
                f"{tolerance:g}); the sampler does not sample from the trainer's policy"
            )
        worst = max(worst, float(deviations[at]))
    return worst


def _place(completion: Completion) -> str:
    if completion.prompt_id == PROBE_ID:
        return "sync: the probe's completion"
    return f"prompt {completion.prompt_id}, sample {completion.sample_index}"


def _by_name(model: FunctionalModel, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Gives each tensor its part of what was computed for its leaf."""
    for tensor in checkpoint_tensors(model.config):
        value = values.get("/".join(leaf_path(tensor, scanned=model.options.scan_layers)))
        if value is not None:
            yield tensor.name, value if layer_axis(tensor, model) is None else value[tensor.layer]


def _leaves(model: FunctionalModel, params: Params) -> Iterator[tuple[str, Tensor, jax.Array]]:
    """Each leaf once: path, its first tensor, and values [layers, *the tensor's own shape], one layer if unstacked."""
    leaves = dict(flatten(params))
    seen = set()
    for tensor in checkpoint_tensors(model.config):
        path = leaf_path(tensor, scanned=model.options.scan_layers)
        if path in seen:
            continue
        seen.add(path)
        axis = layer_axis(tensor, model)
        yield "/".join(path), tensor, leaves[path][None] if axis is None else jnp.moveaxis(leaves[path], axis, 0)


def _drop_unit(model: FunctionalModel, tensor: Tensor, value: jax.Array) -> jax.Array:
    return value[0] if layer_axis(tensor, model) is None else value


@functools.partial(jax.jit, static_argnames=("model",))
def _leaf_checksums(model: FunctionalModel, params: Params) -> dict[str, jax.Array]:
    sums = {}
    for path, tensor, leaf in _leaves(model, params):
        bits = lax.bitcast_convert_type(leaf, {2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]).astype(jnp.uint32)
        rows, columns = tensor.hf_shape if len(tensor.hf_shape) == 2 else (1, tensor.hf_shape[0])
        row_weights, column_weights = _matrix_weights(rows, columns)
        # The last axis first: XLA's reduction of two axes at once takes longer on a CPU.
        if tensor.form == "linear":
            bits = ((bits.reshape(-1, columns, rows) * row_weights).sum(2, dtype=jnp.uint32)) * column_weights
        else:
            bits = ((bits.reshape(-1, rows, columns) * column_weights).sum(2, dtype=jnp.uint32)) * row_weights
        sums[path] = _drop_unit(model, tensor, bits.sum(1, dtype=jnp.uint32))
    return sums


def _matrix_weights(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    return checksum_weights(rows, salt=ROW_SALT), checksum_weights(columns, salt=COLUMN_SALT)


@functools.partial(jax.jit, static_argnames=("model",))
def _leaf_outputs(model: FunctionalModel, params: Params) -> dict[str, jax.Array]:
    leaves = {path: (tensor, leaf) for path, tensor, leaf in _leaves(model, params)}
    outputs = {}
    for path, (tensor, leaf) in leaves.items():
        if path.endswith("/embedding"):
            answer = leaf[:, np.array(probe_rows(tensor.shape[0]))]
        elif tensor.form == "linear":
            outputs_count, inputs_count = tensor.hf_shape
            kernel = leaf.reshape(-1, inputs_count, outputs_count).astype(jnp.float32)
            answer = jnp.einsum("LIO,I->LO", kernel, probe_vector(inputs_count), precision=lax.Precision.HIGHEST)
            bias = leaves.get(path.removesuffix("kernel") + "bias")
            if bias is not None:
                answer += bias[1].reshape(answer.shape).astype(jnp.float32)
        elif path.endswith("/bias"):
            continue
        else:
            answer = leaf.reshape(-1, *tensor.hf_shape)
        outputs[path] = _drop_unit(model, tensor, answer.astype(jnp.float32))
    if model.config.tied_embeddings:
        table = params["token_embedder"]["embedding"].astype(jnp.float32)
        outputs[HEAD_NAME] = jnp.dot(table, probe_vector(table.shape[1]), precision=lax.Precision.HIGHEST)
    return outputs
