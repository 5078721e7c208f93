"""The real vLLM: its samples and its sync's proof against the trainer's model, in float32 unless a test says so."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from models.config import load_preset
from models.functional import FunctionalModel, Params
from models.parameters import flatten
from posttrain.samplers import proof, vllm
from posttrain.samplers.base import Completion, Prompt, SamplerError, Sampling
from posttrain.samplers.vllm import VLLMSampler
from posttrain.samplers.vllm_settings import CPU_HEAD_DIMS
from tests.posttrain.samplers.engines import (
    LLAMA,
    MAX_LENGTH,
    TOLERANCE,
    assert_greedy_is_the_forward_pass,
    assert_logprobs_follow_five_syncs,
    byte_tokenizer,
    make_model,
    make_sampler,
    mixed_prompts,
    weights,
)

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model() -> FunctionalModel:
    return make_model(LLAMA)


@pytest.fixture(scope="module")
def sampler(model: FunctionalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSampler]:
    with make_sampler(model, tmp_path_factory.mktemp("engine")) as engine:
        SHARED.append(engine)
        yield engine


SHARED: list[VLLMSampler] = []


@pytest.fixture
def alone() -> None:
    """Makes room for a test's own engine; tests that ask for this stand behind those of the shared engine."""
    for engine in SHARED:
        engine.close()


def test_greedy_tokens_are_those_of_a_full_context_forward_pass(sampler, model):
    params = weights(model, 0)
    sampler.sync(params, 0)
    assert_greedy_is_the_forward_pass(sampler, model, params)


def test_logprobs_are_the_trainers_after_each_of_five_syncs(sampler, model):
    assert_logprobs_follow_five_syncs(sampler, model, TOLERANCE)
    assert sampler.weight_version == 5
    assert sampler.last_sync.layer_deviation < 1e-5
    assert sampler.last_sync.logprob_deviation < TOLERANCE


def test_scores_are_the_trainers_up_to_the_longest_sequence(sampler, model):
    params = weights(model, 3)
    sampler.sync(params, 3)
    sequences = [[7], [5, 6], list(range(200)), [int(i) for i in np.arange(MAX_LENGTH) * 7 % 512]]
    expected = proof.trainer_logprobs(model, params, sequences, temperature=1.0)
    for mine, theirs in zip(expected, sampler.score(sequences), strict=True):
        assert theirs.shape == mine.shape
        np.testing.assert_allclose(theirs, mine, atol=TOLERANCE, rtol=0)


def tokens_by_key(completions: list[Completion]) -> dict[tuple[int, int], list[int]]:
    return {(c.prompt_id, c.sample_index): c.token_ids.tolist() for c in completions}


def test_tokens_depend_on_the_seed_and_not_on_order_or_company(sampler, model):
    sampler.sync(weights(model, 1), 1)
    prompts = mixed_prompts(12, 512)
    sampling = Sampling(max_tokens=24, temperature=1.0, num_samples=2, seed=5, step=3)
    whole = tokens_by_key(sampler.generate(prompts, sampling))
    assert tokens_by_key(sampler.generate(prompts[::-1], sampling)) == whole
    alone = tokens_by_key(sampler.generate(prompts[4:5], replace(sampling, num_samples=1)))
    assert alone == {(104, 0): whole[104, 0]}
    assert whole[104, 0] != whole[104, 1]
    for other in (replace(sampling, seed=6), replace(sampling, step=4)):
        assert tokens_by_key(sampler.generate(prompts, other)) != whole


