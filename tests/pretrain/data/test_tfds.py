import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from pretrain.data.prepare import main, prepare_tfds
from pretrain.data.readers import open_documents
from pretrain.data.sources import train_sources
from recipes.schema import DataSection

PREPARE = {
    "name": "c4/en:3.1.0",
    "fractions": {"train": 0.8, "validation": 0.2},
    "num_shards": 3,
    "text_column": "text",
    "shuffle_seed": 0,
}


@pytest.fixture
def root(tmp_path, corpus_file):
    folder = prepare_tfds(corpus_file, tmp_path / "tfds", **PREPARE)
    assert folder == tmp_path / "tfds" / "c4" / "en" / "3.1.0"
    return tmp_path / "tfds"


def read(root, **data) -> list[str]:
    section = DataSection(**{"kind": "tfds", "path": str(root), "name": "c4/en:3.1.0", **data})
    documents = open_documents(train_sources(section)[0])
    return [documents[index] for index in range(len(documents))]


def test_prepared_splits_hold_every_document_once(root, corpus):
    train, validation = read(root), read(root, split="validation")
    # 80 % of 97 documents is 77.6.
    assert (len(train), len(validation)) == (78, 19)
    assert sorted(train + validation) == sorted(corpus)
    assert train != [text for text in corpus if text in train], "documents are dealt out in a random order"


def test_slices_cross_shards(root):
    train = read(root)
    assert read(root, split="train[20:60]") == train[20:60]
    assert read(root, split="train[:50%]") + read(root, split="train[50%:]") == train


def test_files_have_the_names_and_metadata_of_tfds(root):
    folder = root / "c4" / "en" / "3.1.0"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"c4-train.array_record-0000{shard}-of-00003" for shard in range(3)),
        *(f"c4-validation.array_record-0000{shard}-of-00003" for shard in range(3)),
        "dataset_info.json",
        "features.json",
    ]
    splits = json.loads((folder / "dataset_info.json").read_text())["splits"]
    assert [split["shardLengths"] for split in splits] == [["26", "26", "26"], ["7", "6", "6"]]


def test_tensorflow_datasets_opens_the_folder(root):
    tfds = pytest.importorskip("tensorflow_datasets")
    for split in ("train", "validation"):
        records = tfds.data_source("c4/en:3.1.0", split=split, data_dir=str(root))
        assert [records[i]["text"].decode() for i in range(len(records))] == read(root, split=split)


def test_training_reads_a_prepared_folder(root, corpus, train, pieces_of, expected_pieces):
    iterator = train(kind="tfds", path=str(root), name="c4/en:3.1.0", num_epochs=1)
    assert sorted(p for batch in iterator for p in pieces_of(batch)) == sorted(expected_pieces(read(root), 32))


def test_without_a_version_the_newest_is_read(root, corpus_file):
    for version, share in (("3.9.0", 0.5), ("3.10.0", 1.0)):
        prepare_tfds(corpus_file, root, **{**PREPARE, "name": f"c4/en:{version}", "fractions": {"train": share}})
    assert len(read(root, name="c4/en")) == 97
    assert len(read(root, name="c4/en:3.1.0")) == 78


def test_a_data_set_without_configurations(tmp_path, corpus_file):
    prepare_tfds(corpus_file, tmp_path / "tfds", **{**PREPARE, "name": "plays:1.0.0"})
    assert len(read(tmp_path / "tfds", name="plays:1.0.0")) == 78


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_missing_version_is_refused_with_the_versions_there_are(root):
    with pytest.raises(
        ValueError, match=r"data\.name='c4/en:9\.9\.9': .*versions there: 3\.1\.0.*; correct data\.path"
    ):
        read(root, name="c4/en:9.9.9")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.name='c4/en:3\.1\.0': .*has no prepared folder.*versions there: none"):
        read(tmp_path)


