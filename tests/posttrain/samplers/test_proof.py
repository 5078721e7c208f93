"""The trainer's side of a sync's proof: checksums and layer outputs against loops in NumPy, and the comparisons."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.hf_names import checkpoint_tensors
from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel, Params
from models.parameters import flatten
from posttrain.samplers import proof
from posttrain.samplers.base import Completion, Prompt, SamplerError, Sampling
from recipes.schema import ModelSection

SMALL = load_preset("tiny-llama-rl").replace(vocab_size=32, embed_dim=8, mlp_dim=12, num_layers=2, head_dim=4)
CONFIGS = {
    "llama, tied": SMALL,
    "qwen2, biases": SMALL.replace(family="qwen2", qkv_bias=True, tied_embeddings=False),
    "qwen3, head norms": SMALL.replace(family="qwen3", qk_norm=True),
}
LAYOUTS = {"scanned": {"scan_layers": True}, "scanned at 0": {"scan_layers": True, "param_scan_axis": 0}}
LAYOUTS |= {"apart": {"scan_layers": False}}
SOME_LAYOUTS = ["scanned", pytest.param("scanned at 0", marks=pytest.mark.slow), "apart"]


def make_model(config: TransformerConfig = SMALL, **options: Any) -> FunctionalModel:
    return FunctionalModel(config, ModelSection(preset="tiny-llama-rl", **options))


def noisy(model: FunctionalModel, seed: int = 0) -> Params:
    """Weights with no value that is the same everywhere, as first norms and biases are."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    )


def hugging_face(model: FunctionalModel, params: Params) -> dict[str, np.ndarray]:
    """Every tensor by the exporter's own, independent way."""
    leaves = dict(flatten(params))
    tensors = {}
    for tensor in checkpoint_tensors(model.config):
        leaf = np.asarray(leaves[proof.leaf_path(tensor, scanned=model.options.scan_layers)])
        axis = proof.layer_axis(tensor, model)
        tensors[tensor.name] = tensor.to_hf(leaf if axis is None else leaf.take(tensor.layer, axis))
    return tensors


@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_checksums_are_weighted_sums_of_bits_in_hugging_faces_layout(config, layout):
    model = make_model(CONFIGS[config], **LAYOUTS[layout])
    params = noisy(model)
    found = proof.trainer_checksums(model, params)
    tensors = hugging_face(model, params)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        matrix = np.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1])).view(np.uint32)
        rows = proof.checksum_weights(matrix.shape[0], salt=proof.ROW_SALT)
        columns = proof.checksum_weights(matrix.shape[1], salt=proof.COLUMN_SALT)
        total = 0
        for r, row in enumerate(matrix.tolist()):
            for c, bits in enumerate(row):
                total += bits * int(rows[r]) * int(columns[c])
        assert found[name] == total % 2**32, name


def test_a_checksum_sees_one_bit_a_transposition_and_an_exchange():
    model = make_model(SMALL.replace(num_kv_heads=SMALL.num_heads, mlp_dim=8))
    params = noisy(model)
    before = proof.trainer_checksums(model, params)
    leaves = dict(flatten(params))
    gate = leaves["decoder", "layers", "mlp", "wi_0", "kernel"]
    faults: list[Callable[[jax.Array], jax.Array]] = [
        lambda x: x.at[3, 1, 5].set(np.nextafter(x[3, 1, 5], np.float32(9))),
        lambda x: x.at[:, 1].set(x[:, 1].T),
        lambda x: x.at[:, 1].set(x[::-1, 1]),
        lambda x: x[:, ::-1],
    ]
    for fault in faults:
        params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"] = fault(gate)
        after = proof.trainer_checksums(model, params)
        changed = {name for name in before if before[name] != after[name]}
        assert "model.layers.1.mlp.gate_proj.weight" in changed
        assert changed <= {f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)}


def test_checksum_weights_are_odd_and_do_not_repeat():
    for salt in (proof.ROW_SALT, proof.COLUMN_SALT):
        found = proof.checksum_weights(5000, salt=salt)
        assert (found % 2 == 1).all()
        assert len(set(found.tolist())) > 4995
    assert proof.probe_vector(5000).min() < -0.99 < 0.99 < proof.probe_vector(5000).max()
    assert abs(proof.probe_vector(5000).mean()) < 0.05


