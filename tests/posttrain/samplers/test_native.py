"""The native engine behind the protocol: equal to the trainer after every sync, seeded, proven, and plain in errors."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel, Params
from models.inference import engine as engine_module
from models.inference import steps
from models.inference.engine import Engine
from models.ops.head import output_logits
from models.ops.vocab import token_logprobs
from models.tokenizer import load_tokenizer
from posttrain.samplers.base import Completion, Prompt, SamplerError, Sampling, sample_seed
from posttrain.samplers.native import NativeSampler
from posttrain.samplers.proof import proof_settings
from recipes.schema import ModelSection, TokenizerSection

# As many kv heads as heads, so that queries and keys can be swapped.
SMALL = load_preset("tiny-llama").replace(
    vocab_size=300, embed_dim=32, mlp_dim=48, head_dim=8, num_kv_heads=4, max_position=256
)
FAMILIES = {
    "llama": SMALL,
    "mistral": SMALL.replace(family="mistral", sliding_window=8, attention_pattern=("sliding",)),
    "qwen2": SMALL.replace(family="qwen2", qkv_bias=True, tied_embeddings=True),
    "qwen3": load_preset("tiny-qwen3"),
    "gemma2": load_preset("tiny-gemma2"),
    "gpt3": load_preset("gpt3-52k").replace(num_layers=2),
}


def make_model(config: TransformerConfig = SMALL, **options: Any) -> FunctionalModel:
    return FunctionalModel(config, ModelSection(preset="tiny-llama", **options))


def weights(model: FunctionalModel, seed: int = 0) -> Params:
    """Random everywhere, sharper than first weights, and different for each seed."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    )


def make_sampler(model: FunctionalModel, **changes: Any) -> NativeSampler:
    settings = {"num_slots": 8, "max_length": 128, "steps_per_call": 16, "tokenizer": None, "on_progress": None}
    return NativeSampler(model, **{**settings, **changes})


def prompts(config: TransformerConfig = SMALL, count: int = 6, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, count)
    return [Prompt(tuple(rng.integers(0, config.vocab_size, n).tolist()), 10 + i) for i, n in enumerate(lengths)]


@partial(jax.jit, static_argnames=("model", "temperature"))
def next_logprobs(model: FunctionalModel, params: Params, tokens: jax.Array, *, temperature: float) -> jax.Array:
    """Of each next token, [B, T]: whole context, chunked head."""
    hidden, _ = model.hidden_states(params, tokens)
    head = partial(output_logits, softcap=model.config.logits_softcap, dtype=jnp.float32)
    targets = jnp.roll(tokens, -1, axis=1)
    options = {"chunk_size": 512, "temperature": temperature, "with_entropy": False}
    return token_logprobs(head, model.head(params), hidden, targets, **options).logprob_BT


def trainer_logprobs(
    model: FunctionalModel, params: Params, given: list[Prompt], made: list[Completion], temperature: float
) -> list[np.ndarray]:
    """Log-probabilities of the sampled tokens as a post-training loss computes them."""
    by_id = {prompt.prompt_id: prompt.token_ids for prompt in given}
    rows = np.zeros((len(made), 128), np.int32)
    for row, completion in zip(rows, made, strict=True):
        sequence = [*by_id[completion.prompt_id], *completion.token_ids]
        row[: len(sequence)] = sequence

    logprobs = np.asarray(next_logprobs(model, params, jnp.asarray(rows), temperature=temperature))
    starts = [len(by_id[completion.prompt_id]) - 1 for completion in made]
    return [row[i : i + len(c.token_ids)] for row, i, c in zip(logprobs, starts, made, strict=True)]