def truncated(probabilities: np.ndarray, top_k: int | None, top_p: float) -> np.ndarray:
    """The distribution over the most probable tokens that `top_k` and `top_p` leave."""
    order = np.argsort(-probabilities)
    kept = np.arange(len(order)) < (top_k or len(order))
    # A token stays while the ones before it have less than top_p together.
    ordered = np.where(kept, probabilities[order], 0.0)
    ordered = ordered / ordered.sum()
    ordered = np.where(np.cumsum(ordered) - ordered < top_p, ordered, 0.0)
    result = np.zeros_like(probabilities)
    result[order] = ordered / ordered.sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.7, None, 1.0), (1.0, None, 1.0), (1.0, None, 0.8), pytest.param(1.0, 20, 1.0, marks=pytest.mark.slow)],
)
def test_2000_samples_follow_the_trainers_distribution(sampler, model, temperature, top_k, top_p):
    params = weights(model, 2)
    sampler.sync(params, 2)
    prompt = Prompt((3, 1, 4, 1, 5, 9, 2, 6), 0)
    logits = np.asarray(model(params, np.array([prompt.token_ids]))[0][0, -1], np.float64) / temperature
    probabilities = truncated(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum(), top_k, top_p)
    sampling = Sampling(1, temperature, top_k=top_k, top_p=top_p, num_samples=2000, seed=11)
    completions = sampler.generate([prompt], sampling)
    drawn = np.array([completion.token_ids[0] for completion in completions])
    counts = np.bincount(drawn, minlength=512)
    assert counts[probabilities == 0].sum() == 0
    # Cells of at least 5 expected draws, as the test asks; the rarer tokens share one.
    cells = probabilities * 2000 >= 5
    observed = np.append(counts[cells], counts[~cells].sum())
    expected = np.append(probabilities[cells], probabilities[~cells].sum()) * 2000
    present = expected > 0
    assert stats.chisquare(observed[present], expected[present]).pvalue > 1e-3
    # What is reported is the log-probability under the truncated distribution.
    reported = np.array([completion.logprobs[0] for completion in completions])
    np.testing.assert_allclose(reported, np.log(probabilities[drawn]), atol=TOLERANCE, rtol=0)


def test_completions_end_at_stop_ids_stop_strings_and_lengths(sampler, model):
    sampler.sync(weights(model, 4), 4)
    prompts = mixed_prompts(4, 512, longest=40)
    free = sampler.generate(prompts, Sampling(max_tokens=40, temperature=1.0))
    assert {completion.finish_reason for completion in free} == {"length"}
    assert {len(completion.token_ids) for completion in free} == {40}
    stop = int(free[0].token_ids[10])
    stopped = sampler.generate(prompts, Sampling(max_tokens=40, temperature=1.0, stop_ids=(stop,)))
    tokenizer = byte_tokenizer()
    word = tokenizer.decode([next(int(t) for t in free[0].token_ids[5:] if 32 < t < 127)], skip_special=True)
    spelled = sampler.generate(prompts, Sampling(max_tokens=40, temperature=1.0, stop_strings=(word,)))
    for whole, by_id, by_text in zip(free, stopped, spelled, strict=True):
        at = np.flatnonzero(whole.token_ids == stop)
        assert by_id.token_ids.tolist() == whole.token_ids[: at[0] + 1 if len(at) else 40].tolist()
        assert by_id.finish_reason == ("stop" if len(at) else "length")
        texts = [tokenizer.decode(whole.token_ids[: n + 1], skip_special=True) for n in range(40)]
        length = next((n + 1 for n, text in enumerate(texts) if word in text), 40)
        assert by_text.token_ids.tolist() == whole.token_ids[:length].tolist()
        assert by_text.logprobs.shape == (length,)
        assert by_text.finish_reason == ("stop" if word in texts[length - 1] else "length")
    assert spelled[0].finish_reason == stopped[0].finish_reason == "stop"


def test_tokens_stream_as_they_are_sampled(sampler, model):
    sampler.sync(weights(model, 4), 4)
    calls: list[tuple[int, int, list[int]]] = []
    prompts = mixed_prompts(2, 512, longest=5)
    sampling = Sampling(max_tokens=6, temperature=1.0, num_samples=2)
    completions = sampler.generate(prompts, sampling, on_tokens=lambda *call: calls.append(call))
    assert len(calls) == 2 * 2 * 6
    for completion in completions:
        heard = [call[2] for call in calls if call[:2] == (completion.prompt_id, completion.sample_index)]
        assert [token for tokens in heard for token in tokens] == completion.token_ids.tolist()


def test_a_sequence_may_fill_the_engine_and_not_exceed_it(sampler, model):
    params = weights(model, 4)
    sampler.sync(params, 4)
    prompt = Prompt(tuple(range(200)), 1)
    sampling = Sampling(max_tokens=MAX_LENGTH - 200, temperature=1.0)
    completions = sampler.generate([prompt], sampling)
    assert len(completions[0].token_ids) == MAX_LENGTH - 200
    proof.check_completions(model, params, [prompt], completions, sampling=sampling, version=4, tolerance=TOLERANCE)
    with pytest.raises(ValueError, match="prompt 1: 200 tokens with up to 57"):
        sampler.generate([prompt], replace(sampling, max_tokens=57))
    with pytest.raises(ValueError, match=r"temperature=0\.005: vLLM raises it"):
        sampler.generate([prompt], replace(sampling, temperature=0.005))
    with pytest.raises(ValueError, match="sequence 0: 257 tokens"):
        sampler.score([[1] * 257])


