"""`posttrain inspect-data`: the rows as the trainer reads them, with what is trained marked, counted or refused."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posttrain import cli

ROOT = Path(__file__).resolve().parents[3]
HEAD = "model: {preset: tiny-llama}\ntokenizer: {path: bytes}\n"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs `inspect-data` in this process and gives (exit code, stdout, stderr)."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()

    def run(*arguments):
        code = cli.main(["inspect-data", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def recipe(tmp_path):
    """`recipe("sft", records, "sequence_length: 64")`: a recipe file over those records, its data section extended."""

    def write(kind, records, *lines):
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        path = tmp_path / "recipe.yaml"
        data = "\n".join(f"  {line}" for line in (f"path: {tmp_path / 'records.jsonl'}", "shuffle: false", *lines))
        path.write_text(f"kind: {kind}\n{HEAD}data:\n{data}\n")
        return path

    return write


# The two arguments of example_pairs for three tokens of which none is trained.
_UNTRAINED = (np.array([1, 2, 3], np.int32), np.zeros(3, bool))
QUESTIONS = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4é"}]


def test_packed_examples_are_shown_with_their_answers_marked_and_counted(run, recipe):
    code, out, err = run(recipe("sft", QUESTIONS, "sequence_length: 64", "num_epochs: 1"))
    assert code == 0 and not err
    # <bos>, 22 bytes of prompt, a space, 1 or 3 bytes of answer, <eos>: 25 and 27 tokens to predict, of which 3 and 5
    # are trained; 64 - 52 cells are left.
    assert out == (
        "row 0: 64 cells, 52 tokens to predict, 8 of them trained (15.4 %), 12 padding (18.8 %)\n"
        "--- segment 1 of 2: 26 tokens, 3 trained\n"
        "<bos>Question: 1+1?\nAnswer:[[ 2<eos>]]\n"
        "--- segment 2 of 2: 28 tokens, 5 trained\n"
        "<bos>Question: 2+2?\nAnswer:[[ 4é<eos>]]\n"
        "\n"
        "total: 64 cells, 52 tokens to predict, 8 of them trained (15.4 %), 12 padding (18.8 %)\n"
        "records read for them: 2 examples, 0 truncated, 0 dropped, 0 skipped\n"
    )


def test_overrides_and_the_number_of_rows_are_obeyed_and_what_is_left_out_is_counted(run, recipe):
    records = [QUESTIONS[0], {"question": "x", "answer": ""}, {"question": "y" * 80, "answer": "z"}, QUESTIONS[1]]
    path = recipe("sft", records, "sequence_length: 64", "num_epochs: 1")
    settings = ("data.packing=false", "data.buckets=[32]", "data.untrainable=skip", "data.overlong=drop")
    code, out, _ = run(path, *settings, "--rows", "2")
    assert code == 0 and out.count("--- segment 1 of 1") == 2 and "row 1: 32 cells" in out
    assert "records read for them: 2 examples, 0 truncated, 1 dropped, 1 skipped" in out
    code, out, _ = run(path, *settings, "--rows", "1")
    assert "records read for them: 1 examples, 0 truncated, 0 dropped, 0 skipped" in out


def test_pairs_are_shown_answer_by_answer(run, recipe):
    pairs = [{"prompt": "a ", "chosen": "b", "rejected": "cd"}]
    code, out, _ = run(recipe("dpo", pairs, "sequence_length: 8"), "--rows", "1")
    assert code == 0
    assert out.startswith(
        "pair 0 (pair_id 0) chosen: 8 cells, 4 tokens to predict, 2 of them trained (50.0 %), 4 padding (50.0 %)\n"
        "--- segment 1 of 1: 5 tokens, 2 trained\n<bos>a [[b<eos>]]\n\n"
        "pair 0 (pair_id 0) rejected: 8 cells, 5 tokens to predict, 3 of them trained (60.0 %), 3 padding (37.5 %)\n"
        "--- segment 1 of 1: 6 tokens, 3 trained\n<bos>a [[cd<eos>]]\n\n"
    )


def test_the_evaluations_rows_are_shown_when_asked_for(run, recipe):
    path = recipe("sft", QUESTIONS, "sequence_length: 64", "eval_split: 'train[1:]'")
    code, out, _ = run(path, "eval.interval=1", "--eval", "--rows", "5")
    assert code == 0 and out.count("Question") == 1 and "[[ 4é<eos>]]" in out


def test_pretraining_text_is_trained_but_for_its_first_token(run, tmp_path):
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    path = tmp_path / "recipe.yaml"
    data = f"{{kind: text, path: {tmp_path}, shuffle: false, sequence_length: 16, num_epochs: 1}}"
    path.write_text(f"kind: pretrain\n{HEAD}data: {data}\n")
    code, out, _ = run(path)
    assert code == 0 and "<bos>[[one<eos>]]\n" in out and "<bos>[[two<eos>]]\n" in out
    assert "total: 16 cells, 8 tokens to predict, 8 of them trained (100.0 %), 8 padding (50.0 %)" in out


def test_synthetic_rows_are_shown_as_numbers(run):
    code, out, _ = run("pretrain_tiny", "data.sequence_length=8", "--rows", "1")
    assert code == 0 and re.search(r"^\d+\[\[(\d+ ){7}\d+\]\]$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "records", "message"),
    [
        ("sft", [*QUESTIONS, {"question": "x", "answer": " "}], r"record 2 \(from 0\): it holds nothing to train on"),
        (
            "sft",
            [{"messages": [{"role": "user", "content": "a"}]}],
            r"record 0 \(from 0\): it holds nothing to train on",
        ),
        (
            "dpo",
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            r"record 0 \(from 0\): chosen and rejected are the same",
        ),
        ("sft", [{"body": "a"}], r"has the columns body, and needed are messages"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_words(run, recipe, kind, records, message):
    code, out, err = run(recipe(kind, records, "sequence_length: 64"))
    assert code == 2 and not out and re.search(message, err) and "Traceback" not in err


def test_a_row_with_nothing_to_train_is_refused(run, recipe, monkeypatch):
    # The iterators refuse such records; should one of them fail to, the verb still does.
    from posttrain.data import rows

    whole = rows.example_pairs
    monkeypatch.setattr(rows, "left_out", lambda *_: {**rows.empty_piece(), "pairs": whole(*_UNTRAINED), "examples": 1})
    path = recipe("sft", [{"question": "x", "answer": ""}], "sequence_length: 64", "num_epochs: 1")
    code, _, err = run(path)
    assert code == 2 and "row 0: none of its 2 tokens is trained, so a step on it would learn nothing" in err


def test_a_terminal_shows_trained_tokens_in_green(recipe, tmp_path):
    path = recipe("sft", QUESTIONS[:1], "sequence_length: 64", "num_epochs: 1")
    master, slave = pty.openpty()
    environment = {**os.environ, "HF_HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "200"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "posttrain", "inspect-data", str(path)]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:
                break
            if not piece:
                break
            written += piece
        assert process.wait(timeout=300) == 0
    os.close(master)
    text = written.decode().replace("\r\n", "\n")
    assert "\x1b[1;32m 2<eos>\x1b[0m" in text and "[[" not in text
    assert "\x1b[2mAnswer:\x1b[0m" in text or "\x1b[2m<bos>Question: 1+1?" in text
