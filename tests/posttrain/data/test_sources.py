"""Sources of records: which data a section names, and how its rows are read, numbered and called."""

import gzip
import json

import pytest

from posttrain.data.sources import Records, eval_source, train_sources
from recipes.sections.posttrain_data import PosttrainDataSection

pytestmark = pytest.mark.usefixtures("hugging_face_cache")
ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]


def read(source, first_number=0):
    records = Records(source, first_number)
    return [records[index] for index in range(len(records))]


def section(**data):
    return PosttrainDataSection(**data)


def parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "gz", "parquet", "csv"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, kind):
    path = tmp_path / {"gz": "rows.jsonl.gz"}.get(kind, f"rows.{kind}")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "parquet":
        parquet(path, ROWS)
    elif kind == "gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    else:
        path.write_text(lines if kind == "jsonl" else json.dumps(ROWS))
    (source,) = train_sources(section(path=str(path)))
    assert [record.values for record in read(source)] == ROWS


def test_a_folder_gives_the_split_whose_name_its_files_bear(jsonl, tmp_path):
    jsonl(ROWS[:3], "data/train.jsonl")
    jsonl(ROWS[3:], "data/test.jsonl")
    data = section(path=str(tmp_path / "data"), eval_split="test")
    assert [record.values for record in read(train_sources(data)[0])] == ROWS[:3]
    assert [record.values for record in read(eval_source(data))] == ROWS[3:]


def test_a_record_bears_its_number_over_all_sources_and_its_place_in_its_own(jsonl):
    (source,) = train_sources(section(path=jsonl(ROWS), split="train[1:3]"))
    found = read(source, first_number=40)
    assert [record.number for record in found] == [40, 41]
    assert found[1].name == f"data.path={source.source.path!r} data.split='train[1:3]' record 1 (from 0)"
    assert found[1].values == ROWS[2]


def test_a_mixture_takes_from_the_section_what_an_entry_leaves_open(jsonl):
    first, second = jsonl(ROWS, "a.jsonl"), jsonl(ROWS, "b.jsonl")
    entries = [
        {"path": first, "weight": 3.0},
        {"path": second, "split": "train[:2]", "columns": {"answer": "question"}},
    ]
    data = section(mixture=entries, split="train[:4]", columns={"question": "answer"})
    one, two = train_sources(data)
    assert (len(read(one)), len(read(two))) == (4, 2)
    assert (one.source.weight, two.source.weight) == (3.0, 1.0)
    assert (dict(one.columns), one.columns_key) == ({"question": "answer"}, "data.columns")
    assert dict(two.columns) == {"question": "answer", "answer": "question"}
    assert two.columns_key == "data.mixture[1].columns"
    assert two.named() == f"data.mixture[1].path={second!r} data.mixture[1].split='train[:2]'"


def test_nulls_that_arrow_fills_in_are_taken_out_again_and_written_ones_stay(tmp_path, jsonl):
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    other = {"function": {"name": "say", "arguments": {"text": "x", "to": None}}}
    said = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"role": "user", "content": "q", "name": "me"}, {"role": "assistant", "content": "a"}],
    ]
    path = tmp_path / "filled.parquet"
    parquet(path, [{"messages": messages} for messages in said])
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(path).to_pylist()[0]["messages"][0].keys() > said[0][0].keys(), "Arrow fills in"
    assert [record.values["messages"] for record in read(train_sources(section(path=str(path)))[0])] == said
    # Arguments of different names are kept as JSON, in which a null was written by somebody.
    said.append([{"role": "assistant", "content": None, "tool_calls": [other]}])
    written = jsonl([{"messages": messages} for messages in said])
    assert [record.values["messages"] for record in read(train_sources(section(path=written))[0])] == said


def test_evaluation_reads_other_data_or_refuses(jsonl):
    path, other = jsonl(ROWS), jsonl(ROWS, "other.jsonl")
    assert eval_source(section(path=path, eval_path=other)).named() == f"data.eval_path={other!r} data.split='train'"
    with pytest.raises(ValueError, match=r"data.eval_split=None: evaluation would read the training records"):
        eval_source(section(path=path))
    with pytest.raises(ValueError, match=r"data.eval_path=None: a mixture has no one set"):
        eval_source(section(mixture=[{"path": path}], eval_split="train"))


def test_data_that_cannot_be_read_is_refused_with_its_key(tmp_path, jsonl):
    (tmp_path / "empty.jsonl").touch()
    cases = {
        str(tmp_path / "none.jsonl"): "data.path=.*none.jsonl': there is no such file or folder",
        str(tmp_path / "empty.jsonl"): "data.path=.*empty.jsonl': the file is empty",
    }
    for path, message in cases.items():
        with pytest.raises(ValueError, match=message):
            read(train_sources(section(path=path))[0])
    with pytest.raises(ValueError, match=r"data.split='train\[5:\]': .*corresponds to no data"):
        read(train_sources(section(path=jsonl(ROWS), split="train[5:]"))[0])


def test_identity_tells_other_data_apart(jsonl):
    def identity(rows, name, **data):
        return Records(train_sources(section(path=jsonl(rows, name), **data))[0], 0).identity()

    same = identity(ROWS, "a.jsonl")
    assert same == identity(ROWS, "copy.jsonl")
    changed = [ROWS[:4], ROWS[1:] + ROWS[:1], [*ROWS[:4], {"question": "q4", "answer": "other"}]]
    assert all(identity(rows, f"{index}.jsonl") != same for index, rows in enumerate(changed))