def assert_equal_completions(found: list[Completion], expected: list[Completion]) -> None:
    """To the bit."""
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.prompt_id, mine.sample_index) == (theirs.prompt_id, theirs.sample_index)
        np.testing.assert_array_equal(mine.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(mine.logprobs.view(np.uint32), theirs.logprobs.view(np.uint32))


@pytest.fixture(scope="module")
def shared() -> tuple[FunctionalModel, Params, NativeSampler]:
    """One sampler for the tests that leave it in order; it reads bytes as text."""
    model = make_model()
    sampler = make_sampler(model, tokenizer=load_tokenizer(TokenizerSection(path="bytes")))
    params = weights(model)
    sampler.sync(params, 0)
    return model, params, sampler


def small_logits(model: FunctionalModel, seed: int) -> Params:
    """First weights whose logits are below 1 in size, where bfloat16's 8 bits are finer than 2e-2 nats."""
    params = model.init(jax.random.key(seed))
    logits, _ = model(params, jnp.asarray([prompt.token_ids for prompt in prompts(model.config)[:1]]))
    factor = jnp.minimum(1.0, 1.0 / jnp.abs(logits).max())
    head = params["decoder"]["logits_dense"] if "logits_dense" in params["decoder"] else params["token_embedder"]
    name = "kernel" if "kernel" in head else "embedding"
    head[name] = head[name] * factor
    return params


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=() if (family, dtype) == ("llama", "float32") else pytest.mark.slow)
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
    ],
)
def test_log_probabilities_are_the_trainers_after_each_of_five_syncs(family: str, dtype: str) -> None:
    """Within 1e-4 nats in float32 and 2e-2 in bfloat16, sampled and greedy, for weights that change each time."""
    model = make_model(FAMILIES[family], compute_dtype=dtype)
    sampler, given = make_sampler(model), prompts(FAMILIES[family])
    tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
    # A temperature below 1 multiplies what bfloat16 rounds off, and its tolerance leaves no room for that.
    temperatures = {"float32": (0.7, 0.0), "bfloat16": (1.0, 0.0)}[dtype]
    previous: list[Completion] = []
    for version in range(5):
        params = weights(model, version) if dtype == "float32" else small_logits(model, version)
        sampler.sync(params, version)
        assert sampler.weight_version == version
        assert sampler.last_sync is not None and sampler.last_sync.logprob_deviation < tolerance
        for temperature in temperatures:
            sampling = Sampling(max_tokens=24, temperature=temperature, num_samples=2)
            made = sampler.generate(given, sampling)
            expected = trainer_logprobs(model, params, given, made, temperature or 1.0)
            for completion, logprobs in zip(made, expected, strict=True):
                assert completion.weight_version == version
                np.testing.assert_allclose(completion.logprobs, logprobs, rtol=0, atol=tolerance)
        assert not previous or any(
            not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(made, previous, strict=True)
        )
        previous = made