@pytest.mark.parametrize("layout", SOME_LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_layer_outputs_are_products_with_the_exported_weights(config, layout):
    model = make_model(CONFIGS[config], **LAYOUTS[layout])
    params = noisy(model)
    tensors = hugging_face(model, params)
    found = proof.trainer_layer_outputs(model, params)
    names = {name for name in tensors if not name.endswith(".bias")} | {"lm_head.weight"}
    assert found.keys() == names
    for name, answer in found.items():
        tensor = tensors.get(name, tensors["model.embed_tokens.weight"]).astype(np.float64)
        if name.endswith("embed_tokens.weight"):
            expected = tensor[[0, 15, 31]]
        elif tensor.ndim == 1:
            expected = tensor
        else:
            expected = tensor @ proof.probe_vector(tensor.shape[1]).astype(np.float64)
            expected = expected + tensors.get(name.removesuffix("weight") + "bias", 0.0)
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_comparisons_name_what_is_wrong():
    expected = {"a.weight": 1, "b.weight": 2}
    proof.compare_checksums(expected, {"a.weight": 1, "b.weight": 2, "extra": 3})
    with pytest.raises(SamplerError, match=r"sync: 2 of 2 tensors(.|\n)*not received: a.weight(.|\n)*values: b.weight"):
        proof.compare_checksums(expected, {"b.weight": 3})
    outputs = {"a.weight": np.array([1.0, -4.0]), "b.weight": np.array([2.0])}
    near = {"a.weight": np.array([1.0, -4.002]), "b.weight": np.array([2.0])}
    # 0.002 of a largest magnitude of 4.
    assert proof.compare_layers(outputs, near, tolerance=1e-3) == pytest.approx(5e-4)
    with pytest.raises(SamplerError, match=r"sync: 1 of 2 layers(.|\n)*a.weight: its output is off by 5.0e-04"):
        proof.compare_layers(outputs, near, tolerance=1e-4)
    for wrong in (np.array([np.nan]), np.array([2.0, 2.0])):
        with pytest.raises(SamplerError, match=r"b\.weight"):
            proof.compare_layers(outputs, {**near, "b.weight": wrong}, tolerance=1e-3)


def completions_of(model: FunctionalModel, params: Params, prompt: Prompt, temperature: float) -> Completion:
    """Four tokens with the log-probabilities that the definition gives, in float64."""
    tokens = np.array([4, 9, 2, 6], np.int32)
    ids = [*prompt.token_ids, *tokens.tolist()]
    logits = np.asarray(model(params, jnp.array([ids]))[0][0], np.float64) / (temperature or 1.0)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    start = len(prompt.token_ids) - 1
    chosen = np.array([logprobs[start + i, token] for i, token in enumerate(tokens)], np.float32)
    return Completion(prompt.prompt_id, 0, tokens, chosen, "length", 3)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_completions_pass_with_the_trainers_logprobs_and_fail_by_name_without(temperature):
    model = make_model()
    params = noisy(model)
    prompt, sampling = Prompt((1, 2, 3), 8), Sampling(4, temperature)
    sound = completions_of(model, params, prompt, temperature)

    def check(completion: Completion, sampling: Sampling = sampling) -> float:
        return proof.check_completions(
            model, params, [prompt], [completion], sampling=sampling, version=3, tolerance=1e-4
        )

    assert check(sound) < 1e-5
    shifted = sound.logprobs + np.array([0, 0, 2e-4, 0], np.float32)
    with pytest.raises(SamplerError, match=r"prompt 8, sample 0: token 2 \(id 2\): its log-probability is"):
        check(replace(sound, logprobs=shifted))
    with pytest.raises(SamplerError, match="token 1"):
        check(replace(sound, logprobs=np.where(np.arange(4) == 1, np.nan, sound.logprobs)))
    with pytest.raises(SamplerError, match="token"):
        check(sound, replace(sampling, temperature=0.5))
    with pytest.raises(SamplerError, match="sampled by weight version 2: the trainer holds version 3"):
        check(replace(sound, weight_version=2))
    with pytest.raises(ValueError, match="without truncation"):
        check(sound, replace(sampling, top_p=0.9))


def test_trainer_logprobs_do_not_depend_on_the_other_sequences():
    model = make_model()
    params = noisy(model)
    together = proof.trainer_logprobs(model, params, [[1, 2, 3], [4] * 40, [7]], temperature=1.0)
    assert [len(row) for row in together] == [2, 39, 0]
    [alone] = proof.trainer_logprobs(model, params, [[1, 2, 3]], temperature=1.0)
    np.testing.assert_allclose(together[0], alone, atol=1e-6, rtol=0)


def test_the_probe_reaches_past_a_block_and_fits_short_engines():
    model = make_model()
    prompt, sampling = proof.probe(model, 128, max_length=4096)
    assert len(prompt.token_ids) == 136
    assert sampling == Sampling(8, 0.7)
    assert all(0 <= token < 32 for token in prompt.token_ids)
    for length in (2, 5, 9, 64):
        prompt, sampling = proof.probe(model, 128, max_length=length)
        assert len(prompt.token_ids) >= 1 <= sampling.max_tokens
        assert len(prompt.token_ids) + sampling.max_tokens == length


def test_an_incomplete_tree_is_refused_leaf_by_leaf():
    model = make_model()
    params = noisy(model)
    proof.check_tree(model, params)
    params["decoder"]["layers"]["mlp"]["wo"] = {"lora_a": jnp.ones((2, 2))}
    params["decoder"]["decoder_norm"]["scale"] = jnp.ones(9)
    problems = (
        "missing: decoder/layers/mlp/wo/kernel [12, 2, 8]",
        "misshapen: decoder/decoder_norm/scale [9], expected [8]",
        "surplus: decoder/layers/mlp/wo/lora_a [2, 2]",
    )
    message = (
        "sync: 3 parameters: a sampler takes over the whole policy, with adapters merged; give it the model's full "
        "tree:\n  " + "\n  ".join(problems)
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        proof.check_tree(model, params)
