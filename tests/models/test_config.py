"""Presets are the published models, and a configuration that cannot be built says why."""

import re
from importlib import resources
from typing import Any

import pytest
import yaml

from models.config import RopeScaling, TransformerConfig, build_config, load_preset, preset_names
from models.parameters import count_params

LLAMA: dict[str, Any] = load_preset("tiny-llama").model_dump()

# Parameters as the models' authors publish them (Hugging Face's safetensors totals; a tied head counts once), with the
# rotary base, the norms' epsilon and the longest sequence (of Qwen 2.5, the instruct models').
PUBLISHED = {
    "gpt3-52k": (52_464, None, 1e-5, 2048),
    "llama2-7b": (6_738_415_616, 1e4, 1e-5, 4096),
    "llama3-8b": (8_030_261_248, 5e5, 1e-5, 8192),
    "llama3.1-8b": (8_030_261_248, 5e5, 1e-5, 131_072),
    "llama3.1-70b": (70_553_706_496, 5e5, 1e-5, 131_072),
    "llama3.2-1b": (1_235_814_400, 5e5, 1e-5, 131_072),
    "llama3.2-3b": (3_212_749_824, 5e5, 1e-5, 131_072),
    "mistral-7b": (7_241_732_096, 1e4, 1e-5, 32_768),
    "qwen2.5-0.5b": (494_032_768, 1e6, 1e-6, 32_768),
    "qwen2.5-1.5b": (1_543_714_304, 1e6, 1e-6, 32_768),
    "qwen3-0.6b": (596_049_920, 1e6, 1e-6, 40_960),
    "qwen3-1.7b": (1_720_574_976, 1e6, 1e-6, 40_960),
    "qwen3-8b": (8_190_735_360, 1e6, 1e-6, 40_960),
    "gemma2-2b": (2_614_341_888, 1e4, 1e-6, 8192),
    "gemma2-9b": (9_241_705_984, 1e4, 1e-6, 8192),
}
# Our own, counted by hand: tables + layers * (attention + MLP + norms) + the last norm.
OWN = {
    "bench-r": 2 * 4096 * 256 + 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688 + 2 * 256) + 256,
    "stories": 187 * 128 + 3 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128,
    "tiny-32k": 2 * 32000 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64,
    "tiny-gemma2": 512 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 4 * 64) + 64,
    "tiny-llama": 2 * 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64,
    "tiny-llama-rl": 512 * 128 + 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256 + 2 * 128) + 128,
    "tiny-qwen3": 512 * 64 + 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 32) + 64,
}


def test_every_preset_is_in_the_tables() -> None:
    assert sorted([*PUBLISHED, *OWN]) == preset_names()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters_and_constants(name: str) -> None:
    parameters, theta, eps, max_position = PUBLISHED[name]
    config = load_preset(name)
    assert count_params(config) == parameters
    assert config.norm_eps == eps and config.max_position == max_position
    assert config.position == "learned" if theta is None else config.rope_theta == theta


@pytest.mark.parametrize("name", OWN)
def test_our_own_model_has_the_parameters_counted_by_hand(name: str) -> None:
    assert count_params(load_preset(name)) == OWN[name]


@pytest.mark.parametrize("name", [*PUBLISHED, *OWN])
def test_a_preset_whose_comment_counts_its_parameters_counts_them_right(name: str) -> None:
    comment = (resources.files("models") / "presets" / f"{name}.yaml").read_text().splitlines()[0]
    counted = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", comment)]
    assert counted in ([], [count_params(load_preset(name))]), comment


def test_llama31_scaling_and_gemma_extras_are_the_published_ones() -> None:
    for name, factor in {"llama3.1-8b": 8.0, "llama3.1-70b": 8.0, "llama3.2-1b": 32.0, "llama3.2-3b": 32.0}.items():
        expected = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
        assert load_preset(name).rope_scaling == expected
    assert load_preset("llama3-8b").rope_scaling is None
    for name in ("gemma2-2b", "gemma2-9b"):
        config = load_preset(name)
        assert (config.attention_softcap, config.logits_softcap, config.attention_scale) == (50.0, 30.0, 256**-0.5)
        assert config.layer_windows()[:4] == (4096, None, 4096, None)
        assert config.scale_embeddings and config.norm_scale_plus_one and config.sandwich_norms


def test_windows_cycle_over_the_layers() -> None:
    config = load_preset("tiny-gemma2")
    assert config.layer_windows() == (8, None, 8)
    assert load_preset("mistral-7b").layer_windows() == (4096,) * 32
    assert load_preset("tiny-llama").layer_windows() == (None, None)


def test_the_scale_of_products_is_the_root_of_the_head_or_what_is_set() -> None:
    assert load_preset("tiny-llama").attention_scale == 0.25
    assert load_preset("tiny-llama").replace(query_scale=0.3).attention_scale == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "where: num_heads=4: query heads share key-value heads evenly, and num_kv_heads=3"),
        ({"head_dim": 15}, "where: head_dim=15: rotary embedding turns pairs; choose an even head_dim"),
        ({"attention_pattern": ("sliding",)}, "where: sliding_window=None: attention_pattern has sliding layers"),
        ({"attention_pattern": ()}, r"where: attention_pattern=\(\): every layer needs a kind"),
        ({"fused_qkv": True}, "where: fused_qkv=True: a fused projection needs num_kv_heads == num_heads"),
        ({"num_layers": 0}, "where: num_layers=0: "),
        ({"family": "bert"}, "where: family='bert': "),
        ({"rope_scaling": {"factor": 8.0}}, "where: rope_scaling.low_freq_factor="),
        (
            {
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position": 8192,
                }
            },
            r"where: rope_scaling=.*high_freq_factor=4.0: .* above low_freq_factor=4.0; raise it",
        ),
        ({"num_layer": 3}, "where: num_layer: unknown field of the model's configuration; did you mean num_layers?"),
        ({"xyzzy": 3}, "where: xyzzy: unknown field of the model's configuration; known fields are family, "),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_the_house_form(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config({**LLAMA, **changes}, where="where")


def test_every_wrong_field_is_told_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        build_config({**LLAMA, "num_layers": -1, "norm": "batch"}, where="a.yaml")
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["a.yaml: num_layers", "a.yaml: norm"]


def test_replacing_validates_again_and_leaves_the_original() -> None:
    config = load_preset("tiny-llama")
    assert config.replace(num_layers=5).num_layers == 5 and config.num_layers == 2
    with pytest.raises(ValueError, match=r"model\.overrides: head_dim=15: rotary"):
        config.replace(head_dim=15)
    with pytest.raises(ValueError, match=r"model\.overrides: layers: unknown field"):
        config.replace(layers=5)
    with pytest.raises(ValueError):
        config.num_layers = 3  # type: ignore[misc]


def test_a_configuration_survives_json_and_is_hashable() -> None:
    """As run.json stores it, and as a static argument of compiled functions."""
    for name in ("llama3.2-1b", "tiny-gemma2"):
        config = load_preset(name)
        again = TransformerConfig(**yaml.safe_load(config.model_dump_json()))
        assert again == config and hash(again) == hash(config)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"model\.preset=llama-3\.1-8b: no such preset; did you mean llama3\.1-8b\?"):
        load_preset("llama-3.1-8b")
    with pytest.raises(ValueError, match="no such preset; presets are bench-r, gemma2-2b, "):
        load_preset("0")