@contextmanager
def engine_model_changed(sampler: VLLMSampler, change: Callable[[Any], Callable[[], None]]) -> Iterator[None]:
    """Changes vLLM's model; `change` returns what undoes it."""
    undo = sampler._llm.apply_model(change)[0]
    try:
        yield
    finally:
        undo()


def assert_caught(sampler: VLLMSampler, params: Params, *, match: str) -> None:
    """A sync finds the fault, and nothing is sampled from weights that are not proven."""
    with pytest.raises(SamplerError, match=match):
        sampler.sync(params, 9)
    assert sampler.weight_version == -1
    with pytest.raises(SamplerError, match="holds no proven weights"):
        sampler.generate([Prompt((1,), 0)], Sampling(max_tokens=1, temperature=1.0))


@pytest.fixture
def sound(sampler: VLLMSampler, model: FunctionalModel) -> Iterator[VLLMSampler]:
    """The engine in a sound state; after the fault is gone, a sync succeeds again."""
    sampler.sync(weights(model, 5), 5)
    yield sampler
    sampler.sync(weights(model, 6), 6)


def test_a_sync_that_the_loader_never_saw_is_caught(sound, model, monkeypatch):
    monkeypatch.setattr(sound._llm, "collective_rpc", lambda *args, **kwargs: None)
    assert_caught(sound, weights(model, 9), match=r"not received: model\.embed_tokens\.weight")


def test_a_sync_whose_tensors_the_engine_did_not_use_is_caught(sound, model, monkeypatch):
    monkeypatch.setattr(sound._llm, "collective_rpc", lambda name, kwargs: list(kwargs["weights_iterator"]))
    assert_caught(sound, weights(model, 9), match=r"model\.layers\.0\.self_attn\.q_proj\.weight: its output is off")


def test_a_stale_tensor_is_caught_by_name(sound, model, monkeypatch):
    old = dict(flatten(weights(model, 5)))["decoder", "layers", "mlp", "wo", "kernel"]
    true = vllm.hf_tensor

    def stale(torch, leaf, tensor, axis):
        return true(torch, old if tensor.name == "model.layers.1.mlp.down_proj.weight" else leaf, tensor, axis)

    monkeypatch.setattr(vllm, "hf_tensor", stale)
    assert_caught(
        sound, weights(model, 9), match=r"1 of \d+ tensors.*\n.*other values: model\.layers\.1\.mlp\.down_proj"
    )


def replacing(values: dict[str, Callable[[dict[str, Any]], Any]]) -> Callable[[Any], Callable[[], None]]:
    """Behind the loader's door, gives tensors other values, as a fault inside the engine would."""

    def change(model: Any) -> Callable[[], None]:
        true = model.load_weights

        def load_weights(pairs: Any) -> Any:
            received = dict(pairs)
            return true([(key, values[key](received) if key in values else received[key]) for key in received])

        model.load_weights = load_weights
        return lambda: setattr(model, "load_weights", true)

    return change


def test_a_tensor_that_goes_stale_inside_the_engine_is_caught_by_name(sound, model):
    name = "model.layers.2.mlp.up_proj.weight"
    with engine_model_changed(sound, replacing({name: lambda received: received[name] * 1.001})):
        assert_caught(sound, weights(model, 9), match=r"1 of \d+ layers.*\n.*model\.layers\.2\.mlp\.up_proj")


def test_a_tied_head_that_keeps_its_packed_copy_is_caught(sound, model, monkeypatch):
    """vLLM 0.31 does so on the CPU: its reload packs no tied head anew. Ours packs it."""
    monkeypatch.setattr(vllm, "_repack_tied_head", lambda model: None)
    assert_caught(sound, weights(model, 9), match=r"1 of \d+ layers.*\n.*lm_head")


def test_query_and_key_exchanged_are_caught(sound, model):
    query, key = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qk")
    exchange = replacing({query: lambda received: received[key], key: lambda received: received[query]})
    with engine_model_changed(sound, exchange):
        assert_caught(
            sound, weights(model, 9), match=r"2 of \d+ layers(.|\n)*self_attn\.q_proj(.|\n)*self_attn\.k_proj"
        )


