"""config.json to TransformerConfig and back, against published files and transformers' own reading of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.hf_config import config_from_hf, config_to_hf, read_config, resolve_config
from models.config import TransformerConfig, load_preset, preset_names
from recipes.schema import ModelSection

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}

# What the published checkpoints' config.json files say, shortened to the keys that matter.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "llama3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    # Gemma 2 leaves out that its head is tied and which layers slide.
    "gemma2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_json_gives_the_preset_of_that_model(name: str) -> None:
    assert config_from_hf(PUBLISHED[name], where=name) == load_preset(name)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_the_way_out_and_back(name: str) -> None:
    preset = load_preset(name)
    written = json.loads(json.dumps(config_to_hf(preset, dtype="bfloat16", token_ids={"eos_token_id": 2})))
    read = config_from_hf(written, where=name)
    # Gemma's scale passes through an integer; the rest is equal as it stands.
    assert read.replace(query_scale=preset.query_scale) == preset
    assert read.attention_scale == pytest.approx(preset.attention_scale, rel=1e-12)
    assert (written["eos_token_id"], written["dtype"]) == (2, "bfloat16")


def test_transformers_5_rope_parameters_say_the_same_as_the_older_keys() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {**scaling, "original_max_position_embeddings": 32}}
    new = {**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5, "original_max_position_embeddings": 32}}
    assert config_from_hf(old, where="old") == config_from_hf(new, where="new")
    assert config_from_hf(new, where="new").rope_theta == 5e5
    oldest = {**LLAMA, "rope_scaling": {"type": "default"}}
    assert config_from_hf(oldest, where="oldest").rope_theta == 10_000.0


def test_absent_head_dim_is_the_width_over_the_heads_except_where_transformers_has_a_default() -> None:
    assert config_from_hf(LLAMA, where="x").head_dim == 16
    assert config_from_hf({**LLAMA, "head_dim": None}, where="x").head_dim == 16
    qwen3 = {**LLAMA, "model_type": "qwen3", "architectures": None, "num_key_value_heads": 4}
    assert config_from_hf(qwen3, where="x").head_dim == 128


def windows(**changes: Any) -> tuple[int | None, ...]:
    content = {**LLAMA, "architectures": None, "num_key_value_heads": 4, **changes}
    return config_from_hf(content, where="x").layer_windows()


def test_which_layers_slide_is_read_as_each_family_says_it() -> None:
    assert windows(sliding_window=7) == (None, None, None)  # Llama has no such key
    assert windows(model_type="mistral") == (4096,) * 3
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 3
    assert windows(model_type="qwen2", sliding_window=7) == (None,) * 3
    assert windows(model_type="qwen2", sliding_window=7, use_sliding_window=True) == (None,) * 3  # from layer 28 on
    assert windows(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=1) == (None, 7, 7)
    listed = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(model_type="qwen3", sliding_window=7, use_sliding_window=True, layer_types=listed) == (None, 7, None)
    assert windows(model_type="gemma2", sliding_window=7) == (7, None, 7)
    assert windows(model_type="gemma2", sliding_window=7, layer_types=listed) == (None, 7, None)


REFUSED = [
    ({"model_type": "phi3"}, "model_type='phi3'"),
    ({"model_type": None}, "model_type=None"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=['LlamaForSequenceClassification']"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"hidden_act": ["silu"]}, "hidden_act=['silu']"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type='yarn'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type='linear'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters={'full_attention'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'}"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 66}, "hidden_size=66"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"num_key_value_heads": 3}, "num_heads=4"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ({"rope_theta": -1}, "rope_theta=-1"),
    ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False"),
    ({**GPT2, "add_cross_attention": True}, "add_cross_attention=True"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"model_type": "gemma2", "sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "layer_types="),
    ({"model_type": "gemma2", "layer_types": ["sliding_attention"]}, "a list of 3 names"),
    ({"model_type": "qwen2", "layer_types": [["full_attention"]] * 3}, "a list of 3 names"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 3}, "sliding_window=4096"),
]


@pytest.mark.parametrize(("changes", "blamed"), REFUSED)
def test_what_our_models_do_not_compute_is_refused_by_key_and_value(changes: dict[str, Any], blamed: str) -> None:
    content = {**LLAMA, "architectures": None, "num_key_value_heads": 2, **changes}
    with pytest.raises(ValueError) as caught:
        config_from_hf(content, where="folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ") and blamed in message and ";" in message
    assert len(message.splitlines()) == 1


def test_everything_wrong_with_a_file_is_told_at_once() -> None:
    content = {**LLAMA, "hidden_act": "relu", "tie_word_embeddings": 1}
    del content["vocab_size"]
    with pytest.raises(ValueError) as caught:
        config_from_hf(content, where="x")
    assert [line.split(":")[1].split("=")[0].strip() for line in str(caught.value).splitlines()] == [
        "vocab_size",
        "tie_word_embeddings",
        "hidden_act",
    ]


UNSAYABLE = [
    ("tiny-llama", {"qk_norm": True}, "model.qk_norm=True"),
    ("tiny-llama", {"qkv_bias": True}, "model.out_bias=False"),
    ("tiny-llama", {"query_scale": 1.0}, "model.query_scale=1.0"),
    ("tiny-llama", {"sliding_window": 4, "attention_pattern": ("sliding",)}, "model.layer windows=(4, 4)"),
    ("tiny-llama", {"embed_dim": 66}, "model.embed_dim=66"),
    ("mistral-7b", {"attention_pattern": ("sliding", "full")}, "model.layer windows="),
    ("mistral-7b", {"qkv_bias": True}, "model.qkv_bias=True"),
    ("tiny-qwen3", {"scale_embeddings": True}, "model.scale_embeddings=True"),
    ("tiny-gemma2", {"query_scale": 0.3}, "model.query_scale=0.3"),
    ("gpt3-52k", {"head_dim": 4}, "model.head_dim=4"),
    ("gpt3-52k", {"mlp_bias": False}, "model.mlp_bias=False"),
]


@pytest.mark.parametrize(("preset", "changes", "blamed"), UNSAYABLE)
def test_a_field_that_config_json_cannot_say_is_refused_on_the_way_out(
    preset: str, changes: dict[str, Any], blamed: str
) -> None:
    with pytest.raises(ValueError) as caught:
        config_to_hf(load_preset(preset).replace(**changes), dtype="float32", token_ids={})
    assert blamed in str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_transformers_reads_what_we_write_as_the_same_architecture(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    preset = load_preset(name)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(preset, dtype="float32", token_ids={})))
    theirs = AutoConfig.from_pretrained(tmp_path)
    # Back through the file that transformers itself writes, in its newer spelling.
    theirs.save_pretrained(tmp_path / "again")
    again = read_config(tmp_path / "again")
    assert again.replace(query_scale=preset.query_scale) == preset


def test_resolve_config_takes_a_preset_or_a_folder_and_then_the_overrides(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    folder = resolve_config(ModelSection(hf_path=str(tmp_path), overrides={"num_layers": 1}))
    assert folder == config_from_hf({**LLAMA, "num_hidden_layers": 1}, where="x")
    scaling = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8}
    preset = resolve_config(ModelSection(preset="tiny-llama", overrides={"rope_scaling": scaling}))
    assert isinstance(preset, TransformerConfig) and preset.rope_scaling is not None
    assert preset.rope_scaling.original_max_position == 8
    with pytest.raises(ValueError, match=r"model\.preset=None: .*; set model\.preset or model\.hf_path"):
        resolve_config(ModelSection())
    with pytest.raises(ValueError, match="did you mean num_layers"):
        resolve_config(ModelSection(preset="tiny-llama", overrides={"num_layer": 1}))


@pytest.mark.parametrize(
    ("content", "told"), [(None, "config.json: there is no such file"), ("{", "no JSON"), ("[]", "a list")]
)
def test_an_unreadable_config_json_is_one_sentence(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_config(tmp_path)


def test_resolving_an_architecture_imports_neither_jax_nor_the_hub_client() -> None:
    work = (
        "import sys; from models.checkpoints.hf_config import resolve_config; from recipes.schema import ModelSection;"
        "print(resolve_config(ModelSection(preset='tiny-llama')).num_layers, [name for name in ('jax', 'torch',"
        " 'transformers', 'huggingface_hub', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "2 []", done.stderr
