"""What the data tests share: documents, the byte tokenizer, and an independent way to take rows apart again."""

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.tokenizer import Tokenizer, load_tokenizer
from pretrain.data import FIELD_NAMES, TokenBatch, make_eval_iterator, make_train_iterator
from recipes.schema import DataSection, TokenizerSection

BOS, EOS = 256, 257


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes as ids 0-255, BOS 256, EOS 257."""
    return load_tokenizer(TokenizerSection(path="bytes", kind="bytes"))


@pytest.fixture
def corpus(rng: np.random.Generator) -> list[str]:
    """97 different documents of 1 to about 120 bytes: shorter and much longer than the rows of the tests."""
    lengths = np.minimum(rng.geometric(0.04, 97), 120)
    texts = ("".join(rng.choice(list("abcdeé\n "), length)) for length in lengths)
    # Lines, but no blank ones: those would part documents in a text file.
    return [re.sub(r"\s*\n\s*", "\n", f"{number}:{text}").strip() for number, text in enumerate(texts)]


@pytest.fixture
def corpus_file(tmp_path: Path, corpus: list[str]) -> Path:
    """The corpus as a text file, its documents parted by blank lines."""
    return write_text(tmp_path / "corpus.txt", corpus)


def write_text(path: Path, documents: Iterable[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def train(tokenizer: Tokenizer) -> Callable[..., Any]:
    """`train(rows_per_batch=3, host=(0, 1), **data)`: a training iterator over the data section of those keys."""
    return lambda **settings: _make(make_train_iterator, tokenizer, **settings)


@pytest.fixture
def evaluate(tokenizer: Tokenizer) -> Callable[..., Any]:
    """As `train`, for the evaluation iterator."""
    return lambda **settings: _make(make_eval_iterator, tokenizer, **settings)


def _make(
    factory: Callable[..., Any],
    tokenizer: Tokenizer,
    *,
    rows_per_batch: int = 3,
    host: tuple[int, int] = (0, 1),
    vocab_size: int = 300,
    **data: Any,
) -> Any:
    settings = {"kind": "text", "sequence_length": 32, "num_workers_threads": 3, **data}
    if settings["kind"] == "synthetic":
        settings.pop("num_workers_threads")
    return factory(
        DataSection(**settings),
        tokenizer,
        vocab_size=vocab_size,
        rows_per_batch=rows_per_batch,
        add_bos=True,
        add_eos=True,
        host_index=host[0],
        host_count=host[1],
    )


@pytest.fixture(scope="session")
def pieces_of() -> Callable[[TokenBatch], list[tuple[int, ...]]]:
    """Takes the rows of a batch apart into the tokens of each segment; fails where a rule of the format is broken."""
    return _pieces_of


def _pieces_of(batch: TokenBatch) -> list[tuple[int, ...]]:
    for name in FIELD_NAMES:
        assert getattr(batch, name).dtype == np.int32
    np.testing.assert_array_equal(batch.inputs_segmentation, batch.targets_segmentation)
    np.testing.assert_array_equal(batch.inputs_position, batch.targets_position)
    pieces = []
    for row in range(len(batch.inputs)):
        segments, cell, previous = batch.inputs_segmentation[row], 0, 0
        while cell < len(segments) and segments[cell] != 0:
            length = 1
            while cell + length < len(segments) and segments[cell + length] == segments[cell]:
                length += 1
            assert segments[cell] == previous + 1, "segments count up by one along a row"
            inputs, targets = (x[row, cell : cell + length].tolist() for x in (batch.inputs, batch.targets))
            assert batch.inputs_position[row, cell : cell + length].tolist() == list(range(length))
            assert targets[:-1] == inputs[1:], "targets are the inputs one later, within the segment"
            pieces.append((*inputs, targets[-1]))
            previous, cell = segments[cell], cell + length
        for name in FIELD_NAMES:
            assert not getattr(batch, name)[row, cell:].any(), "what lies right of the last segment is padding"
    return pieces


@pytest.fixture(scope="session")
def expected_pieces() -> Callable[[Iterable[str], int], list[tuple[int, ...]]]:
    """The pieces of documents, written out from the rule: T + 1 tokens, and the next begins with the last one's end."""

    def pieces(documents: Iterable[str], sequence_length: int) -> list[tuple[int, ...]]:
        found = []
        for text in documents:
            tokens = (BOS, *text.encode(), EOS)
            while len(tokens) > 1:
                found.append(tokens[: sequence_length + 1])
                tokens = tokens[sequence_length:]
        return found

    return pieces


@pytest.fixture(scope="session")
def digest() -> Callable[[TokenBatch], str]:
    """A hash of all six fields of a batch."""
    return lambda batch: hashlib.sha256(b"".join(getattr(batch, name).tobytes() for name in FIELD_NAMES)).hexdigest()


@pytest.fixture
def hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `datasets` keep its copies in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