def test_missing_split_and_column_are_refused_with_those_there_are(root):
    with pytest.raises(ValueError, match=r"data\.split='test': the data has the splits train, validation; "):
        read(root, split="test")
    with pytest.raises(ValueError, match=r"data\.text_column='body': the data has the columns text; "):
        read(root, text_column="body")


def test_missing_shard_is_refused(root):
    (root / "c4" / "en" / "3.1.0" / "c4-train.array_record-00001-of-00003").unlink()
    with pytest.raises(
        ValueError, match=r"data\.path=.*lacks 1 of 3 shards \(c4-train.array_record-00001-of-00003\); "
    ):
        read(root)


def test_shard_with_other_records_than_listed_is_refused(root):
    folder = root / "c4" / "en" / "3.1.0"
    (folder / "c4-train.array_record-00001-of-00003").write_bytes(
        (folder / "c4-validation.array_record-00001-of-00003").read_bytes()
    )
    with pytest.raises(ValueError, match=r"has 58 records, and dataset_info\.json says 78; "):
        read(root)


def test_tfrecord_files_are_refused_with_the_way_to_convert_them(root):
    change_json(root / "c4" / "en" / "3.1.0" / "dataset_info.json", fileFormat="tfrecord")
    with pytest.raises(ValueError, match=r"holds tfrecord files.*; convert them with `tfds convert_format"):
        read(root)


def test_column_that_is_no_text_is_refused(root):
    image = {"pythonClassName": "tensorflow_datasets.core.features.image_feature.Image"}
    change_json(root / "c4" / "en" / "3.1.0" / "features.json", featuresDict={"features": {"text": image}})
    with pytest.raises(ValueError, match=r"data\.text_column='text': the column is a .*Image, not text; "):
        read(root)


def test_broken_metadata_is_refused(root):
    (root / "c4" / "en" / "3.1.0" / "features.json").write_text("{")
    with pytest.raises(ValueError, match=r"data\.path=.*features\.json cannot be read"):
        read(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "c4"}, "name='c4': a data set is named"),
        ({"fractions": {"train": 0.9, "validation": 0.2}}, "together at most 1"),
        ({"fractions": {"train": 0.0}}, "a share above 0"),
        ({"num_shards": 30}, "num_shards=30: split validation has 19 of 97 documents"),
    ],
)
def test_preparing_refuses_what_cannot_be_written_and_leaves_nothing(tmp_path, corpus_file, change, message):
    with pytest.raises(ValueError, match=message):
        prepare_tfds(corpus_file, tmp_path / "tfds", **{**PREPARE, **change})
    assert not list(tmp_path.glob("tfds/**/*.json"))


def test_preparing_does_not_overwrite(root, corpus_file):
    with pytest.raises(ValueError, match="is there already; remove it or raise the version"):
        prepare_tfds(corpus_file, root, **PREPARE)


@pytest.mark.usefixtures("hugging_face_cache")
def test_json_lines_keep_their_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"body": "one\n\nstill one"}) + "\n")
    prepare_tfds(
        path,
        tmp_path / "tfds",
        **{**PREPARE, "fractions": {"train": 1.0}, "num_shards": 1, "text_column": "body"},
    )
    assert read(tmp_path / "tfds", text_column="body") == ["one\n\nstill one"]


def test_command_line_prepares(tmp_path, corpus_file):
    command = [sys.executable, "-m", "pretrain.data.prepare", str(corpus_file), str(tmp_path / "tfds")]
    options = ["--name", "c4/en:3.1.0", "--split", "train=0.8", "--split", "validation=0.2", "--shards", "3"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "tfds" / "c4" / "en" / "3.1.0")
    assert len(read(tmp_path / "tfds")) == 78


@pytest.mark.parametrize(
    ("split", "message"),
    [("train=0.8", "is there already"), ("train=most", "--split train=most: a split and its share, such as train=0.9")],
)
def test_command_line_reports_its_errors_in_one_line(root, corpus_file, split, message):
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(corpus_file), str(root), "--name", "c4/en:3.1.0", "--split", split])
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
