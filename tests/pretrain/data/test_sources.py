import re

import pytest

from pretrain.data.readers import open_documents
from pretrain.data.sources import Source, eval_source, parse_split, train_sources
from recipes.schema import DataSection


def text_source(path, split: str = "train") -> Source:
    return train_sources(DataSection(kind="text", path=str(path), split=split))[0]


def read(source: Source) -> list[str]:
    documents = open_documents(source)
    return [documents[index] for index in range(len(documents))]


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes(b"\n  \nFirst:\n  Speak.\n\nAll:\r\nSpeak, \xc3\xa9.\n \t\n\n\nLast\n\n")
    assert read(text_source(path)) == ["First:\n  Speak.", "All:\r\nSpeak, é.", "Last"]


def test_documents_agree_with_a_reading_line_by_line(shared_dir):
    path = shared_dir / "data" / "text" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("tinyshakespeare.txt is not among the shared data")
    expected, lines = [], []
    for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            expected.append("\n".join(lines).rstrip())
            lines = []
    documents = read(text_source(path))
    assert documents == expected
    assert len(documents) == 7222
    assert documents[0] == "First Citizen:\nBefore we proceed any further, hear me speak."


def test_documents_do_not_span_files_and_a_folder_is_read_in_order_of_names(tmp_path):
    for name, content in (
        ("b.txt", "b1\n\nb2"),
        ("a.txt", "a1"),
        ("sub/c.txt", "c1\n"),
        ("notes.md", "no"),
        ("e.txt", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert read(text_source(tmp_path)) == ["a1", "b1", "b2", "c1"]
    assert read(text_source(tmp_path / "*.txt")) == ["a1", "b1", "b2"]


def test_a_character_on_the_border_of_two_checked_chunks_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.data.text_files.CHECKED_BYTES", 3)
    path = tmp_path / "text.txt"
    path.write_text("ab€cd€€", encoding="utf-8")
    assert read(text_source(path)) == ["ab€cd€€"]


@pytest.mark.parametrize(("content", "at"), [(b"abcd\xffe", 4), (b"abc\xe2\x82", 3), (b"ab\xe2\x82z", 2)])
def test_text_that_is_not_utf8_is_refused_with_the_byte(tmp_path, monkeypatch, content, at):
    monkeypatch.setattr("pretrain.data.text_files.CHECKED_BYTES", 4)
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.path=.* not UTF-8 at byte {at}; convert"):
        open_documents(text_source(tmp_path / "text.txt"))


def test_slices_of_a_split_meet_without_gap_or_overlap(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(map(str, range(7))))
    documents = read(text_source(path))
    for percent in (1, 33, 50, 90):
        first, second = (
            (read(text_source(path, f"train[{bounds}]")) for bounds in (f":{percent}%", f"{percent}%:"))
            if (round(0.07 * percent) > 0)
            else ([], documents)
        )
        assert first + second == documents
    # 33 % of 7 is 2.31, so two documents.
    assert read(text_source(path, "train[:33%]")) == ["0", "1"]
    assert read(text_source(path, "train[2:5]")) == ["2", "3", "4"]
    assert read(text_source(path, "train[5:500]")) == ["5", "6"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", "has the splits test, train"),
        ("train[:5%5]", "is written train, train"),
        ("train+test", "is written train, train"),
        ("train[7:3]", "the slice holds none"),
        ("train[100%:]", "the slice holds none"),
    ],
)
def test_a_split_that_is_not_there_is_refused(split, message):
    source = text_source("unread", split)
    with pytest.raises(ValueError, match=rf"data\.split={re.escape(repr(split))}: .*{message}"):
        parse_split(source, {"train": 10, "test": 5})


def test_evaluation_takes_from_training_what_it_does_not_name():
    data = DataSection(kind="tfds", path="root", name="c4/en:3.1.0", eval_split="validation")
    source = eval_source(data)
    assert (source.path, source.name, source.split) == ("root", "c4/en:3.1.0", "validation")
    assert (source.path_key, source.split_key) == ("data.path", "data.eval_split")
    other = eval_source(DataSection(kind="tfds", path="root", name="c4/en:3.1.0", eval_name="pile:1.0.0"))
    assert (other.path, other.name, other.split) == ("root", "pile:1.0.0", "train")


def test_an_evaluation_file_replaces_a_hub_name_and_the_other_way_round():
    source = eval_source(DataSection(kind="hf", name="owner/name", eval_path="held_out.jsonl"))
    assert (source.path, source.name) == ("held_out.jsonl", None)
    source = eval_source(DataSection(kind="hf", path="train.jsonl", eval_name="owner/name", eval_split="test"))
    assert (source.path, source.name, source.split) == (None, "owner/name", "test")


def test_evaluation_without_data_of_its_own_is_refused():
    with pytest.raises(ValueError, match=r"data\.eval_split=None: evaluation would read the training documents; set"):
        eval_source(DataSection(kind="text", path="a.txt"))


def test_mixture_entries_take_what_is_null_from_the_section():
    data = DataSection(
        kind="hf",
        split="train",
        text_column="body",
        mixture=({"path": "a.jsonl", "weight": 3.0}, {"name": "b", "split": "rest", "text_column": "text"}),
    )
    first, second = train_sources(data)
    assert (first.path, first.split, first.text_column, first.weight) == ("a.jsonl", "train", "body", 3.0)
    assert (second.name, second.split, second.text_column, second.weight) == ("b", "rest", "text", 1.0)
    assert first.named() == "data.mixture[0].path='a.jsonl' data.split='train'"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("nothing/*.txt", None, "no such file or folder"),
        ("empty.txt", "", "holds no documents"),
        ("blank.txt", "\n \n\n", "holds no documents"),
    ],
)
def test_text_files_without_documents_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"data\.path='.*{re.escape(name)}'.*{message}.*; "):
        open_documents(text_source(tmp_path / name))


def test_a_folder_without_text_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*the folder holds no file that ends in \.txt; correct the path"):
        open_documents(text_source(tmp_path))


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("one")
    assert read(text_source("~/text.txt")) == ["one"]
