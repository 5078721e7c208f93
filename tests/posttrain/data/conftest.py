"""What the data tests of post-training share: record files, tokenizers, and a way to take rows apart again."""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.tokenizer import Tokenizer, load_tokenizer, train_bpe
from pretrain.data import FIELD_NAMES, TokenBatch
from recipes.schema import TokenizerSection

WORDS = (
    "Say Hello there. Say Hello there. Say Hello there. What is 2+2? It is 4. Be brief. assistant user system name add "
    "arguments tool_call words and more words"
)


@pytest.fixture
def hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `datasets` keep its copies in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def byte() -> Tokenizer:
    """Bytes as ids 0-255, BOS 256, EOS 257; its chat form is `role: content` and a newline."""
    return load_tokenizer(TokenizerSection(path="bytes"))


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 300 ids that knows `Hello` and `there` as words."""
    return train_bpe([WORDS] * 3 + ["Say \n"] * 9, 300, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def bpe(bpe_dir: Path) -> Tokenizer:
    """The tokenizer in that folder."""
    return load_tokenizer(TokenizerSection(path=str(bpe_dir)))


@pytest.fixture(scope="session")
def with_template(bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """`with_template(source)`: that vocabulary with another chat template."""
    file, loaded = tmp_path_factory.mktemp("template") / "own.jinja", {}

    def load(source: str) -> Tokenizer:
        if source not in loaded:
            file.write_text(source)
            loaded[source] = load_tokenizer(TokenizerSection(path=str(bpe_dir), chat_template=str(file)))
        return loaded[source]

    return load


@pytest.fixture(scope="session")
def qwen3(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Qwen3's own tokenizer and template."""
    source = shared_dir / "tokenizers" / "qwen3"
    if not source.is_dir():
        pytest.skip("Qwen3's tokenizer is not among the shared fixtures")
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    return load_tokenizer(TokenizerSection(path=str(folder)))


@pytest.fixture
def jsonl(tmp_path: Path, hugging_face_cache: None) -> Callable[..., str]:
    """`jsonl(records, name="records.jsonl")`: writes them, one a line, and gives the path."""

    def write(records: Iterable[dict[str, Any]], name: str = "records.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def examples_of() -> Callable[[TokenBatch], list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Takes rows apart into (tokens, indices of the trained ones) by segment; fails where the format is broken."""
    return _examples_of


def _examples_of(batch: TokenBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    for name in FIELD_NAMES:
        assert getattr(batch, name).dtype == np.int32
    np.testing.assert_array_equal(batch.inputs_position, batch.targets_position)
    found = []
    for row in range(len(batch.inputs)):
        segments, cell, previous = batch.inputs_segmentation[row], 0, 0
        while cell < len(segments) and segments[cell] != 0:
            length = int((segments == segments[cell]).sum())
            span = slice(cell, cell + length)
            assert (segments[span] == previous + 1).all(), "segments are unbroken and count up by one along a row"
            inputs, targets = (x[row, span].tolist() for x in (batch.inputs, batch.targets))
            assert batch.inputs_position[row, span].tolist() == list(range(length))
            assert targets[:-1] == inputs[1:], "targets are the inputs one later, within the segment"
            wanted = batch.targets_segmentation[row, span]
            assert set(wanted.tolist()) <= {0, int(segments[cell])}, "a trained target names its own segment"
            found.append(((*inputs, targets[-1]), tuple((np.flatnonzero(wanted) + 1).tolist())))
            previous, cell = previous + 1, cell + length
        for name in FIELD_NAMES:
            assert not getattr(batch, name)[row, cell:].any(), "what lies right of the last segment is padding"
    return found


@pytest.fixture(scope="session")
def digest() -> Callable[[Any], str]:
    """A hash of every field of a batch."""
    return lambda batch: hashlib.sha256(b"".join(value.tobytes() for value in vars(batch).values())).hexdigest()
