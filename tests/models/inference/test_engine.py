"""The engine against full-context forwards, and against itself: other batches, orders, slots, restarts, lengths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel, Params
from models.inference import engine as engine_module
from models.inference.engine import Engine, Request
from recipes.schema import ModelSection

LLAMA = load_preset("tiny-llama").replace(num_kv_heads=2)
CONFIGS = {
    "llama": LLAMA,
    "mistral": LLAMA.replace(family="mistral", sliding_window=8, attention_pattern=("sliding",)),
    "qwen2": LLAMA.replace(family="qwen2", qkv_bias=True, tied_embeddings=True),
    "qwen3": load_preset("tiny-qwen3"),
    "gemma2": load_preset("tiny-gemma2"),
    "gpt3": load_preset("gpt3-52k").replace(num_layers=2),
}
MAX_LENGTH = 128


def make_model(config: TransformerConfig = LLAMA, **options: Any) -> FunctionalModel:
    return FunctionalModel(config, ModelSection(preset="tiny-llama", **options))


def weights(model: FunctionalModel, seed: int = 0) -> Params:
    """Parameters with norms and biases away from their trivial starts, and sharper than first ones."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.05 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    )


def make_engine(model: FunctionalModel, params: Params, **changes: Any) -> Engine:
    engine = Engine(model, **{"num_slots": 8, "max_length": MAX_LENGTH, "steps_per_call": 16, **changes})
    engine.load(params)
    return engine


def prompts(count: int, *, vocab_size: int, longest: int = 60, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, vocab_size, n).tolist()) for n in rng.integers(1, longest, count)]


def request(prompt: tuple[int, ...], seed: int = 0, **changes: Any) -> Request:
    settings = {"max_tokens": 24, "temperature": 0.8, "top_k": None, "top_p": 1.0}
    return Request(prompt=prompt, seed=seed, **{**settings, **changes})