def test_scores_are_the_trainers_log_probabilities(shared) -> None:
    model, params, sampler = shared
    given = prompts(count=11)
    made = sampler.generate(given, Sampling(max_tokens=9, temperature=1.0))
    sequences = [[*prompt.token_ids, *each.token_ids] for prompt, each in zip(given, made, strict=True)]
    scores = sampler.score([*sequences, [5]])
    assert scores[-1].shape == (0,)
    expected = trainer_logprobs(model, params, given, made, 1.0)
    for sequence, score, completion, logprobs in zip(sequences, scores, made, expected, strict=False):
        assert score.shape == (len(sequence) - 1,)
        np.testing.assert_allclose(score[-len(logprobs) :], logprobs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(score[-len(logprobs) :], completion.logprobs, rtol=0, atol=1e-4)


def test_a_completion_is_the_same_to_the_bit_in_any_company_order_and_after_a_restart(shared) -> None:
    model, params, sampler = shared
    given = prompts(count=7)
    sampling = Sampling(max_tokens=20, temperature=1.0, num_samples=3, seed=5, step=2)
    made = sampler.generate(given, sampling)
    assert [(c.prompt_id, c.sample_index) for c in made] == [(10 + i, s) for i in range(7) for s in range(3)]
    by_key = {(c.prompt_id, c.sample_index): c for c in made}
    reversed_ = sampler.generate(given[::-1], sampling)
    assert_equal_completions(reversed_, [by_key[c.prompt_id, c.sample_index] for c in reversed_])
    assert_equal_completions(sampler.generate([given[4]], sampling), made[12:15])
    restarted = make_sampler(model)
    restarted.sync(params, 0)
    assert_equal_completions(restarted.generate(given, sampling), made)
    changed = sampler.generate(given, replace(sampling, step=3))
    assert all(not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(made, changed, strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_two_thousand_samples_pass_chi_square(shared, temperature: float, top_p: float) -> None:
    """The first token of 2,000 samples against the trainer's softmax, truncated by sorting where top_p asks for it."""
    model, params, sampler = shared
    prompt = prompts()[0]
    made = sampler.generate(
        [prompt], Sampling(max_tokens=1, temperature=temperature, top_p=top_p, num_samples=2000, seed=3)
    )
    logits, _ = model(params, jnp.asarray([prompt.token_ids]))
    probabilities = np.asarray(jax.nn.softmax(logits[0, -1].astype(jnp.float32) / temperature), np.float64)
    order = np.argsort(probabilities)[::-1]
    above = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[above >= top_p]] = 0.0
    expected = 2000 * probabilities / probabilities.sum()
    counts = np.bincount([int(c.token_ids[0]) for c in made], minlength=SMALL.vocab_size)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 0.01
    exact = np.log(probabilities[[int(c.token_ids[0]) for c in made]] / probabilities.sum())
    np.testing.assert_allclose([c.logprobs[0] for c in made], exact, rtol=0, atol=1e-4)


def test_a_completion_ends_with_its_first_stop_id_or_at_its_length(shared) -> None:
    _, _, sampler = shared
    given = prompts()
    plain = sampler.generate(given, Sampling(max_tokens=30, temperature=1.0))
    assert {c.finish_reason for c in plain} == {"length"} and {len(c.token_ids) for c in plain} == {30}
    stop = int(plain[2].token_ids[7])
    for before, after in zip(
        plain, sampler.generate(given, Sampling(max_tokens=30, temperature=1.0, stop_ids=(stop,))), strict=True
    ):
        hits = np.flatnonzero(before.token_ids == stop)
        length = hits[0] + 1 if len(hits) else 30
        np.testing.assert_array_equal(after.token_ids, before.token_ids[:length])
        np.testing.assert_array_equal(after.logprobs, before.logprobs[:length])
        assert after.finish_reason == ("stop" if len(hits) else "length")


def test_a_completion_ends_with_the_token_that_completes_a_stop_string(shared) -> None:
    _, _, sampler = shared
    given, plain_sampling = prompts(count=12), Sampling(max_tokens=60, temperature=1.0)
    decode = sampler._decode_text
    plain = sampler.generate(given, plain_sampling)
    text = decode(plain[0].token_ids)
    stops = (next(a + b for a, b in pairwise(text) if a.isascii() and b.isascii()), "e")
    streamed: dict[int, list[int]] = {}

    def on_tokens(prompt_id: int, sample_index: int, token_ids: list[int]) -> None:
        streamed.setdefault(prompt_id, []).extend(token_ids)

    made = sampler.generate(given, replace(plain_sampling, stop_strings=stops), on_tokens)
    for before, after in zip(plain, made, strict=True):
        hits = [n for n in range(1, 61) if any(stop in decode(before.token_ids[:n]) for stop in stops)]
        np.testing.assert_array_equal(after.token_ids, before.token_ids[: hits[0] if hits else 60])
        assert after.finish_reason == ("stop" if hits else "length")
        assert streamed[after.prompt_id] == after.token_ids.tolist()
    assert made[0].finish_reason == "stop"


def test_progress_is_told_until_all_is_done() -> None:
    told = []
    sampler = make_sampler(
        model := make_model(), on_progress=told.append, proof_settings=proof_settings("float32", every=0)
    )
    sampler.sync(weights(model), 0)
    sampler.generate(prompts(count=9), Sampling(max_tokens=40, temperature=1.0))
    assert (told[-1].completed, told[-1].total, told[-1].tokens) == (9, 9, 360)
    assert [each.tokens for each in told] == sorted(each.tokens for each in told)
    assert len(told) >= 360 // (8 * 16)


def test_a_proof_comes_as_often_as_it_is_asked_for() -> None:
    model = make_model()
    sampler = make_sampler(model, proof_settings=proof_settings("float32", every=2))
    proven = []
    for version in range(4):
        sampler.sync(weights(model, version), version)
        assert sampler.last_sync is not None
        proven.append(sampler.last_sync.logprob_deviation is not None)
    assert proven == [True, False, True, False]


def swapped(params: Params) -> Params:
    attention = params["decoder"]["layers_1"]["self_attention"]
    attention["query"], attention["key"] = attention["key"], attention["query"]
    return params


def stale(params: Params, old: Params) -> Params:
    params["decoder"]["layers_1"]["mlp"]["wo"] = old["decoder"]["layers_1"]["mlp"]["wo"]
    return params


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda new, old: old, "tensors: the engine's loader must receive"),
        (stale, "1 of 21 tensors.*\n.*decoder/layers_1/mlp/wo/kernel"),
        (lambda new, old: swapped(new), "2 of 21 tensors.*\n.*layers_1/self_attention/(query|key)/kernel"),
    ],
    ids=["sync skipped", "one tensor stale", "queries and keys swapped"],
)
def test_a_sync_that_did_not_take_is_caught_and_named(shared, monkeypatch, fault: Any, message: str) -> None:
    model, params, sampler = shared
    load = Engine.load

    def faulty(engine: Engine, given: Params) -> None:
        old = engine.params
        load(engine, given)
        engine._params = fault(jax.tree.map(lambda leaf: leaf, engine.params), old)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "load", faulty)
        with pytest.raises(SamplerError, match=message):
            sampler.sync(weights(model, 7), 1)
    assert sampler.weight_version == -1
    with pytest.raises(SamplerError, match="no weights"):
        sampler.generate(prompts(), Sampling(max_tokens=1, temperature=1.0))
    sampler.sync(params, 0)


def ignore_temperature(logits: jax.Array, *, temperature: jax.Array, **rest: jax.Array) -> Any:
    return SAMPLE(logits, temperature=jnp.where(temperature == 0, 0.0, 1.0), **rest)


