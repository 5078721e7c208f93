"""Tokenizer folders: what is written can be opened by transformers and gives the same ids; training is repeatable."""

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from models.tokenizer import load_tokenizer, save_tokenizer, train_bpe
from models.tokenizer_files import BYTE_SPELLING
from recipes.schema import TokenizerSection

TEXTS = [f"The {noun} said {number} words, and then it went home." for noun in ("cat", "king") for number in range(40)]
AWKWARD = ["  naïve 🙂 tab\t two  spaces\nend ", "Привет, 你好 12345", "king", "", "a<bos>b"]


def load(path, **fields):
    return load_tokenizer(TokenizerSection(path=str(path), **fields))


def sentencepiece_model(folder: Path, **options) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "small"), vocab_size=300, minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True, **options},
    )  # fmt: skip
    return folder / "small.model"


def test_bytes_are_spelled_as_byte_level_bpe_spells_them():
    from tokenizers import pre_tokenizers

    assert sorted(BYTE_SPELLING) == sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a \n\x7fé")
    assert split[0][0] == "".join(BYTE_SPELLING[byte] for byte in "a \n\x7fé".encode())


def test_saved_bytes_open_in_transformers_with_the_same_ids_and_chats(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load("bytes")
    save_tokenizer(tokenizer, tmp_path)
    library = AutoTokenizer.from_pretrained(tmp_path)
    for text in AWKWARD:
        ids = tokenizer.encode(text, add_bos=False, add_eos=False)
        assert library(text, add_special_tokens=False)["input_ids"] == ids
    chat = [{"role": "user", "content": "hé?"}, {"role": "assistant", "content": "yes"}]
    rendered = library.apply_chat_template(chat, tokenize=False)
    assert rendered == "<bos>user: hé?\nassistant: yes<eos>\n"
    assert rendered == tokenizer.chat_template.render(chat, tools=None, add_generation_prompt=False)
    assert (library.bos_token_id, library.eos_token_id, library.pad_token_id) == (256, 257, 258)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False, "pad_id": 3},
        {"normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram", "normalization_rule_name": "identity", "hard_vocab_limit": False},
    ],
    ids=["llama", "no-prefix", "nfkc", "unigram"],
)
def test_saved_sentencepiece_opens_in_transformers_with_the_same_ids(tmp_path, options):
    from transformers import AutoTokenizer

    tokenizer = load(sentencepiece_model(tmp_path, **options))
    save_tokenizer(tokenizer, tmp_path / "saved")
    library = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS[:4], *AWKWARD]:
        ids = tokenizer.encode(text, add_bos=False, add_eos=False)
        assert library(text, add_special_tokens=False)["input_ids"] == ids, text
        assert library.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special=True)
    model = tmp_path / "saved" / "tokenizer.model"
    assert model.read_bytes() == (tmp_path / "small.model").read_bytes()


def test_sentencepiece_that_cannot_be_rebuilt_is_saved_as_its_model_alone_with_a_warning(tmp_path, caplog):
    tokenizer = load(sentencepiece_model(tmp_path, model_type="char", byte_fallback=False, hard_vocab_limit=False))
    with caplog.at_level(logging.WARNING):
        save_tokenizer(tokenizer, tmp_path / "saved")
    assert "only tokenizer.model is written" in caplog.text
    assert [file.name for file in (tmp_path / "saved").iterdir()] == ["tokenizer.model"]
    assert load(tmp_path / "saved").fingerprint() == tokenizer.fingerprint()


def test_saving_over_another_tokenizer_leaves_nothing_of_it(tmp_path):
    save_tokenizer(load("bytes"), tmp_path)
    (tmp_path / "plain").mkdir()
    tokenizer = load(sentencepiece_model(tmp_path / "plain"))
    save_tokenizer(tokenizer, tmp_path)
    assert load(tmp_path).fingerprint() == tokenizer.fingerprint()
    assert load(tmp_path).chat_template is None


def test_two_named_templates_are_saved_and_loaded(tmp_path):
    folder = train_bpe(TEXTS, 300, tmp_path / "bpe")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools | length }}")
    tokenizer = load(folder)
    assert tokenizer.tool_chat_template.source == "tools: {{ tools | length }}"
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.tool_chat_template.source == tokenizer.tool_chat_template.source
    assert again.chat_template.source == tokenizer.chat_template.source != again.tool_chat_template.source


TRAIN = """
import sys
from models.tokenizer import train_bpe
train_bpe([line for line in open(sys.argv[1])], 300, sys.argv[2])
"""


def test_training_twice_in_two_processes_gives_the_same_files(tmp_path):
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    digests = set()
    for name in ("first", "second"):
        command = [sys.executable, "-c", TRAIN, str(tmp_path / "texts"), str(tmp_path / name)]
        subprocess.run(command, cwd=Path(__file__).parents[2], check=True, env={"PYTHONHASHSEED": "random"})
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
        digests.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
    assert len(digests) == 1


def test_a_trained_vocabulary_has_the_size_asked_for_and_learns_common_words(tmp_path):
    tokenizer = load(train_bpe(iter(TEXTS), 320, tmp_path))
    assert tokenizer.vocab_size == 320
    assert [tokenizer.decode([index], skip_special=False) for index in range(5)] == [
        "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    # 59 merges are enough for the words that stand in each of the 80 sentences.
    assert len(tokenizer.encode(" words, and then it went home.", add_bos=False, add_eos=False)) <= 10


@pytest.mark.parametrize(
    ("size", "message"),
    [(260, "vocab_size=260: .*ask for at least 261"), (5000, "vocab_size=5000: the texts run out of pairs to merge")],
)
def test_a_vocabulary_of_impossible_size_is_refused(size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_bpe(TEXTS, size, tmp_path)
