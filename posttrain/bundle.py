"""The models of a post-training run: policy, reference and teacher.

The policy's parameters are the training state's, and belong to the session. Reference and teacher are frozen: they hold
no optimizer state, get no gradient, and a checksum taken when they are loaded is compared at every save. Each role can
be seen as an NNX module of Tunix's call contract, which shares its arrays.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from models.checksum import checksum
from models.functional import FunctionalModel, Params, abstract_nnx, nnx_from_params
from models.inference.cache import KVCache
from models.parameters import flatten, unflatten
from pretrain.optimizers import trained_part
from pretrain.setup import ModelSetup
from recipes.schema import OptimizerSection

logger = logging.getLogger(__name__)


class LinenPolicy(nnx.Module):
    """A Linen model behind the call contract of an NNX one."""

    def __init__(self, model: FunctionalModel, params: Params) -> None:
        self.config, self._model = model.config, model
        self._paths = tuple(path for path, _ in flatten(params))
        for path, leaf in flatten(params):
            setattr(self, "/".join(path), nnx.Param(leaf))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits [B, T, V] and the cache; arguments as for `models.nnx.transformer.Transformer`."""
        params = unflatten({path: getattr(self, "/".join(path))[...] for path in self._paths})
        return self._model(params, tokens, positions, cache, attention_mask, segment_ids)


@dataclass(frozen=True)
class FrozenRole:
    """A model that is not trained."""

    name: str
    model: FunctionalModel
    params: Params
    checksum: int

    def require_unchanged(self) -> None:
        """Raises RuntimeError if an array is no longer what it was when the role was made."""
        now = checksum(self.params)
        if now != self.checksum:
            raise RuntimeError(
                f"{self.name}: its parameters changed in training (checksum {self.checksum:08x}, now {now:08x}): a "
                "frozen model was written to; nothing was saved"
            )


def freeze(name: str, model: FunctionalModel, params: Params) -> FrozenRole:
    """Makes a frozen role of parameters that nobody else writes to."""
    return FrozenRole(name, model, params, checksum(params))


class ModelBundle:
    """The roles of a run and what they cost."""

    def __init__(
        self, setup: ModelSetup, *, reference: FrozenRole | None = None, teacher: FrozenRole | None = None
    ) -> None:
        self.setup, self.reference, self.teacher = setup, reference, teacher

    def policy(self, params: Params) -> nnx.Module:
        """The policy as an NNX module that shares `params`; it is stale once a step has donated them."""
        return as_module(self.setup.model, params)

    @staticmethod
    def view(role: FrozenRole) -> nnx.Module:
        """A frozen role as an NNX module that shares its arrays."""
        return as_module(role.model, role.params)

    def require_frozen(self) -> None:
        """Raises RuntimeError if reference or teacher changed."""
        for role in (self.reference, self.teacher):
            if role is not None:
                role.require_unchanged()

    def memory_table(self, optimizer: OptimizerSection) -> str:
        """Bytes a device holds of each role, as lines of a table."""
        setup = self.setup
        state, abstract, update = setup.shardings.state, setup.abstract, setup.shardings.update
        parameters = device_bytes(abstract.params, state.params)
        rows = [
            ("policy", "parameters", parameters),
            ("policy", "gradients", device_bytes(trained_part(abstract.params, update), update)),
            ("policy", f"optimizer ({optimizer.memory})", device_bytes(abstract.opt_state, state.opt_state)),
        ]
        for role in (self.reference, self.teacher):
            if role is not None:
                shardings = jax.tree.map(lambda leaf: leaf.sharding, role.params)
                rows.append((role.name, "parameters", device_bytes(role.params, shardings)))
        logits = setup.chunk_size // setup.mesh.size * setup.config.vocab_size * 4
        rows.append(("policy", "logits of a chunk", logits))
        total = sum(size for _, what, size in rows if "pinned_host" not in what)
        lines = [f"  {role:<10} {what:<24} {size / 2**20:>12,.1f} MiB" for role, what, size in rows]
        return "\n".join(
            ["memory of a device, activations aside:", *lines, f"  {'':<10} {'sum':<24} {total / 2**20:>12,.1f} MiB"]
        )


def as_module(model: FunctionalModel, params: Params) -> nnx.Module:
    """A model of either framework as an NNX module that shares `params`."""
    if model.options.framework == "linen":
        return LinenPolicy(model, params)
    return nnx_from_params(abstract_nnx(model.config, model.options, model.adapters), params)


def device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree's arrays that one device holds."""
    leaves, placed = jax.tree.leaves(tree), jax.tree.leaves(shardings)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, placed, strict=True)
    )