def wrong_token(logits: jax.Array, **rest: jax.Array) -> Any:
    tokens, logprobs = SAMPLE(logits, **rest)
    return (tokens + 1) % logits.shape[1], logprobs


SAMPLE = steps.sample_tokens


@pytest.mark.parametrize("fault", [ignore_temperature, wrong_token], ids=["temperature ignored", "wrong token"])
def test_a_log_probability_that_is_not_the_tokens_own_is_caught_at_the_sync(monkeypatch, fault: Any) -> None:
    monkeypatch.setattr(steps, "sample_tokens", fault)
    sampler = make_sampler(model := make_model())
    with pytest.raises(SamplerError, match=r"probe's completion.*log-probability"):
        sampler.sync(weights(model), 0)


def test_a_wrong_rope_theta_is_caught_at_the_sync(monkeypatch) -> None:
    right = engine_module.inference_model

    def wrong(model: FunctionalModel) -> FunctionalModel:
        return replace(right(model), config=model.config.replace(rope_theta=500.0))

    monkeypatch.setattr(engine_module, "inference_model", wrong)
    sampler = make_sampler(model := make_model())
    with pytest.raises(SamplerError, match=r"probe's completion.*log-probability"):
        sampler.sync(weights(model), 0)


def test_the_engine_outlives_the_trainers_arrays() -> None:
    """A trainer's step donates its parameters; the sampler goes on with its own."""
    model = make_model()
    sampler, params = make_sampler(model), weights(model)
    sampler.sync(params, 0)
    before = sampler.generate(prompts(), Sampling(max_tokens=5, temperature=1.0))
    jax.tree.map(lambda leaf: leaf.delete(), params)
    assert_equal_completions(sampler.generate(prompts(), Sampling(max_tokens=5, temperature=1.0)), before)


def test_weights_that_overflow_are_an_error_and_not_a_completion() -> None:
    model = make_model()
    sampler = make_sampler(model, proof_settings=proof_settings("float32", every=0))
    sampler.sync(jax.tree.map(lambda leaf: leaf * jnp.nan, weights(model)), 4)
    with pytest.raises(SamplerError, match=r"prompt 10, sample 0: .*not finite.*version 4"):
        sampler.generate(prompts(), Sampling(max_tokens=3, temperature=1.0))
    # What the broken weights left in the cache must not reach those that follow.
    sampler.sync(weights(model), 5)
    fresh = make_sampler(model, proof_settings=proof_settings("float32", every=0))
    fresh.sync(weights(model), 5)
    sampling = Sampling(max_tokens=5, temperature=1.0)
    assert_equal_completions(sampler.generate(prompts(), sampling), fresh.generate(prompts(), sampling))


def test_bad_input_is_refused_before_anything_is_sampled(shared) -> None:
    model, params, sampler = shared
    sampling = Sampling(max_tokens=4, temperature=1.0)
    for token_ids, message in (
        ((), "prompt 3: is empty"),
        ((1,) * 125, "prompt 3: 125 tokens with up to 4 sampled ones: the sampler holds 128"),
        ((1, 300), "prompt 3: token id 300: the vocabulary has ids 0 to 299"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.generate([Prompt((1,), 2), Prompt(token_ids, 3)], sampling)
    with pytest.raises(ValueError, match="sequence 0: token id 999"):
        sampler.score([[999]])
    with pytest.raises(ValueError, match="missing: token_embedder/embedding"):
        sampler.sync({"decoder": params["decoder"]}, 1)
    assert sampler.generate([], sampling) == []
    bare = make_sampler(model)
    with pytest.raises(SamplerError, match="call sync first"):
        bare.generate([Prompt((1,), 2)], sampling)
    bare.close()
    bare.close()
    with pytest.raises(SamplerError, match="closed"):
        bare.sync(params, 0)


def test_stop_strings_need_a_tokenizer(shared) -> None:
    model, params, _ = shared
    sampler = make_sampler(model, proof_settings=proof_settings("float32", every=0))
    sampler.sync(params, 0)
    with pytest.raises(ValueError, match=r"stop_strings=.*without a tokenizer"):
        sampler.generate([Prompt((1,), 2)], Sampling(max_tokens=4, temperature=1.0, stop_strings=("x",)))


def test_the_seed_of_a_completion_is_the_protocols(shared, monkeypatch) -> None:
    _, _, sampler = shared
    seeds = []
    submit = Engine.submit
    monkeypatch.setattr(
        Engine, "submit", lambda engine, request: (seeds.append(request.seed), submit(engine, request))[1]
    )
    sampler.generate(
        [Prompt((1,), 40), Prompt((2,), 41)], Sampling(max_tokens=1, temperature=1.0, num_samples=2, seed=8, step=9)
    )
    assert seeds == [sample_seed(8, 9, prompt, sample) for prompt in (40, 41) for sample in (0, 1)]
