"""The models of a post-training run: policy, reference and teacher.

The policy's parameters are the training state's, and belong to the session. Reference and teacher are frozen: they hold
no optimizer state, get no gradient, and a checksum taken when they are loaded is compared at every save. Beside a
policy with adapters the reference holds no array at all: it is the base under them. Each role can be seen as an NNX
module of Tunix's call contract, which shares its arrays.
"""

import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models.checksum import checksum
from models.functional import FunctionalModel, Params, abstract_nnx, nnx_from_params
from models.inference.cache import KVCache
from models.lora import split
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
    fetch_to: Params | None = None
    """Shardings in device memory, where the parameters rest on the host; None where they rest on the devices."""

    def arrays(self, policy: Params) -> Params:
        """What a jitted function of the role takes; `policy` holds the policy's parameters."""
        return self.params

    def seen(self, arrays: Params) -> Params:
        """Within that function, the parameters in device memory."""
        return arrays if self.fetch_to is None else jax.device_put(arrays, self.fetch_to)

    def head(self) -> Any:
        """The parameters of the output head, in device memory."""
        head = self.model.head(self.params)
        if self.fetch_to is None:
            return head
        pairs = zip(jax.tree.leaves(self.params), jax.tree.leaves(self.fetch_to), strict=True)
        device = {id(leaf): sharding for leaf, sharding in pairs}
        return jax.tree.map(lambda leaf: jax.device_put(leaf, device[id(leaf)]), head)

    def release(self) -> None:
        """Gives the arrays' memory back at once, whoever still holds the role; it cannot be run any more."""
        for leaf in jax.tree.leaves(self.params):
            leaf.delete()

    def require_unchanged(self) -> None:
        """Raises RuntimeError if an array is no longer what it was when the role was made."""
        now = checksum(self.seen(self.params))
        if now != self.checksum:
            raise RuntimeError(
                f"{self.name}: its parameters changed in training (checksum {self.checksum:08x}, now {now:08x}): a "
                "frozen model was written to; nothing was saved"
            )


@dataclass(frozen=True)
class AdapterBase:
    """The base under a policy's adapters as a model of its own, which holds no array.

    Each step donates the policy's parameters and gives them back, base included, so the base is found in the policy's
    parameters of the moment. That it is unchanged is checked at every save, as of any run with adapters.
    """

    name: str
    model: FunctionalModel
    """The policy's."""

    def arrays(self, policy: Params) -> Params:
        """What a jitted function of the role takes; `policy` holds the policy's parameters."""
        return policy

    def seen(self, arrays: Params) -> Params:
        """Within that function, the same parameters with adapters that change nothing."""
        leaves = dict(flatten(arrays))
        silent = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if path[-1] == "lora_b"}
        return unflatten(leaves | silent)


Role = FrozenRole | AdapterBase


def freeze(name: str, model: FunctionalModel, params: Params) -> FrozenRole:
    """Makes a frozen role of parameters that nobody else writes to."""
    return FrozenRole(name, model, params, checksum(params))


def resting(role: FrozenRole, memory: str) -> FrozenRole:
    """The same role with its parameters where a recipe lets them rest, `device` or `pinned_host` memory.

    A role on the host is brought to the devices whole whenever it is run, so it saves memory while the policy's
    gradients are computed, and costs the way there.
    """
    if memory == "device":
        return role
    on_device = jax.tree.map(lambda leaf: leaf.sharding, role.params)
    on_host = jax.tree.map(lambda sharding: sharding.with_memory_kind(memory), on_device)
    return replace(role, params=jax.device_put(role.params, on_host), fetch_to=on_device)


def require_offload_effect(where: str, memory: str, mesh: Mesh) -> None:
    """Refuses to let a role rest on the host where that is no other memory.

    Raises:
        ValueError: naming the recipe's key `where`.
    """
    platform = mesh.devices.flat[0].platform
    if memory != "device" and platform == "cpu":
        raise ValueError(
            f"{where}={memory}: has no effect on a CPU, whose devices have the host's memory; remove it, or run on an "
            "accelerator"
        )


