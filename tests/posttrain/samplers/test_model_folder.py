"""The folder an engine starts from, read back by our own reader and by transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from models.checkpoints.hf_config import read_config
from models.config import load_preset
from models.tokenizer import load_tokenizer, train_bpe
from posttrain.samplers.model_folder import write_model_folder
from recipes.schema import TokenizerSection

LLAMA = load_preset("tiny-llama-rl")
FAMILIES = {
    "llama": LLAMA,
    "qwen2": LLAMA.replace(family="qwen2", qkv_bias=True),
    "qwen3": load_preset("tiny-qwen3"),
    "gemma2": load_preset("tiny-gemma2"),
    "mistral": LLAMA.replace(family="mistral", sliding_window=48, attention_pattern=("sliding",)),
}
TEXTS = ["the cat sat on the mat and the dog ran after the cat around the house again and again"] * 20


@pytest.fixture
def tokenizer():
    return load_tokenizer(TokenizerSection(path="bytes"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_is_read_back_with_one_position_for_scoring(family, tokenizer, tmp_path):
    config = FAMILIES[family]
    write_model_folder(tmp_path, config, tokenizer, dtype="float32", max_length=config.max_position)
    again = read_config(tmp_path)
    assert again.replace(query_scale=None) == config.replace(max_position=config.max_position + 1, query_scale=None)
    assert again.attention_scale == pytest.approx(config.attention_scale, rel=1e-6)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.vocab_size) == (family, config.vocab_size)


def test_only_configuration_and_tokenizer_are_written_and_an_earlier_start_is_overwritten(tmp_path):
    folder = train_bpe(TEXTS, 280, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(TokenizerSection(path=str(folder)))
    place = tmp_path / "run" / "engine"
    write_model_folder(place, LLAMA.replace(num_layers=9), tokenizer, dtype="bfloat16", max_length=64)
    write_model_folder(place, LLAMA, tokenizer, dtype="float32", max_length=64)
    assert not list(place.glob("*.safetensors"))
    config = json.loads((place / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dtype"]) == (LLAMA.num_layers, "float32")
    generation = json.loads((place / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": list(tokenizer.stop_ids), "pad_token_id": 0}
    text = "the dog sat <|im_end|> on 3 mats"
    assert AutoTokenizer.from_pretrained(place)(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(
        text, add_bos=False, add_eos=False
    )


def test_what_does_not_fit_is_refused_before_anything_is_written(tokenizer, tmp_path):
    def write(config=LLAMA, *, folder: Path = tmp_path / "new", max_length: int = 64) -> None:
        write_model_folder(folder, config, tokenizer, dtype="float32", max_length=max_length)

    with pytest.raises(ValueError, match="max_length=513: the model has positions for 512 tokens"):
        write(max_length=513)
    with pytest.raises(ValueError, match="tokenizer bytes: 259 ids: the model's vocabulary has 256"):
        write(LLAMA.replace(vocab_size=256))
    with pytest.raises(ValueError, match=r"model\.qk_norm=True: a config\.json of mistral cannot say this"):
        write(FAMILIES["mistral"].replace(qk_norm=True))
    assert not (tmp_path / "new").exists()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds model\.safetensors: an engine's folder is overwritten"):
        write(folder=checkpoint)
    assert [path.name for path in checkpoint.iterdir()] == ["model.safetensors"]
