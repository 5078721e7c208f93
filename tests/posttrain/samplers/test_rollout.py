"""Tunix's rollout over the sampler's protocol, by itself and inside Tunix's own cluster."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from models.config import load_preset
from models.functional import FunctionalModel
from posttrain.samplers import proof
from posttrain.samplers.base import Completion, Prompt, Sampling, sample_seed
from posttrain.samplers.native import NativeSampler
from posttrain.samplers.rollout import PromptBook, SamplerRollout, sampling_of
from recipes.schema import ModelSection

PAD = 0


class Tokenizer:
    """What Tunix's adapter of a tokenizer offers. Ids are spelled as numbers, so nothing can be encoded by accident."""

    def pad_id(self) -> int:
        return PAD

    def eos_id(self) -> int:
        return 1

    def bos_id(self) -> int:
        return 2

    def encode(self, text: str) -> list[int]:
        raise AssertionError(f"{text!r} was tokenised")

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class SeedSampler:
    """Completes with the seed of each completion, so that a test sees which one it was given."""

    weight_version = 4

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], Sampling]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self.calls.append(([prompt.prompt_id for prompt in prompts], sampling))
        return [
            Completion(
                prompt_id=prompt.prompt_id,
                sample_index=index,
                token_ids=np.array([sample_seed(sampling.seed, sampling.step, prompt.prompt_id, index), PAD], np.int32),
                logprobs=np.array([-prompt.prompt_id, -index], np.float32),
                finish_reason="stop",
                weight_version=self.weight_version,
            )
            for prompt in prompts
            for index in range(sampling.num_samples)
        ]


def config(**values) -> RolloutConfig:
    return RolloutConfig(**{"max_tokens_to_generate": 4, "temperature": 1.0, "max_prompt_length": 5, **values})


@pytest.fixture
def book() -> PromptBook:
    book = PromptBook(seed=7, stop_ids=(1, 9))
    book.begin_step(3)
    return book


def rollout_of(sampler, book: PromptBook, **values) -> SamplerRollout:
    return SamplerRollout(None, Tokenizer(), None, config(**values), sampler=sampler, sync=lambda: None, prompts=book)


def test_repeated_keys_are_a_prompts_samples_in_order(book):
    sampler = SeedSampler()
    rollout = rollout_of(sampler, book)
    first, second = book.add(Prompt((5, 6), 10)), book.add(Prompt((0, 8, 7), 11))
    output = rollout.generate([first, first, second, second], config())
    assert [tokens[0] for tokens in output.tokens] == [sample_seed(7, 3, p, i) for p in (10, 11) for i in (0, 1)]
    assert [logprobs.tolist() for logprobs in output.logprobs] == [[-p, -i] for p in (10, 11) for i in (0, 1)]
    assert output.left_padded_prompt_tokens.tolist() == [[0, 0, 0, 5, 6]] * 2 + [[0, 0, 0, 8, 7]] * 2
    assert output.text[0] == f"{sample_seed(7, 3, 10, 0)} {PAD}"
    [(ids, sampling)] = sampler.calls
    assert ids == [10, 11]
    assert sampling == Sampling(4, 1.0, stop_ids=(1, 9), num_samples=2, seed=7, step=3)


def test_a_key_that_comes_again_in_a_step_gets_new_samples_and_a_new_step_begins_anew(book):
    rollout = rollout_of(SeedSampler(), book)
    key = book.add(Prompt((5,), 10))
    seeds = [rollout.generate([key] * 2, config()).tokens[i][0] for _ in range(2) for i in range(2)]
    # Each call gives two samples; those listed are the first call's 0, the second's 3, and so on.
    assert seeds == [sample_seed(7, 3, 10, index) for index in (0, 3, 4, 7)]
    book.begin_step(4)
    with pytest.raises(ValueError, match="'prompt 10': no key of step 4"):
        rollout.generate([key], config())
    key = book.add(Prompt((5,), 10))
    assert rollout.generate([key], config()).tokens[0][0] == sample_seed(7, 4, 10, 0)


