"""Tunix's reinforcement-learning cluster around our session, sampler and rollouts.

Tunix's learner asks for a batch, has its cluster generate and its trainer update, and syncs the weights. Here the
policy's arrays are the session's: the cluster's roles hold a handle without weights, so that nothing is snapshotted or
held twice; prompts are keys by which a step's rollout is found; and a step's training example is an opaque node.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.trainer import Trainer

from models.sharding import Rules, activation_mesh
from models.tokenizer import Tokenizer
from posttrain.samplers.base import Sampler
from posttrain.samplers.rollout import SamplerRollout
from posttrain.trainers.tunix_loop import NO_OPTIMIZER, driven_config, silent_logger
from recipes.schema import GRPORecipe

UNBOUNDED = 2**31 - 1
"""For Tunix's own limits: the session ends the run."""


class PolicyHandle(nnx.Module):
    """What Tunix's roles hold in the policy's place: one number on the policy's mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.handle = nnx.Param(jax.device_put(jnp.zeros(()), NamedSharding(mesh, PartitionSpec())))


@jax.tree_util.register_static
class OpaqueStep:
    """A step's rollout as Tunix passes it on: a node without arrays, which it can neither slice nor shard."""

    def __init__(self, rollout: Any) -> None:
        self.rollout = rollout


class PolicyTrainer(Trainer):
    """Tunix's trainer, whose step is the one it is given."""

    def __init__(self, policy: nnx.Module, update: Callable[[Any], tuple[jax.Array, None, jax.Array]]) -> None:
        super().__init__(policy, NO_OPTIMIZER, driven_config(), dict, silent_logger())
        self._update = update
        self.is_managed_externally = True

    def create_train_step_fn(self):
        """The session's step in place of Tunix's."""
        return lambda example: self._update(example.rollout)

    def _post_process_train_step(self, aux: None) -> None:
        """The session reports."""

    def _write_train_metrics(self) -> None:
        self._buffered_train_metrics = None


class Cluster(RLCluster):
    """Tunix's cluster without its snapshot of the policy at each sync."""

    def __init__(self, policy: nnx.Module, trainer: PolicyTrainer, tokenizer: Tokenizer, config: ClusterConfig) -> None:
        super().__init__(actor=policy, tokenizer=TunixTokenizer(tokenizer), cluster_config=config)
        self._actor_trainer = trainer

    def sync_weights(self) -> None:
        """Hands the policy's weights to the sampler."""
        self.rollout.update_params(None)
        self.global_steps += 1


class TunixTokenizer:
    """Our tokenizer under the names that Tunix's adapter looks for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._tokenizer.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids, skip_special=True)

    def bos_id(self) -> int | None:
        """None where there is none."""
        return self._tokenizer.bos_id

    def eos_id(self) -> int | None:
        """None where there is none."""
        return self._tokenizer.eos_id

    def pad_id(self) -> int:
        """Unread: padding is told by lengths."""
        return 0


class Learner(GRPOLearner):
    """Tunix's learner; what it generates and weighs is one call of ours."""

    def __init__(
        self, cluster: Cluster, config: GRPOConfig, collect: Callable[[], Any], mesh: Mesh, rules: Rules
    ) -> None:
        super().__init__(cluster, config, reward_fns=lambda prompts, completions, **_: [0.0] * len(prompts))
        self._collect, self._mesh, self._rules = collect, mesh, rules

    def _generate_and_compute_advantage(self, training_input: dict[str, Any], mode: Any = None) -> OpaqueStep:
        # Tunix calls this in a thread of its own, which does not inherit the mesh.
        with activation_mesh(self._mesh, self._rules):
            return OpaqueStep(self._collect())


def make_learner(
    recipe: GRPORecipe,
    *,
    mesh: Mesh,
    rules: Rules,
    tokenizer: Tokenizer,
    sampler: Sampler,
    sync: Callable[[], None],
    collect: Callable[[], Any],
    update: Callable[[Any], tuple[jax.Array, None, jax.Array]],
) -> Learner:
    """Builds Tunix's cluster and learner around the run's parts.

    Args:
        recipe: of the run.
        mesh: the policy's.
        rules: of its activations.
        tokenizer: of its prompts.
        sampler: the engine.
        sync: hands the policy's weights to the engine.
        collect: makes a step's rollout.
        update: makes a step's update of it.
    """
    policy = PolicyHandle(mesh)
    training = driven_config(RLTrainingConfig, actor_optimizer=NO_OPTIMIZER, max_steps=UNBOUNDED)
    rollout = RolloutConfig(
        max_tokens_to_generate=recipe.rl.max_completion_length,
        max_prompt_length=recipe.rl.max_prompt_length,
        temperature=recipe.sampler.temperature,
        return_logprobs=True,
    )
    config = ClusterConfig(
        role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
        rollout_engine=functools.partial(SamplerRollout, sampler=sampler, sync=sync),
        training_config=training,
        rollout_config=rollout,
    )
    cluster = Cluster(policy, PolicyTrainer(policy, update), tokenizer, config)
    # Group size, iterations and loss are the session's; Tunix repeats a key for each completion it expects.
    algorithm = GRPOConfig(num_generations=2, num_iterations=1, beta=0.0)
    return Learner(cluster, algorithm, collect, mesh, rules)


def keys_until(ended: Callable[[], bool], first: int) -> Iterator[dict[str, Any]]:
    """A batch of one key a step, as Tunix's learner wants its data, until the session has ended."""
    for number in itertools.count(first):
        if ended():
            return
        yield {"prompts": np.array([f"step {number}"])}
