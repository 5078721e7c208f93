"""Log-probabilities of pairs of answers, and those of the frozen reference beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from models.functional import FunctionalModel, Params
from models.ops.vocab import token_logprobs
from posttrain.bundle import FrozenRole, Role
from posttrain.data.pairs import PreferenceBatch
from posttrain.trainers.reference_cache import cached_logprobs
from pretrain.batching import place
from pretrain.data.iterators import RowIterator
from pretrain.losses import head_function
from pretrain.setup import ModelSetup


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with the reference's log-probabilities of both answers, float32 [B]; None for losses without reference."""

    pairs: PreferenceBatch
    ref_chosen: Any
    ref_rejected: Any


Score = Callable[[PreferenceBatch, Params], ScoredPairs]
"""Adds the reference's log-probabilities to pairs on the mesh, given the policy's parameters."""


def pair_logprobs(
    model: FunctionalModel, params: Params, pairs: PreferenceBatch, noise_key: jax.Array | None, *, chunk_size: int
) -> tuple[Float[Array, "B 2"], Float[Array, "B 2"]]:
    """Sums each answer's token log-probabilities.

    Args:
        model: the transformer.
        params: its parameters.
        pairs: [B, 2, T] rows.
        noise_key: for dropout; None switches it off.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        The sums, and the number of tokens in each, both float32 [B, 2]: chosen, rejected.
    """
    # A pair's two rows stay side by side, so that no row leaves its device.
    rows = jax.tree.map(lambda field: field.reshape(-1, field.shape[-1]), replace(pairs, weights=None, pair_id=None))
    hidden, _ = model.hidden_states(
        params, rows.inputs, rows.inputs_position, segment_ids=rows.inputs_segmentation, noise_key=noise_key
    )
    stats = token_logprobs(
        head_function(model),
        model.head(params),
        hidden,
        rows.targets,
        chunk_size=chunk_size,
        temperature=1.0,
        with_entropy=False,
    )
    trained = rows.targets_segmentation != 0
    sums = jnp.where(trained, stats.logprob_BT, 0.0).sum(-1)
    return sums.reshape(-1, 2), trained.sum(-1, dtype=jnp.float32).reshape(-1, 2)


def reference_sums(setup: ModelSetup, reference: FrozenRole) -> Callable[[PreferenceBatch], Float[Array, "B 2"]]:
    """The reference's log-probabilities of pairs on the mesh, jitted."""
    sums_of = _sums_of(setup, reference)
    return lambda pairs: sums_of(reference.params, pairs)


def _sums_of(setup: ModelSetup, reference: Role) -> Callable[[Params, PreferenceBatch], Float[Array, "B 2"]]:
    """The same, given the arrays that the role takes."""

    @jax.jit
    def sums_of(arrays: Params, pairs: PreferenceBatch) -> jax.Array:
        params = reference.seen(arrays)
        return pair_logprobs(reference.model, params, pairs, None, chunk_size=setup.chunk_size)[0]

    return sums_of


@dataclass(frozen=True)
class Scores:
    """What adds the reference's log-probabilities to training pairs and to held-out pairs on the mesh."""

    train: Score
    held_out: Score

    @classmethod
    def of(cls, setup: ModelSetup, reference: Role | None) -> "Scores":
        """Runs the reference on each batch; without one, adds nothing."""
        if reference is None:
            return cls(*[lambda pairs, policy: ScoredPairs(pairs, None, None)] * 2)
        sums_of = _sums_of(setup, reference)

        def score(pairs: PreferenceBatch, policy: Params) -> ScoredPairs:
            sums = sums_of(reference.arrays(policy), pairs)
            return ScoredPairs(pairs, sums[:, 0], sums[:, 1])

        return cls(score, score)


def cache_scores(setup: ModelSetup, reference: FrozenRole, passes: dict[str, RowIterator], run_dir: Path) -> Scores:
    """Computes the reference's log-probabilities of all pairs, or reads them, so that it can be let go."""
    sums_of, scores = reference_sums(setup, reference), {}

    def placed(rows: PreferenceBatch) -> PreferenceBatch:
        return place(rows, setup.batch_sharding, setup.share)

    for name, pairs in passes.items():
        path = run_dir / f"reference-logprobs-{name}.npz"
        table = cached_logprobs(path, pairs, sums_of, placed, checksum=reference.checksum)
        scores[name] = _looked_up(jax.device_put(table, NamedSharding(setup.mesh, PartitionSpec())))
    return Scores(scores["train"], scores.get("eval", scores["train"]))


def _looked_up(table: Float[Array, "P 2"]) -> Score:
    @jax.jit
    def look_up(table: jax.Array, pair_id: jax.Array) -> jax.Array:
        # Padding has the id -1; its row counts nothing. An id beyond the table would be a pair never seen: NaN.
        return jnp.where(pair_id[:, None] < 0, 0.0, table.at[pair_id].get(mode="fill", fill_value=jnp.nan))

    def score(pairs: PreferenceBatch, policy: Params) -> ScoredPairs:
        sums = look_up(table, pairs.pair_id)
        return ScoredPairs(pairs, sums[:, 0], sums[:, 1])

    return score