def test_text_is_no_key_and_ids_are_unique(book):
    rollout = rollout_of(SeedSampler(), book)
    with pytest.raises(ValueError, match="'What is 2\\+2\\?': no key of step 3: prompts reach the sampler as ids"):
        rollout.generate(["What is 2+2?"], config())
    book.add(Prompt((5,), 10))
    with pytest.raises(ValueError, match="another prompt of this id"):
        book.add(Prompt((6,), 10))


def test_a_prompt_is_never_cut(book):
    rollout = rollout_of(SeedSampler(), book)
    with pytest.raises(ValueError, match="max_prompt_length=5: a prompt has 6 tokens"):
        rollout.generate([book.add(Prompt((1,) * 6, 0))], config())


def test_logprobs_are_found_again_by_tokens_even_where_a_completion_ends_with_padding(book):
    rollout = rollout_of(SeedSampler(), book)
    keys = [book.add(Prompt((5,), 10))] * 2 + [book.add(Prompt((6,), 11))]
    output = rollout.generate(keys, config())
    tokens = np.array([[*ids, PAD, PAD] for ids in output.tokens])
    order = [2, 0, 1]
    logprobs = rollout.get_per_token_logps(output.left_padded_prompt_tokens[order], tokens[order])
    assert logprobs.tolist() == [[-11, 0, 0, 0], [-10, 0, 0, 0], [-10, -1, 0, 0]]
    with pytest.raises(ValueError, match="row 0: these tokens were not sampled by the last call"):
        rollout.get_per_token_logps(output.left_padded_prompt_tokens, tokens + 1)


def test_truncation_is_refused_in_training_and_taken_in_evaluation(book):
    for truncated in ({"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match="biases the importance ratio"):
            rollout_of(SeedSampler(), book, **truncated)
    sampling = sampling_of(config(top_k=1, top_p=0.5, temperature=0.01, eos_tokens=[3]), book)
    assert (sampling.top_k, sampling.top_p, sampling.stop_ids) == (1, 0.5, (3,))
    assert sampling_of(config(top_k=-1, top_p=None), book).top_k is None


def test_tunixs_cluster_syncs_and_samples_through_the_adapter(book):
    model = FunctionalModel(load_preset("tiny-llama-rl"), ModelSection(preset="tiny-llama-rl"))
    sampler = NativeSampler(model, num_slots=8, max_length=64, steps_per_call=4, tokenizer=None, on_progress=None)
    # The policy's weights lie outside of what Tunix sees, as a base under LoRA does: Tunix passes the adapters alone.
    policy = {"params": model.init(jax.random.key(0)), "version": 0}

    def sync() -> None:
        policy["version"] += 1
        sampler.sync(policy["params"], policy["version"])

    class Adapters(nnx.Module):
        def __init__(self) -> None:
            self.lora = nnx.LoRAParam(jnp.ones((2, 2)))

    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    training = RLTrainingConfig(actor_optimizer=optax.sgd(0.1), eval_every_n_steps=1000, max_steps=10)
    cluster = RLCluster(
        actor=Adapters(),
        tokenizer=Tokenizer(),
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.ROLLOUT: mesh},
            rollout_engine=functools.partial(SamplerRollout, sampler=sampler, sync=sync, prompts=book),
            training_config=training,
            rollout_config=config(max_tokens_to_generate=8, max_prompt_length=16),
        ),
    )
    for version in (1, 2):
        policy["params"] = model.init(jax.random.key(version))
        cluster.sync_weights()
        assert sampler.weight_version == version
        book.begin_step(version)
        prompts = [Prompt((5, 6, 7), 0), Prompt((3,), 1)]
        keys = [key for prompt in prompts for key in [book.add(prompt)] * 4]
        output = cluster.generate(keys)
        completions = [
            Completion(prompts[index // 4].prompt_id, index % 4, ids, logprobs, "length", version)
            for index, (ids, logprobs) in enumerate(zip(output.tokens, output.logprobs, strict=True))
        ]
        assert len({tuple(ids) for ids in output.tokens}) == 8
        sampling = Sampling(8, 1.0)
        worst = proof.check_completions(
            model, policy["params"], prompts, completions, sampling=sampling, version=version, tolerance=1e-4
        )
        assert worst > 0