class ModelBundle:
    """The roles of a run and what they cost."""

    def __init__(self, setup: ModelSetup, *, reference: Role | None = None, teacher: FrozenRole | None = None) -> None:
        self.setup, self.teacher = setup, teacher
        # Callers know which kind of role they made.
        self.reference: Any = reference

    def policy(self, params: Params) -> nnx.Module:
        """The policy as an NNX module that shares `params`; it is stale once a step has donated them."""
        return as_module(self.setup.model, params)

    @staticmethod
    def view(role: Role | None) -> nnx.Module | None:
        """A frozen role as an NNX module that shares its arrays; None for one that holds none."""
        return as_module(role.model, role.params) if isinstance(role, FrozenRole) else None

    def require_frozen(self) -> None:
        """Raises RuntimeError if reference or teacher changed."""
        for role in (self.reference, self.teacher):
            if isinstance(role, FrozenRole):
                role.require_unchanged()

    def memory_table(
        self, optimizer: OptimizerSection, *, row_length: int | None = None, rows_per_example: int = 1
    ) -> str:
        """Bytes a device holds of each role, as lines of a table.

        Args:
            optimizer: the recipe's section.
            row_length: tokens of a row, at most; None leaves activations out.
            rows_per_example: rows of the model's for each row of a batch: two for a pair.
        """
        setup, policy = self.setup, self.setup.abstract
        state, update = setup.shardings.state, setup.shardings.update
        moments = device_bytes(policy.opt_state, state.opt_state)
        rows = [
            ("policy", "parameters", device_bytes(policy.params, state.params)),
            ("policy", "gradients", device_bytes(trained_part(policy.params, update), update)),
            ("policy", f"optimizer ({optimizer.memory})", moments),
            *(_role_row(role) for role in (self.reference, self.teacher) if role is not None),
            ("policy", "logits of a chunk", setup.chunk_size // setup.mesh.size * setup.config.vocab_size * 4),
        ]
        if row_length is not None:
            local, length = setup.batch_sharding.shard_shape((setup.plan.rows_per_microbatch, row_length))
            shape = (local * rows_per_example, length)
            rows.append(("policy", "activations, at most", activation_bytes(setup.model, setup.trainable, *shape)))
        total = sum(size for _, what, size in rows if "pinned_host" not in what)
        saved = [(policy.params, state.params)]
        if setup.model.adapters is not None:
            saved = [(split(policy.params)[1], split(state.params)[1])]
        snapshot = moments + sum(device_bytes(*pair) for pair in saved)
        rows += [("", "sum", total), ("policy", "snapshot of a save, on the host", snapshot)]
        lines = [f"  {role:<10} {what:<32} {size / 2**20:>12,.1f} MiB" for role, what, size in rows]
        aside = ", activations aside" if row_length is None else ""
        return "\n".join([f"memory of a device{aside}:", *lines])


def _role_row(role: Role) -> tuple[str, str, int]:
    if isinstance(role, AdapterBase):
        return role.name, "parameters (the policy's base)", 0
    shardings = jax.tree.map(lambda leaf: leaf.sharding, role.params)
    where = "parameters" if role.fetch_to is None else "parameters (pinned_host)"
    return role.name, where, device_bytes(role.params, shardings)


@cache
def activation_bytes(model: FunctionalModel, trainable: frozenset[str] | None, rows: int, length: int) -> int:
    """Bytes that the forward pass over [rows, length] tokens keeps for the backward pass, rematerialisation heeded.

    This is what autodiff asks for, with nothing sharded but the rows; the compiler may keep less. Parameters are kept
    too, and are told apart by their number not growing with that of the rows.
    """
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    noisy = model.options.dropout_rate > 0.0

    def kept(count: int) -> int:
        cells = jax.ShapeDtypeStruct((count, length), jnp.int32)

        def forward(params: Params, tokens: jax.Array) -> Any:
            leaves = dict(flatten(params))
            trained = {path: leaf for path, leaf in leaves.items() if trainable is None or "/".join(path) in trainable}
            key = jax.random.key(0) if noisy else None

            def hidden(trained: dict[tuple[str, ...], jax.Array]) -> jax.Array:
                whole = unflatten(leaves | trained)
                return model.hidden_states(whole, tokens, tokens, segment_ids=tokens, noise_key=key)[0]

            return jax.vjp(hidden, trained)[1]

        found = jax.tree.leaves(jax.eval_shape(forward, abstract, cells))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in found)

    return kept(2 * rows) - kept(rows)


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
