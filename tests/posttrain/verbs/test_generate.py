"""`posttrain generate`: which model and tokenizer it opens, what it is given, what it writes, how it ends."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints.huggingface import ModelCard, export_hf
from models.tokenizer import load_tokenizer, save_tokenizer
from posttrain import cli
from posttrain.samplers import proof
from posttrain.verbs import generate as verb
from recipes.schema import TokenizerSection

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process and gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose recipe names the byte tokenizer."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    arguments = ["model.preset=tiny-llama-rl", "tokenizer.path=bytes", "train.steps=2", "logging.console=none"]
    assert cli.main(["pretrain", "pretrain_tiny", *arguments, f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """The same weights as a Hugging Face folder."""
    opened = verb.open_model(str(trained), tokenizer_path=None, dtype="float32")
    tokenizer = trained.parent / "tokenizer"
    save_tokenizer(opened.tokenizer, tokenizer)
    export_hf(
        trained.parent / "hf",
        opened.model.config,
        opened.params,
        param_scan_axis=1,
        dtype="float32",
        max_shard_bytes=2**30,
        tokenizer_source=tokenizer,
        generation={"eos_token_id": 257},
        card=ModelCard(name="test", base_model=None, how="A test."),
    )
    return trained.parent / "hf"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_completes_lines_of_a_file_and_writes_what_is_known_of_each(run, trained, tmp_path):
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text("Once upon\n\nThe end of\n")
    options = ["--engine", "native", "--max-tokens", 12, "--samples", 2, "--temperature", 0.7, "--seed", 3]
    code, stdout, stderr = run("generate", trained, "-p", "Hello", "--file", file, *options, "--out", out)
    assert code == 0, stderr
    found = rows(out)
    assert [(row["prompt"], row["sample_index"]) for row in found] == [
        (prompt, index) for prompt in ("Hello", "Once upon", "The end of") for index in (0, 1)
    ]
    assert f"== {file}:3, sample 2\n{found[5]['text']}" in stdout
    # The log-probabilities are those of the checkpoint's model at that temperature, after <bos> and the prompt's bytes.
    opened = verb.open_model(str(trained), tokenizer_path=None, dtype="float32")
    for row in found:
        assert 1 <= len(row["token_ids"]) <= 12
        ids = [256, *row["prompt"].encode(), *row["token_ids"]]
        [logprobs] = proof.trainer_logprobs(opened.model, opened.params, [ids], temperature=0.7)
        np.testing.assert_allclose(row["logprobs"], logprobs[-len(row["token_ids"]) :], atol=1e-4)
    again = tmp_path / "again.jsonl"
    assert run("generate", trained, "-p", "Hello", *options, "--out", again)[0] == 0
    assert rows(again) == found[:2]


@pytest.mark.slow
def test_a_hugging_face_folder_is_the_same_model_and_takes_prompts_for_messages(run, trained, exported, tmp_path):
    options = ["--engine", "native", "--max-tokens", 8, "--temperature", 0, "--out", "-"]
    plain = [json.loads(run("generate", model, "-p", "Hi", "--no-chat", *options)[1]) for model in (trained, exported)]
    assert plain[0] == plain[1]
    # Its tokenizer has a chat template, and nothing says that it was trained on plain text.
    chat = json.loads(run("generate", exported, "-p", "Hi", *options)[1])
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    as_messages = json.loads(run("generate", trained, "--file", file, *options)[1])
    assert chat["token_ids"] == as_messages["token_ids"]
    assert (chat["prompt"], as_messages["messages"]) == ("Hi", [{"role": "user", "content": "Hi"}])
    opened = verb.open_model(str(exported), tokenizer_path=None, dtype="float32")
    [prompt] = verb.encode_requests([verb.Request("Hi", None, "")], opened, is_chat=True)
    assert opened.tokenizer.decode(prompt.token_ids, skip_special=False) == "<bos>user: Hi\nassistant: "


def test_text_streams_to_a_terminal_and_equals_the_whole(run, trained):
    command = [sys.executable, "-m", "posttrain", "generate", str(trained), "-p", "Hello", "--engine", "native"]
    command += ["--max-tokens", "40", "--stop", "~"]
    main, worker = pty.openpty()
    done = subprocess.Popen(command, stdout=worker, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(worker)
    written = b""
    while True:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # Linux says so when the other end is closed.
            break
        if not chunk:
            break
        written += chunk
    assert done.wait(300) == 0, done.stderr.read().decode()
    code, whole, _ = run("generate", trained, "-p", "Hello", "--engine", "native", "--max-tokens", 40, "--stop", "~")
    assert code == 0
    assert written.decode().replace("\r\n", "\n") == whole


def test_a_stream_keeps_back_characters_that_are_not_whole():
    tokenizer = load_tokenizer(TokenizerSection(path="bytes"))
    written: list[str] = []
    stream = verb.TextStream(tokenizer, written.append)
    for byte in "aé€b".encode():
        stream.push([byte])
    stream.push([0xE2])
    stream.end()
    assert written == ["a", "é", "€", "b", "\N{REPLACEMENT CHARACTER}\n"]


def test_mistakes_are_told_in_one_line_and_end_with_2(run, trained, tmp_path):
    def error(*arguments: object) -> str:
        code, out, err = run("generate", *arguments)
        assert (code, out) == (2, ""), (code, out, err)
        return err

    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.jsonl"
    empty.write_text("\n \n")
    broken.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert (
        error(trained) == "generate: there is nothing to complete; give --prompt TEXT, or --file with a prompt a line\n"
    )
    assert "the file has no prompts" in error(trained, "--file", empty)
    assert error(trained, "--file", broken).startswith(f'{broken}:2: {{"text": "b"}}: a line is an object with either')
    assert "--prompt 1: is empty" in error(trained, "-p", "")
    assert "--engine=vlm: no such engine; use one of auto, vllm, native" in error(trained, "-p", "a", "--engine", "vlm")
    assert "prompt 0: 4 tokens with up to 600 sampled ones" in error(trained, "-p", "abc", "--max-tokens", 600)
    assert f"MODEL={tmp_path}: has no run.json" in error(tmp_path, "-p", "a")
    assert "sampling.top_p=2.0" in error(trained, "-p", "a", "--top-p", 2)


def test_a_checkpoint_whose_tokenizer_is_not_known_asks_for_one(run, trained, tmp_path):
    alone = tmp_path / "checkpoints"
    alone.symlink_to(trained / "checkpoints")
    code, _, err = run("generate", alone, "-p", "Hi", "--max-tokens", 2, "--engine", "native")
    assert code == 2
    assert err.endswith("resolved.yaml); give --tokenizer PATH\n")
    options = ["--max-tokens", 4, "--engine", "native", "--temperature", 0]
    code, given, err = run("generate", alone, "-p", "Hi", *options, "--tokenizer", "bytes")
    assert code == 0, err
    assert given == run("generate", trained, "-p", "Hi", *options)[1]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_writes_the_same_greedy_text_as_the_native_engine(trained, tmp_path):
    texts = {}
    for engine in ("vllm", "native"):
        command = [sys.executable, "-m", "posttrain", "generate", str(trained), "-p", "Hello", "--engine", engine]
        command += ["--max-tokens", "40", "--temperature", "0", "--out", "-"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, check=False)
        assert done.returncode == 0, done.stderr
        texts[engine] = json.loads(done.stdout)
        logprobs = np.array(texts[engine].pop("logprobs"))
        np.testing.assert_allclose(logprobs, texts.setdefault("logprobs", logprobs), atol=1e-4)
    assert texts["vllm"] == texts["native"]