def run(engine: Engine, requests: list[Request], stop_ids: tuple[int, ...] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and log-probabilities of each request."""
    engine.begin(stop_ids)
    for each in requests:
        engine.submit(each)
    made: list[tuple[list, list]] = [([], []) for _ in requests]
    while engine.busy:
        for chunk in engine.step(engine.steps_per_call):
            made[chunk.request][0].append(chunk.token_ids)
            made[chunk.request][1].append(chunk.logprobs)
    return [(np.concatenate(tokens), np.concatenate(logprobs)) for tokens, logprobs in made]


def assert_bit_equal(found: list[tuple[np.ndarray, np.ndarray]], expected: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
        np.testing.assert_array_equal(mine[1].view(np.uint32), theirs[1].view(np.uint32))


def check_greedy(model: FunctionalModel, params: Params, engine: Engine) -> None:
    """64 greedy tokens of 32 prompts are those of a forward over the whole context, and so are their probabilities."""
    given = prompts(32, vocab_size=model.config.vocab_size)
    made = run(engine, [request(prompt, temperature=0.0, max_tokens=64) for prompt in given])
    rows = np.zeros((32, MAX_LENGTH), np.int32)
    for row, prompt, (tokens, _) in zip(rows, given, made, strict=True):
        row[: len(prompt) + 64] = [*prompt, *tokens]
    logits = np.asarray(jax.jit(lambda params, ids: model(params, ids)[0])(params, rows))
    log_softmax = np.asarray(jax.nn.log_softmax(logits))
    for index, (prompt, (tokens, logprobs)) in enumerate(zip(given, made, strict=True)):
        at = np.arange(len(prompt) - 1, len(prompt) + 63)
        np.testing.assert_array_equal(logits[index, at].argmax(-1), tokens, err_msg=f"prompt {index}")
        np.testing.assert_allclose(log_softmax[index, at, tokens], logprobs, rtol=0, atol=1e-4)
    assert len({int(token) for tokens, _ in made for token in tokens}) > 10


FAST = {"llama"}
FAMILIES = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in CONFIGS]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_full_context(family: str) -> None:
    model = make_model(CONFIGS[family])
    params = weights(model)
    check_greedy(model, params, make_engine(model, params))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"framework": "linen"}, {"scan_layers": False}, {"param_scan_axis": 0}])
def test_greedy_tokens_do_not_depend_on_framework_or_layout(options: dict[str, Any]) -> None:
    model = make_model(**options)
    params = weights(model)
    check_greedy(model, params, make_engine(model, params))


def test_a_cache_of_another_rope_theta_is_caught_by_the_greedy_check() -> None:
    model = make_model()
    params = weights(model)
    with pytest.raises(AssertionError):
        check_greedy(model, params, make_engine(make_model(LLAMA.replace(rope_theta=500.0)), params))


@pytest.fixture(scope="module")
def shared() -> tuple[FunctionalModel, Params, Engine]:
    """One engine for the tests that only use it."""
    model = make_model()
    params = weights(model)
    return model, params, make_engine(model, params)


def mixed_requests() -> list[Request]:
    """24 requests for 8 slots, unlike in all settings, some of one prompt."""
    given = prompts(12, vocab_size=LLAMA.vocab_size)
    kinds = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.8, "max_tokens": 9},
        {"top_k": 5, "max_tokens": 40},
        {"temperature": 1.3, "max_tokens": 1},
    ]
    return [request(given[index // 2], seed=index, **kinds[index % 5]) for index in range(24)]


def test_a_request_is_the_same_to_the_bit_alone_in_company_and_in_any_order(shared, rng) -> None:
    _, _, engine = shared
    requests = mixed_requests()
    together = run(engine, requests)
    order = rng.permutation(len(requests))
    shuffled = run(engine, [requests[index] for index in order])
    assert_bit_equal(shuffled, [together[index] for index in order])
    for index in (0, 7, 18):
        assert_bit_equal(run(engine, [requests[index]]), [together[index]])


def test_a_request_is_the_same_to_the_bit_after_a_restart_and_for_other_looks_from_the_host(shared) -> None:
    model, params, engine = shared
    requests = mixed_requests()
    restarted = make_engine(model, params, steps_per_call=5)
    assert_bit_equal(run(restarted, requests), run(engine, requests))


def test_a_request_is_the_same_to_the_bit_in_every_slot_whatever_stood_there(shared) -> None:
    """Slots are first filled with what is not finite; each then serves the request in turn, beside seven others."""
    _, _, engine = shared
    wanted, others = request((5, 6, 7), seed=99), mixed_requests()[:7]
    expected = run(engine, [wanted])
    slots = engine._slots
    spoilt = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), (slots.cache.key, slots.cache.value))
    for slot in range(8):
        cache = type(slots.cache)(*jax.tree.map(jnp.copy, spoilt), engine._slots.cache.lengths)
        engine._slots = type(slots)(**{**vars(engine._slots), "cache": cache})
        assert_bit_equal([run(engine, [*others[:slot], wanted, *others[slot:]])[slot]], expected)


def test_a_refilled_slot_starts_at_once_and_gives_what_a_fresh_one_gives(shared) -> None:
    _, _, engine = shared
    long = [request((3, index), seed=index, max_tokens=30) for index in range(7)]
    short = [request((4, index), seed=50 + index, max_tokens=2) for index in range(9)]
    engine.begin(())
    for each in [*long, *short]:
        engine.submit(each)
    calls = 0
    made: dict[int, list[int]] = {}
    while engine.busy:
        calls += 1
        for chunk in engine.step(16):
            made.setdefault(chunk.request, []).extend(chunk.token_ids.tolist())
    # Nine short requests take turns in the eighth slot, two steps each, while the long ones go on: 18 of 30 steps.
    assert calls <= 9 + 2
    for index, each in enumerate([*long, *short]):
        assert made[index] == run(engine, [each])[0][0].tolist()


def test_a_completion_ends_with_its_first_stop_id(shared) -> None:
    _, _, engine = shared
    (tokens, logprobs), *_ = run(engine, [request((1, 2), max_tokens=40)])
    stop = int(tokens[11])
    first = int(np.argmax(tokens == stop))
    (stopped, stopped_logprobs), *_ = run(engine, [request((1, 2), max_tokens=40)], stop_ids=(stop,))
    np.testing.assert_array_equal(stopped, tokens[: first + 1])
    np.testing.assert_array_equal(stopped_logprobs, logprobs[: first + 1])


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(shared) -> None:
    _, _, engine = shared
    requests = mixed_requests()[:10]
    expected = run(engine, requests)
    engine.begin(())
    for each in requests:
        engine.submit(each)
    made: dict[int, list[int]] = {}
    engine.cancel(9)
    cancelled = False
    while engine.busy:
        for chunk in engine.step(4):
            made.setdefault(chunk.request, []).extend(chunk.token_ids.tolist())
        if not cancelled:
            engine.cancel(3)
            cancelled = True
    assert 9 not in made and len(made[3]) <= 4
    for index in set(range(9)) - {3}:
        assert made[index] == expected[index][0].tolist()


def test_long_prompts_go_through_in_chunks(shared, monkeypatch) -> None:
    _, _, engine = shared
    requests = [request(tuple(range(length)), seed=length, temperature=0.0) for length in (15, 16, 17, 33, 90, 100)]
    whole = run(engine, requests)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    for (tokens, logprobs), (expected, expected_logprobs) in zip(run(engine, requests), whole, strict=True):
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-5)


def test_mixed_lengths_and_settings_compile_a_handful_of_programs() -> None:
    # Functions jitted alike share their programs, and other tests of this process have made engines.
    jax.clear_caches()
    model = make_model()
    engine = make_engine(model, weights(model))
    sized = [request(tuple([1] * n), seed=n, max_tokens=1 + n % 5) for n in range(1, 120, 3)]
    run(engine, [*sized, *mixed_requests()])
    # Prompts are padded to 16, 32, 64 or 128; decoding is one program.
    assert engine._prefill._cache_size() == 4
    assert engine._insert._cache_size() == 4
    assert engine._decode._cache_size() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 12}, "num_slots=12: .*multiple of 8"),
        ({"num_slots": 0}, "num_slots=0"),
        ({"max_length": 513}, "max_length=513: .*512 positions"),
        ({"max_length": 1}, "max_length=1"),
        ({"steps_per_call": 0}, "steps_per_call=0"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(make_model(), **{"num_slots": 8, "max_length": MAX_LENGTH, "steps_per_call": 16, **changes})


def on_eight_devices() -> None:
    """Runs in a process of its own: a policy sharded over 8 devices samples what one device samples."""
    from models.mesh import make_mesh
    from models.sharding import DEFAULT_RULES, param_shardings
    from recipes.schema import MeshSection

    model = make_model()
    params = weights(model)
    requests = [request(prompt, temperature=0.0) for prompt in prompts(8, vocab_size=LLAMA.vocab_size)]
    expected = run(make_engine(model, params), requests)
    mesh = make_mesh(MeshSection(fsdp=4, tensor=2))
    shardings = param_shardings(model.config, mesh, DEFAULT_RULES, scan_layers=True, param_scan_axis=1)
    sharded = run(make_engine(model, jax.device_put(params, shardings)), requests)
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(sharded, expected, strict=True):
        np.testing.assert_array_equal(tokens, expected_tokens)
        np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-4)
    print("equal")


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_sharded_policy_samples_what_one_device_samples(run_on_devices: Any) -> None:
    assert run_on_devices(8, on_eight_devices).strip().endswith("equal")
