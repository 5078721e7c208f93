"""Whole checkpoints in and out: bits, files, and what is said about tensors that do not fit."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from models.checkpoints.huggingface import ModelCard, export_hf, import_hf, import_params
from models.config import TransformerConfig, load_preset
from models.parameters import flatten, init_params, stack_layers, unflatten, unstack_layers

CARD = ModelCard("tiny", base_model="owner/base", how="Two steps of nothing, in `tests`.")
PLENTY = 1 << 30


def leaves(params: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params)}


def assert_bit_equal(left: Any, right: Any) -> None:
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value.dtype, value.shape) == (right[name].dtype, right[name].shape), name
        assert value.tobytes() == right[name].tobytes(), name


def random_params(config: TransformerConfig, *, scan_layers: bool) -> dict[str, Any]:
    """Drawn parameters with noise on norms and biases, so that no two leaves are alike."""
    params = init_params(config, jax.random.key(0), scan_layers=True, param_scan_axis=1, dtype="float32")
    generator = np.random.default_rng(0)
    noisy = {path: np.asarray(leaf) + generator.normal(size=leaf.shape) * 0.1 for path, leaf in flatten(params)}
    params = unflatten({path: leaf.astype(np.float32) for path, leaf in noisy.items()})
    return params if scan_layers else unstack_layers(params, config.num_layers, 1)


def export(folder: Path, config: TransformerConfig, params: Any, **changes: Any) -> Path:
    arguments = {
        "param_scan_axis": 1,
        "dtype": "float32",
        "max_shard_bytes": PLENTY,
        "tokenizer_source": None,
        "generation": {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6},
        "card": CARD,
    }
    export_hf(folder, config, params, **(arguments | changes))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Llama of two layers in one file."""
    config = load_preset("tiny-llama")
    return export(tmp_path / "model", config, random_params(config, scan_layers=True))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of a checkpoint of one file in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CASES = [
    f"{family}-{size}"
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")
    for size in ("even", "odd")
]


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_export_reloads_in_transformers_whole_and_imports_again_to_the_bit(
    reference: Callable[[str], Any], case: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ref = reference(case)
    config, params = import_hf(ref.folder, scan_layers=True, param_scan_axis=1, dtype="float32")
    export(tmp_path / "out", config, params)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert type(model) is type(ref.model)
    rope = ("rope_parameters", "sliding_window", "layer_types", "head_dim")
    for name in rope:
        assert getattr(model.config, name, None) == getattr(ref.model.config, name, None), name
    for name, tensor in ref.model.state_dict().items():
        # GPT-2's norms pass through an offset: below one half their last bit may change, and nothing else.
        tolerance = 2.0**-24 if ".ln_" in name else 0.0
        assert torch.allclose(model.state_dict()[name], tensor, rtol=0.0, atol=tolerance), name
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not config.tied_embeddings

    config_again, again = import_hf(tmp_path / "out", scan_layers=True, param_scan_axis=1, dtype="float32")
    assert config_again == config
    assert_bit_equal(params, again)


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-qwen3", "tiny-gemma2", "gpt3-52k"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_layout_holds_the_same_weights(preset: str, axis: int, tmp_path: Path) -> None:
    config = load_preset(preset)
    unrolled = random_params(config, scan_layers=False)
    # A leaf of two axes or fewer has its layer axis last at most.
    stacked = jax.tree.map(np.asarray, stack_layers(unrolled, config.num_layers, axis))
    folder = export(tmp_path / "scanned", config, stacked, param_scan_axis=axis)
    other = export(tmp_path / "unrolled", config, unrolled)
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    _, read = import_hf(folder, scan_layers=True, param_scan_axis=axis, dtype="float32")
    _, read_unrolled = import_hf(folder, scan_layers=False, param_scan_axis=axis, dtype="float32")
    for name, value in leaves(stacked).items():
        rounding = 2.0**-23 if preset == "gpt3-52k" and name.endswith("scale") else 0.0
        np.testing.assert_allclose(leaves(read)[name], value, rtol=0.0, atol=rounding, err_msg=name)
    assert_bit_equal(jax.tree.map(np.asarray, unstack_layers(read, config.num_layers, axis)), read_unrolled)


def test_jax_arrays_are_exported_as_numpy_arrays_are(tmp_path: Path) -> None:
    config = load_preset("tiny-gemma2")
    params = random_params(config, scan_layers=True)
    first = export(tmp_path / "numpy", config, params) / "model.safetensors"
    second = export(tmp_path / "jax", config, jax.tree.map(jax.numpy.asarray, params)) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parity
def test_a_checkpoint_that_transformers_wrote_in_two_files_is_read(
    reference: Callable[[str], Any], tmp_path: Path
) -> None:
    ref = reference("llama-even")
    size = (ref.folder / "model.safetensors").stat().st_size
    ref.model.save_pretrained(tmp_path, max_shard_size=int(size * 0.6))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    whole = import_hf(ref.folder, scan_layers=True, param_scan_axis=1, dtype="float32")[1]
    assert_bit_equal(whole, import_hf(tmp_path, scan_layers=True, param_scan_axis=1, dtype="float32")[1])


@pytest.mark.parity
def test_an_export_in_several_files_is_read_by_transformers_and_by_us(
    reference: Callable[[str], Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config, params = import_hf(reference("qwen3-odd").folder, scan_layers=True, param_scan_axis=1, dtype="float32")
    bound = 140_000
    export(tmp_path / "out", config, params, max_shard_bytes=bound)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    # The largest tensor, the head of 517 x 60 float32, is below the bound, so every file is, its header aside.
    assert len(files) > 2 and all(file.stat().st_size < bound + 8192 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    num_params = sum(leaf.size for leaf in leaves(params).values())
    assert index["metadata"] == {"total_parameters": num_params, "total_size": 4 * num_params}
    info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]
    assert {name: list(found) for name, found in info.items() if found} == {}
    assert_bit_equal(
        params, import_params(tmp_path / "out", config, scan_layers=True, param_scan_axis=1, dtype="float32")
    )


@pytest.mark.parity
@pytest.mark.parametrize("case", ["gemma2-even", "gpt2-even"])
def test_bfloat16_checkpoints_are_read_exactly_and_written_exactly(
    reference: Callable[[str], Any], case: str, tmp_path: Path
) -> None:
    import copy

    import torch

    model = copy.deepcopy(reference(case).model).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    config, wide = import_hf(tmp_path / "in", scan_layers=True, param_scan_axis=1, dtype="float32")
    _, narrow = import_hf(tmp_path / "in", scan_layers=True, param_scan_axis=1, dtype="bfloat16")
    embedding = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(wide["token_embedder"]["embedding"], embedding)
    assert_bit_equal(jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), wide), narrow)
    export(tmp_path / "out", config, wide, dtype="bfloat16")
    assert_bit_equal(narrow, import_hf(tmp_path / "out", scan_layers=True, param_scan_axis=1, dtype="bfloat16")[1])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_every_tensor_that_does_not_fit_is_named_in_one_error(checkpoint: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.2.input_layernorm.weight"] = np.ones(64, np.float32)
        tensors["score.weight"] = np.ones((2, 64), np.float32)
        tensors["lm_head.weight"] = np.ones((511, 64), np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((32, 64), np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    rewrite(checkpoint, change)
    with pytest.raises(ValueError) as caught:
        import_hf(checkpoint, scan_layers=True, param_scan_axis=1, dtype="float32")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{checkpoint}: 6 tensors: ") and "; mend the files" in first
    assert [line.strip() for line in rest] == [
        "of a dtype that is not read: model.layers.0.self_attn.k_proj.weight I8, expected F32, BF16 or F16",
        "missing: model.layers.1.mlp.up_proj.weight [128, 64]",
        "missing: model.norm.weight [64]",
        "misshapen: lm_head.weight [511, 64], expected [512, 64]",
        "surplus: model.layers.2.input_layernorm.weight [64]",
        "surplus: score.weight [2, 64]",
    ]


def test_overrides_that_bring_parameters_without_a_tensor_are_refused(checkpoint: Path) -> None:
    config = load_preset("tiny-llama").replace(sandwich_norms=True)
    with pytest.raises(ValueError, match=r"model\.family=llama: .* no tensor for .*pre_ffw_norm/scale.*; remove"):
        import_params(checkpoint, config, scan_layers=True, param_scan_axis=1, dtype="float32")


def test_a_tied_head_in_the_files_is_tolerated_only_if_it_is_the_embedding(tmp_path: Path) -> None:
    config = load_preset("tiny-qwen3")
    folder = export(tmp_path / "model", config, random_params(config, scan_layers=True))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    import_hf(folder, scan_layers=True, param_scan_axis=1, dtype="float32")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1.0}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding, and tie_word_embeddings"):
        import_hf(folder, scan_layers=True, param_scan_axis=1, dtype="float32")


def test_names_of_the_bare_model_and_old_constants_are_read(tmp_path: Path) -> None:
    config = load_preset("gpt3-52k")
    folder = export(tmp_path / "model", config, random_params(config, scan_layers=True))
    _, expected = import_hf(folder, scan_layers=True, param_scan_axis=1, dtype="float32")

    def as_first_published(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
        tensors["h.0.attn.masked_bias"] = np.float32(-1e4).reshape(())

    rewrite(folder, as_first_published)
    assert_bit_equal(expected, import_hf(folder, scan_layers=True, param_scan_axis=1, dtype="float32")[1])


def test_damaged_files_and_untrue_indexes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    config = load_preset("tiny-llama")
    folder = export(tmp_path / "two", config, random_params(config, scan_layers=True), max_shard_bytes=300_000)
    first, second = sorted(folder.glob("*.safetensors"))
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())

    def error() -> str:
        with pytest.raises(ValueError) as caught:
            import_hf(folder, scan_layers=True, param_scan_axis=1, dtype="float32")
        return str(caught.value)

    moved = {**index["weight_map"], "model.norm.weight": first.name, "nowhere": second.name}
    index_file.write_text(json.dumps({"weight_map": moved}))
    assert f"model.norm.weight='{first.name}': it is in {second.name};" in error()
    assert f"nowhere='{second.name}': no file holds it;" in error()
    index_file.write_text(json.dumps({"weight_map": {"a": "../model/model.safetensors"}}))
    assert "files stand beside the index" in error()
    index_file.write_text(json.dumps({"weight_map": []}))
    assert "weight_map=[]: it maps tensors to files;" in error()
    index_file.write_text(json.dumps(index))
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    second.rename(folder / "away")
    assert re.search(rf"{first.name}: the file cannot be read .*\n.*{second.name}: the file cannot be read", error())
    first.write_bytes(content)
    first.rename(folder / second.name)
    (folder / first.name).write_bytes(content)
    assert "the tensor is in" in error()

    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"there is only pytorch_model\.bin; save the model as safetensors"):
        import_hf(checkpoint, scan_layers=True, param_scan_axis=1, dtype="float32")


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path) -> None:
    config = load_preset("tiny-llama")
    params = random_params(config, scan_layers=True)
    params["decoder"]["layers"]["mlp"]["wo"]["kernel"][3, 1, 5] = np.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: 1 of 8192 values are not finite"):
        export(tmp_path / "out", config, params)
    assert list(tmp_path.iterdir()) == []
    params["decoder"]["layers"]["mlp"]["wo"]["kernel"][3, 1, 5] = 1e6
    with pytest.raises(ValueError, match="not finite in float16"):
        export(tmp_path / "out", config, params, dtype="float16")
    export(tmp_path / "out", config, params)
    with pytest.raises(ValueError, match="an export needs a folder of its own"):
        export(tmp_path / "out", config, params)


def test_a_tree_that_is_not_the_configurations_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    config = load_preset("tiny-llama")
    params = random_params(config, scan_layers=True)
    params["decoder"]["decoder_norm"] = {"scales": np.ones(64, np.float32)}
    with pytest.raises(ValueError) as caught:
        export(tmp_path / "out", config.replace(vocab_size=500), params)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "misshapen: decoder/logits_dense/kernel [64, 512], expected [64, 500]",
        "misshapen: token_embedder/embedding [512, 64], expected [500, 64]",
        "missing: decoder/decoder_norm/scale [64]",
        "surplus: decoder/decoder_norm/scales [64]",
    ]
    with pytest.raises(ValueError, match=r"misshapen: decoder/layers/.*expected"):
        export(tmp_path / "out", load_preset("tiny-llama"), random_params(config, scan_layers=True), param_scan_axis=0)


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/a.jinja"):
        (source / name).write_text(f"content of {name}")
    (source / "model.safetensors").write_text("not the tokenizer's")
    config = load_preset("tiny-llama")
    params = random_params(config, scan_layers=True)
    folder = export(tmp_path / "out", config, params, tokenizer_source=source)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        "README.md",
        "additional_chat_templates/a.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (folder / "chat_template.jinja").read_text() == "content of chat_template.jinja"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6}
    content = json.loads((folder / "config.json").read_text())
    assert (content["bos_token_id"], content["eos_token_id"], "temperature" in content) == (1, [2, 3], False)

    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", "llama"],
        "base_model": "owner/base",
    }
    # 2*512*64 for table and head, 64 for the last norm; a layer: 64*(64+32+32) + 64*64 + 3*64*128 + 2*64.
    assert 2 * 512 * 64 + 64 + 2 * (8192 + 4096 + 24576 + 128) == 139584
    for told in ("# tiny\n", "| Parameters | 139,584 |", "| Weights | float32 |", "llama", CARD.how, "AutoTokenizer"):
        assert told in card
    with pytest.raises(ValueError, match=r"a tokenizer is tokenizer\.json"):
        export(tmp_path / "other", config, params, tokenizer_source=folder / "additional_chat_templates")


@pytest.mark.parity
def test_transformers_reads_generation_config_and_tokenizer_of_an_export(shared_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = load_preset("tiny-qwen3")
    published, source = shared_dir / "tokenizers" / "qwen3", tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_bytes(gzip.decompress((published / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(published / "tokenizer_config.json", source / "tokenizer_config.json")
    folder = export(tmp_path / "out", config, random_params(config, scan_layers=True), tokenizer_source=source)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.temperature) == ([2, 3], 0.6)
    messages = [{"role": "user", "content": "Hi"}]
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, source))
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