def test_query_and_key_exchanged_on_the_way_are_caught(sound, model, monkeypatch):
    true = vllm.checkpoint_tensors

    def exchanged(config):
        names = {"q_proj": "k_proj", "k_proj": "q_proj"}
        return [
            replace(tensor, name=re.sub("[qk]_proj", lambda found: names[found[0]], tensor.name))
            for tensor in true(config)
        ]

    monkeypatch.setattr(vllm, "checkpoint_tensors", exchanged)
    assert_caught(sound, weights(model, 9), match=r"6 of \d+ tensors(.|\n)*layers\.0\.self_attn\.k_proj")


def test_a_prefix_cache_that_outlives_a_sync_is_caught(sound, model, monkeypatch):
    monkeypatch.setattr(sound._llm, "reset_prefix_cache", lambda: True)
    assert_caught(sound, weights(model, 9), match=r"the probe's completion: token .* its log-probability is")


def test_another_rope_theta_is_caught(sound, model):
    def change(engine_model: Any) -> Callable[[], None]:
        rotary = engine_model.model.layers[0].self_attn.rotary_emb
        true = rotary.cos_sin_cache
        rotary.base = 500.0
        rotary.cos_sin_cache = rotary._compute_cos_sin_cache().to(true.dtype)
        assert not (rotary.cos_sin_cache == true).all()
        return lambda: setattr(rotary, "cos_sin_cache", true)

    with engine_model_changed(sound, change):
        assert_caught(sound, weights(model, 9), match="the probe's completion: token")


def test_a_temperature_that_is_not_applied_is_caught(sound, model, monkeypatch):
    true = vllm._vllm_sampling
    monkeypatch.setattr(
        vllm, "_vllm_sampling", lambda job, sampling, **rest: true(job, replace(sampling, temperature=1.0), **rest)
    )
    assert_caught(sound, weights(model, 9), match="the probe's completion: token")


def test_log_probabilities_of_other_tokens_are_caught(sound, model, monkeypatch):
    true = vllm._Job.completion

    def shifted(job, output, version):
        completion = true(job, output, version)
        return replace(completion, logprobs=np.roll(completion.logprobs, 1))

    monkeypatch.setattr(vllm._Job, "completion", shifted)
    assert_caught(sound, weights(model, 9), match="the probe's completion: token")


def test_parameters_may_lie_on_the_transfer_guard_and_be_donated_after_a_sync(sampler, model):
    """As Tunix has it: transfers are forbidden around a sync, and the next step donates the parameters."""
    params = weights(model, 7)
    with jax.transfer_guard_device_to_host("disallow_explicit"), jax.transfer_guard_host_to_device("disallow_explicit"):
        sampler.sync(params, 7)
    prompts = mixed_prompts(4, 512)
    sampling = Sampling(max_tokens=8, temperature=1.0)
    before = tokens_by_key(sampler.generate(prompts, sampling))
    leaf = params["token_embedder"]["embedding"]
    jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)(params)
    assert leaf.is_deleted()
    assert tokens_by_key(sampler.generate(prompts, sampling)) == before


def test_a_tree_of_adapters_alone_is_refused(sampler, model):
    with pytest.raises(ValueError, match=r"missing: token_embedder/embedding(.|\n)*surplus: lora/kernel"):
        sampler.sync({"lora": {"kernel": jax.numpy.ones(3)}}, 1)


def test_one_engine_lives_at_a_time(sampler, model, tmp_path):
    with pytest.raises(SamplerError, match="an engine is alive in this process"):
        make_sampler(model, tmp_path)


def test_a_model_that_vllm_cannot_serve_is_refused_before_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"model\.head_dim=16: vLLM's CPU attention serves 32, 64"):
        make_sampler(make_model(load_preset("tiny-llama")), tmp_path)
    with pytest.raises(ValueError, match=r"model\.family=gpt3: vLLM serves"):
        make_sampler(make_model(load_preset("gpt3-52k")), tmp_path)


def test_the_list_of_head_dims_is_vllms_own(sampler):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_DIMS


def test_a_restart_gives_the_same_tokens_and_frees_the_first_engine(sampler, model, tmp_path):
    params = weights(model, 1)
    prompts = mixed_prompts(6, 512)
    sampling = Sampling(max_tokens=24, temperature=1.0, num_samples=2)
    sampler.sync(params, 1)
    first = tokens_by_key(sampler.generate(prompts, sampling))
    sampler.close()
    sampler.close()
    with pytest.raises(SamplerError, match="this engine is closed"):
        sampler.sync(params, 2)
    with make_sampler(model, tmp_path) as again:
        again.sync(params, 1)
        assert tokens_by_key(again.generate(prompts, sampling)) == first
