"""Tokenizers of every kind: ids, one beginning, what is refused. The oracle is the library behind each kind."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import processors

from models.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from recipes.schema import TokenizerSection

TEXTS = [f"The {noun} said {number} words, and then it went home." for noun in ("cat", "king") for number in range(40)]
AWKWARD = "naïve 🙂 tab\t two  spaces\nend"


def load(path, **fields) -> Tokenizer:
    return load_tokenizer(TokenizerSection(path=str(path), **fields))


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory) -> Path:
    return train_bpe(TEXTS, 300, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def bpe(bpe_dir) -> Tokenizer:
    return load(bpe_dir)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=300, model_type="bpe", byte_fallback=True,
        pad_id=3, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def piece(model_file) -> Tokenizer:
    return load(model_file)


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return load("bytes")


@pytest.fixture(params=["byte", "bpe", "piece"])
def any_kind(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_bytes_are_their_own_ids_and_control_tokens_follow(byte):
    # "hé" is 68 C3 A9 in UTF-8.
    assert byte.encode("hé", add_bos=True, add_eos=True) == [256, 0x68, 0xC3, 0xA9, 257]
    assert (byte.vocab_size, byte.bos_id, byte.eos_id, byte.pad_id, byte.stop_ids) == (259, 256, 257, 258, (257,))
    assert byte.decode([256, 0x68, 0xC3, 0xA9, 257, 258], skip_special=True) == "hé"
    assert byte.decode([256, 0x68, 257], skip_special=False) == "<bos>h<eos>"


@given(st.text())
def test_bytes_round_trip_every_text(text):
    byte = load("bytes")
    assert (
        byte.decode(byte.encode(text, add_bos=True, add_eos=True), skip_special=True)
        == (text.replace("<bos>", "").replace("<eos>", "").replace("<pad>", "")).encode(errors="replace").decode()
    )


def test_ids_are_those_of_the_sentencepiece_library(piece, model_file):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in [*TEXTS[:3], AWKWARD, ""]:
        assert piece.encode(text, add_bos=True, add_eos=True) == [1, *library.encode(text), 2]
        assert piece.decode(library.encode(text), skip_special=True) == library.decode(library.encode(text))
    assert piece.decode([1, *library.encode("the king"), 2], skip_special=False) == "<s>the king</s>"


def test_ids_are_those_of_transformers(bpe, bpe_dir):
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(bpe_dir)
    for text in [*TEXTS[:3], AWKWARD, "a<|im_end|>b", ""]:
        ids = library(text, add_special_tokens=False)["input_ids"]
        assert bpe.encode(text, add_bos=True, add_eos=True) == [1, *ids, 2]
        assert bpe.decode(ids, skip_special=False) == text
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id, bpe.pad_id) == (300, 1, 2, 0)


def test_every_text_survives_encoding_and_decoding(any_kind):
    ids = any_kind.encode(AWKWARD.replace("  ", " "), add_bos=True, add_eos=True)
    assert any_kind.decode(np.array(ids, np.int32), skip_special=True) == AWKWARD.replace("  ", " ")


def test_spans_tell_the_characters_of_each_token(any_kind):
    text = "The king said 7 words.\nnaïve 🙂"
    ids, spans = any_kind.encode_with_spans(text)
    assert ids == any_kind.encode(text, add_bos=False, add_eos=False)
    covered = "".join(text[start:end] for start, end in dict.fromkeys(spans))
    assert covered == text
    king = next(at for at, (start, _) in enumerate(spans) if start >= text.index(" said"))
    assert any_kind.decode(ids[:king], skip_special=True).strip() == "The king"


def test_a_sequence_gets_one_beginning_and_one_end(any_kind):
    bos, eos = any_kind.bos_id, any_kind.eos_id
    spelled = any_kind.decode([bos], skip_special=False) + "words" + any_kind.decode([eos], skip_special=False)
    for text in ("words", spelled):
        ids = any_kind.encode(text, add_bos=True, add_eos=True)
        assert ids.count(bos) == ids.count(eos) == 1
        assert (ids[0], ids[-1]) == (bos, eos)
    plain = any_kind.encode("words", add_bos=False, add_eos=False)
    assert any_kind.encode("words", add_bos=True, add_eos=True) == [bos, *plain, eos]


def test_a_text_that_spells_two_beginnings_is_refused(any_kind):
    spelled = any_kind.decode([any_kind.bos_id], skip_special=False)
    with pytest.raises(ValueError, match="one beginning"):
        any_kind.encode(spelled * 2, add_bos=True, add_eos=False)


def test_a_beginning_that_the_post_processor_adds_is_not_added_twice(bpe_dir, tmp_path):
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(bpe_dir)
    library.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    library.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("king")["input_ids"][0] == 1, "the trap is set"
    tokenizer = load(tmp_path)
    assert tokenizer.encode("king", add_bos=True, add_eos=False).count(1) == 1
    assert tokenizer.encode("king", add_bos=False, add_eos=False).count(1) == 0


def trim_spans(fast):
    fast.post_processor = processors.ByteLevel(trim_offsets=True)


@pytest.mark.parametrize(
    "change",
    [lambda fast: fast.enable_truncation(4), lambda fast: fast.enable_padding(length=99), trim_spans],
    ids=["maximum-length", "padding", "trimmed-spans"],
)
def test_what_a_file_cuts_pads_or_trims_is_set_aside(bpe_dir, tmp_path, change):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    fast = FastTokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    change(fast)
    fast.save(str(tmp_path / "tokenizer.json"))
    ids, spans = load(tmp_path).encode_with_spans(TEXTS[0])
    assert ids == load(bpe_dir).encode(TEXTS[0], add_bos=False, add_eos=False)
    assert "".join(TEXTS[0][start:end] for start, end in spans) == TEXTS[0]


def test_a_newline_that_was_added_by_name_ends_no_turn(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    fast = FastTokenizer.from_file(str(bpe_dir / "tokenizer.json"))
    fast.add_tokens(["\n"])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}")
    assert load(tmp_path).stop_ids == (2, 4)


def test_an_end_that_the_vocabulary_lacks_is_refused_and_a_missing_beginning_is_not(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["bos_token"], config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, 0)
    plain = tokenizer.encode("king", add_bos=False, add_eos=False)
    assert tokenizer.encode("king", add_bos=True, add_eos=False) == plain
    with pytest.raises(ValueError, match=r"add_eos=true: .*no end-of-sequence token.*; set tokenizer.add_eos=false"):
        tokenizer.encode("king", add_bos=True, add_eos=True)


def test_ids_past_the_vocabulary_are_shown_and_negative_ones_refused(any_kind):
    ids = any_kind.encode("king", add_bos=False, add_eos=False)
    text = any_kind.decode([*ids, any_kind.vocab_size, 10**6], skip_special=True)
    assert text == "king\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="id -100: ids are not negative"):
        any_kind.decode([*ids, -100], skip_special=True)


def test_the_fingerprint_tells_vocabularies_apart_and_knows_a_saved_one_again(any_kind, tmp_path, byte, bpe, piece):
    assert len({kind.fingerprint() for kind in (byte, bpe, piece)}) == 3
    save_tokenizer(any_kind, tmp_path)
    assert load(tmp_path).fingerprint() == any_kind.fingerprint()


def test_one_respelled_token_changes_the_fingerprint(bpe_dir, bpe, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_over|>"))
    (tmp_path / "chat_template.jinja").unlink()
    assert load(tmp_path).fingerprint() != bpe.fingerprint()


def test_stop_ids_hold_the_end_the_turn_end_and_the_generation_config(bpe, bpe_dir, tmp_path):
    assert bpe.stop_ids == (2, 4), "<eos>, and the <|im_end|> of its template"
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert load(tmp_path).stop_ids == (2, 3, 4)


def test_a_recipes_chat_template_replaces_the_tokenizers(bpe_dir, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    tokenizer = load(bpe_dir, chat_template=str(file))
    assert tokenizer.chat_template.source == file.read_text()
    assert tokenizer.tool_chat_template is tokenizer.chat_template
    assert tokenizer.stop_ids == (2,)


def section(**fields):
    """A section with values that the schema would not let through."""
    return SimpleNamespace(**{"path": None, "kind": "auto", "chat_template": None, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "tokenizer.path: None: .*set tokenizer.path"),
        ({"path": "/nowhere/at/all"}, "tokenizer.path=/nowhere/at/all: no such file or folder; correct the path"),
        ({"path": "./nowhere"}, "no such file or folder"),
        ({"path": "missing.model"}, "tokenizer.path=missing.model: no such file"),
        ({"path": "owner/never-cached"}, "tokenizer.path=owner/never-cached: transformers finds no tokenizer"),
        ({"path": "{here}/vocab.tiktoken"}, "a tokenizer file is a sentencepiece .model"),
        ({"path": "{here}/broken.model"}, "broken.model: not a sentencepiece model"),
        ({"path": "{here}/broken.model", "kind": "huggingface"}, "kind huggingface reads a folder"),
        ({"path": "{here}/empty", "kind": "sentencepiece"}, "no tokenizer.model in this folder"),
        ({"path": "{here}/empty"}, "transformers finds no tokenizer there"),
        ({"path": "bytes", "chat_template": "{here}/none.jinja"}, "tokenizer.chat_template=.*none.jinja: no such file"),
        ({"path": "bytes", "chat_template": "{here}/broken.jinja"}, "chat template, line 1: .*correct the jinja"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_rule_and_remedy(fields, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "vocab.tiktoken").write_text("AA== 0")
    (tmp_path / "broken.model").write_text("this is no model")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    filled = {key: value.format(here=tmp_path) for key, value in fields.items()}
    with pytest.raises(ValueError, match=message):
        load_tokenizer(section(**filled))


NO_TORCH = """
import sys
sys.modules["torch"] = None
from recipes.schema import TokenizerSection
import models.tokenizer
assert "transformers" not in sys.modules and "sentencepiece" not in sys.modules and "jax" not in sys.modules
tokenizer = models.tokenizer.load_tokenizer(TokenizerSection(path=sys.argv[1]))
print(tokenizer.encode("The king", add_bos=True, add_eos=True))
"""


def test_a_hugging_face_tokenizer_loads_without_torch_and_imports_lazily(bpe, bpe_dir):
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(bpe_dir)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == bpe.encode("The king", add_bos=True, add_eos=True)


def test_qwen3s_tokenizer_loads_as_published(shared_dir, tmp_path):
    source = shared_dir / "tokenizers" / "qwen3"
    if not source.is_dir():
        pytest.skip("Qwen3's tokenizer is not among the shared fixtures")
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(source / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    tokenizer = load(tmp_path)
    # The model card's ids: <|endoftext|> 151643, <|im_start|> 151644, <|im_end|> 151645, and no beginning.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 151645, 151643)
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (151669, (151645,))
    assert tokenizer.encode("<|im_start|>hello", add_bos=True, add_eos=True) == [151644, 14990, 151645]
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.chat_template.source == tokenizer.chat_template.source
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in config["additional_special_tokens"], "transformers 4 knows this name alone"
