import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.data.readers import open_documents
from pretrain.data.sources import train_sources
from recipes.schema import DataSection

DOCUMENTS = ["one", "two\n\nstill two", "dré", ""]

pytestmark = pytest.mark.usefixtures("hugging_face_cache")


def read(**data) -> list[str]:
    documents = open_documents(train_sources(DataSection(kind="hf", **data))[0])
    return [documents[index] for index in range(len(documents))]


def write_lines(path, documents, column: str = "text"):
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(documents)))
    return str(path)


def test_json_lines(tmp_path):
    assert read(path=write_lines(tmp_path / "data.jsonl", DOCUMENTS)) == DOCUMENTS


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()))
    assert read(path=str(path)) == DOCUMENTS


def test_json_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    assert read(path=str(path)) == DOCUMENTS


def test_parquet(tmp_path):
    pq.write_table(pa.table({"body": DOCUMENTS, "n": [1, 2, 3, 4]}), tmp_path / "data.parquet")
    assert read(path=str(tmp_path / "data.parquet"), text_column="body") == DOCUMENTS


def test_each_line_of_a_text_file_is_a_document(tmp_path):
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    assert read(path=str(tmp_path / "lines.txt")) == ["one", "two"]


def test_folder_has_the_splits_that_its_file_names_say(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, documents in (("train", DOCUMENTS), ("validation", ["held out"])):
        pq.write_table(pa.table({"text": documents}), folder / f"{split}-00000-of-00001.parquet")
    assert read(path=str(folder)) == DOCUMENTS
    assert read(path=str(folder), split="validation") == ["held out"]


def test_a_single_file_is_the_split_that_is_asked_for_and_can_be_sliced(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", DOCUMENTS)
    assert read(path=path, split="test") == DOCUMENTS
    assert read(path=path, split="train[:50%]") == DOCUMENTS[:2]
    assert read(path=path, split="train[50%:]") == DOCUMENTS[2:]


def test_null_is_an_empty_document(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"other": 1}\n')
    assert read(path=str(path)) == ["one", "", ""]


def test_absent_column_is_refused_with_the_columns_there_are(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", DOCUMENTS, column="body")
    with pytest.raises(
        ValueError, match=r"data\.text_column='text': the data has the columns body, id; name one of them"
    ):
        read(path=path)


def test_column_of_numbers_is_refused(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=r"data\.text_column='id': the column holds .*int64.*, not text"):
        read(path=path, text_column="id")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file or folder"),
        ("empty.jsonl", "", "the file is empty"),
        ("data.bin", "x", "the suffix is not one of"),
        ("broken.jsonl", '{"text": "a"}\n{"text": ', "could not load it"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, capfd, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"data\.path=.*{name}.*{message}.*; "):
        read(path=str(tmp_path / name))
    assert capfd.readouterr().err == "", "the error says it, and nothing else does"


def test_split_that_a_folder_lacks_is_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": DOCUMENTS}), folder / "train.parquet")
    with pytest.raises(ValueError, match=r"data\.split='validation'.*could not load it \(Unknown split"):
        read(path=str(folder), split="validation")


def test_folder_without_data_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*the folder holds no \.json"):
        read(path=str(tmp_path))


def test_hub_name_that_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match=r"data\.name='no-such-owner/no-such-set'.*could not load it"):
        read(name="no-such-owner/no-such-set")


def test_path_and_name_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*either local or on the hub .*set exactly one"):
        read(path=str(tmp_path), name="owner/name")
