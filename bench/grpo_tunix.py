"""Tunix's GRPOLearner with its own sampler, model and reference, for bench.grpo, which starts `main` in a process.

Completions end at the workload's lengths: the model lets a row sample its end token there, and nowhere else. So the
sampler stops at the longest of a step, as it would by itself, and what it pads is masked out.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from bench.grpo_data import BETA, GROUP, PROMPT_LIMIT, REWARD_CHARACTERS, Workload, read_workload
from bench.native_engine import Words
from bench.sft_data import LEARNING_RATE
from bench.turns import Orders
from models.config import TransformerConfig, load_preset


class EndingLlama(Llama3):
    """Tunix's Llama, which samples its end token at given positions alone."""

    def __init__(self, config: ModelConfig, *, ends: tuple[int, ...], eos_id: int, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.ends, self.eos_id = ends, eos_id

    def __call__(self, input_tokens: Any, positions: Any, cache: Any, attention_mask: Any) -> tuple[Any, Any]:
        """As Llama3's; only what is sampled from, and so has a cache, is changed."""
        logits, cache = super().__call__(input_tokens, positions, cache, attention_mask)
        if cache is not None:
            is_eos = jnp.arange(logits.shape[-1]) == self.eos_id
            at_end = (positions[:, -1] + 1 == jnp.array(self.ends))[:, None]
            last = jnp.where(is_eos == at_end, jnp.where(is_eos, 0.0, logits[:, -1]), -jnp.inf)
            logits = logits.at[:, -1].set(last)
        return logits, cache


class Numbers(Words):
    """Prompts and completions as numbers in text, so that nothing is tokenised in another way."""

    def decode(self, ids: list[int]) -> str:
        """The numbers."""
        return " ".join(map(str, ids))

    def eos_id(self) -> int:
        """As in the workload."""
        return 2


def make_model(config: TransformerConfig, workload: Workload, seed: int) -> EndingLlama:
    """Tunix's Llama of the config's sizes."""
    sizes = ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        hidden_dim=config.mlp_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps,
    )
    ends = tuple(
        len(prompt) + length - 1
        for prompt, group in zip(workload.prompts, workload.lengths, strict=True)
        for length in group
    )
    return EndingLlama(sizes, ends=ends, eos_id=workload.eos_id, rngs=nnx.Rngs(seed))


def timed(work: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The same function, whose seconds are added up."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(work(*args, **kwargs))
        spent[name] += time.perf_counter() - start
        return result

    return run


def run(workload: Workload) -> None:
    """Trains until no order comes."""
    orders, spent = Orders(), {"rollout": 0.0, "reference": 0.0}
    config = load_preset("bench-r")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    adamw = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.1)
    settings = ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.ROLLOUT, Role.REFERENCE), mesh),
        training_config=RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw),
            eval_every_n_steps=10**9,
            max_steps=10**6,
            checkpoint_root_directory=None,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=workload.max_tokens,
            max_prompt_length=PROMPT_LIMIT,
            # The smallest cache that holds a step.
            kv_cache_size=PROMPT_LIMIT + workload.max_tokens,
            temperature=1.0,
            top_p=1.0,
        ),
    )
    with mesh:
        policy, reference = make_model(config, workload, 0), make_model(config, workload, 1)
        cluster = RLCluster(actor=policy, reference=reference, tokenizer=Numbers(), cluster_config=settings)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        # Tunix samples the end token and then drops it.
        expected = [length - 1 for group in workload.lengths for length in group]
        assert [len(one.split()) for one in completions] == expected
        return [max(-1.0, -abs(len(one) - REWARD_CHARACTERS) / REWARD_CHARACTERS) for one in completions]

    cluster.generate = timed(cluster.generate, spent, "rollout")
    cluster.get_ref_per_token_logps = timed(cluster.get_ref_per_token_logps, spent, "reference")
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=GROUP, beta=BETA), reward_fns=reward)
    texts = [" ".join(map(str, prompt)) for prompt in workload.prompts]

    def prompts() -> Iterator[dict[str, Any]]:
        # Tunix asks for one batch before its first step.
        for number in range(10**9):
            if number > 0 and orders.in_step:
                jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
                split, spent["rollout"], spent["reference"] = dict(spent), 0.0, 0.0
                orders.end_step({"split": split})
            if not orders.next_step():
                os._exit(0)
            yield {"prompts": np.array(texts)}

    with mesh:
        learner.train(prompts())


def main() -> None:
    """Reads the workload that is named, and trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    args = parser.parse_args()
    # Tunix writes its metrics to the working folder unless it is elsewhere.
    workload = read_workload(args.workload)
    os.chdir(tempfile.mkdtemp(dir=workload.folder))
    run(workload)
