"""Conversions: round trips to the bit, moments with their weights, and what is refused."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from models.checkpoints import convert as conversion
from models.checkpoints.contents import Origin, find_origin, read_ours, require_fitting
from models.checkpoints.convert import Target, arrange, convert, write_ours
from models.checkpoints.run_info import RngInfo, read_run_info
from models.config import load_preset
from models.parameters import flatten
from tests.models.checkpoints.conversions import (
    STEP,
    assert_same_step,
    config_of,
    leaves,
    small_step,
    target,
    write_step,
)

FAMILIES = ("gpt3", "llama", "mistral", "qwen2", "qwen3", "gemma2")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_switching_framework_and_layer_layout_and_back_gives_the_same_bits(
    tmp_path: Path, family: str, tied: bool
) -> None:
    """Linen to NNX to Linen from stacked layers, NNX to Linen to NNX from split ones."""
    config = config_of(family, tied=tied, num_layers=2)
    for first, other, scan in (("linen", "nnx", True), ("nnx", "linen", False)):
        root = tmp_path / first
        source = write_step(root / "a", config, framework=first, scan=scan, optimizer={"name": "adamw"})
        there = convert(
            root / "a", root / "b", target(other, scan_layers=not scan), config=None, from_step=None
        ).written
        info = read_run_info(there)
        assert (info.framework, info.scan_layers) == (other, not scan)
        back = convert(there, root / "c", target(first, scan_layers=scan), config=None, from_step=None).written
        assert_same_step(source, back)


# --- Hugging Face ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_through_hugging_face_and_back_are_the_same_bits(tmp_path: Path, family: str, tied: bool) -> None:
    """The format has no place for an optimizer or a step: they stay behind, and a warning says so."""
    config = config_of(family, tied=tied, num_layers=3)
    source = write_step(tmp_path / "a", config, framework="nnx", scan=False, optimizer={"name": "adamw"})
    folder = convert(source, tmp_path / "hf", target("hf"), config=None, from_step=None).written
    back = read_ours(
        convert(folder, tmp_path / "b", target("nnx", scan_layers=False), config=None, from_step=None).written
    )
    before = read_ours(source)
    theirs = dict(flatten(back.params))
    for path, leaf in flatten(before.params):
        if family == "gpt3" and path[-1] == "scale":
            # (scale + 1) - 1: one rounding at a number between 1 and 2.
            assert np.abs(theirs[path] - leaf).max() <= 2.0**-24
        else:
            assert leaf.tobytes() == theirs[path].tobytes(), path
    assert theirs.keys() == dict(flatten(before.params)).keys()
    # Windows and scales may be spelt otherwise; what they mean is compared.
    assert back.config.layer_windows() == before.config.layer_windows()
    assert (back.moments, int(back.step)) == (None, 0)


def write_tokenizer(folder: Path) -> Path:
    """Four words, of which three are special, and one that may end a turn."""
    folder.mkdir()
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "<end>": 4}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.add_special_tokens(["<end>"])
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("named_by", ["chat template", "generation config"])
def test_all_ids_that_end_a_completion_go_into_the_folder(tmp_path: Path, named_by: str) -> None:
    """A chat's turn ends with another token than a text: an engine that knows the end of a text alone never stops."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    if named_by == "chat template":
        (tokenizer / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    else:
        (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [4]}))
    to = target("hf", tokenizer=tokenizer)
    folder = convert(small_step(tmp_path), tmp_path / "hf", to, config=None, from_step=None).written
    for name in ("generation_config.json", "config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [2, 4]


def test_a_tokenizer_goes_into_the_folder_with_its_ids(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    source = small_step(tmp_path)
    done = convert(source, tmp_path / "hf", target("hf", tokenizer=tokenizer), config=None, from_step=None)
    assert (done.written / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert ids.items() <= json.loads((done.written / "config.json").read_text()).items()
    assert json.loads((done.written / "generation_config.json").read_text()) == ids
    # And from there on into the next folder, without being named.
    again = convert(done.written, tmp_path / "again", target("hf"), config=None, from_step=None).written
    for name in ("tokenizer.json", "model.safetensors", "generation_config.json"):
        assert (again / name).read_bytes() == (done.written / name).read_bytes()


# --- parts and dtypes ---


def test_parameters_alone_are_cast_unrolled_and_at_step_zero(tmp_path: Path) -> None:
    source = small_step(tmp_path)
    to = target("nnx", scan_layers=False, dtype="bfloat16", params_only=True)
    done = convert(source, tmp_path / "b", to, config=None, from_step=None)
    assert done.written.name == "0"
    found = leaves(done.written)
    assert {path[0] for path in found} == {"model", "optimizer"}
    assert {path for path in found if path[0] == "optimizer"} == {("optimizer", "step")}
    kernel = leaves(source)["params", "params", "decoder", "layers", "mlp", "wi_0", "kernel"]
    for number in range(3):
        own = found["model", "decoder", "layers", str(number), "mlp", "wi_0", "kernel", "value"]
        assert own.tobytes() == kernel[:, number].astype(ml_dtypes.bfloat16).tobytes()
    info = read_run_info(done.written)
    assert (info.data_state, info.rng.step, info.extra["parameters_of_step"]) == (None, 0, STEP)


def test_moments_follow_their_parameters_dtype_and_others_keep_theirs(tmp_path: Path) -> None:
    """With moment_dtype the first moments have their own; the second moments have the parameters'."""
    source = small_step(tmp_path, optimizer={"name": "adamw", "moment_dtype": "float16"})
    done = convert(source, tmp_path / "b", target("linen", dtype="bfloat16"), config=None, from_step=None)
    found = {path: leaf for path, leaf in leaves(done.written).items() if leaf is not None}
    names = {path[:3] if path[0] == "opt_state" else path[:1]: str(leaf.dtype) for path, leaf in found.items()}
    assert names["opt_state", "0", "mu"] == "float16"
    assert names["opt_state", "0", "nu"] == names["params",] == "bfloat16"
    assert names["opt_state", "0", "count"] == "int32"


def test_values_beyond_a_dtypes_range_are_refused_by_name(tmp_path: Path) -> None:
    contents = read_ours(small_step(tmp_path))
    contents.params["decoder"]["decoder_norm"]["scale"][3] = 1e6
    with pytest.raises(ValueError, match=r"--dtype=float16: values of decoder/decoder_norm/scale exceed its range"):
        arrange(contents, target("nnx", dtype="float16"))


# --- which step, and what is refused ---


def test_the_newest_step_is_read_unless_another_is_named(tmp_path: Path) -> None:
    root = small_step(tmp_path).parent
    contents = dataclasses.replace(read_ours(root / str(STEP)), step=np.int32(12))
    assert contents.info is not None
    info = contents.info.model_copy(update={"step": 12, "rng": RngInfo(seed=5, step=12)})
    write_ours(tmp_path / "more", dataclasses.replace(contents, info=info), framework="linen", origin="ours")
    (tmp_path / "more/12").rename(root / "12")
    assert convert(root, tmp_path / "b", target("nnx"), config=None, from_step=None).written.name == "12"
    assert convert(root, tmp_path / "c", target("nnx"), config=None, from_step=STEP).written.name == str(STEP)
    with pytest.raises(ValueError, match=r"--from-step=9: .* has the steps \[7, 12\]; choose one"):
        convert(root, tmp_path / "d", target("nnx"), config=None, from_step=9)


def test_a_run_a_folder_of_steps_a_step_and_its_items_name_the_same_checkpoint(tmp_path: Path) -> None:
    step = small_step(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "a").rename(tmp_path / "run/checkpoints")
    step = tmp_path / "run/checkpoints" / step.name
    for path in (tmp_path / "run", step.parent, step, step / "items"):
        assert find_origin(path, from_step=None) == Origin("ours", step)


def test_a_damaged_source_is_refused_by_file(tmp_path: Path) -> None:
    source = small_step(tmp_path)
    victim = max((source / "items").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is damaged and was not converted.*--from-step(.|\n)*truncated"):
        convert(source, tmp_path / "b", target("nnx"), config=None, from_step=None)


def test_a_leaf_that_is_missing_surplus_or_not_finite_is_named(tmp_path: Path) -> None:
    contents = read_ours(small_step(tmp_path))
    del contents.params["decoder"]["decoder_norm"]
    contents.params["decoder"]["extra"] = {"kernel": np.ones(2)}
    contents.params["token_embedder"]["embedding"][0, 0] = np.nan
    with pytest.raises(ValueError, match="3 parameters") as error:
        require_fitting(contents, where="here")
    for line in ("missing: decoder/decoder_norm/scale", "surplus: decoder/extra/kernel", "not finite: token_embedder"):
        assert line in str(error.value)


def test_a_taken_destination_and_senseless_options_are_refused(tmp_path: Path) -> None:
    source, taken = small_step(tmp_path), tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()

    def refused(match: str, to: Target, path: Path = tmp_path / "b", **options: Any) -> None:
        arguments: dict[str, Any] = {"config": None, "from_step": None} | options
        with pytest.raises(ValueError, match=match):
            convert(source, path, to, **arguments)

    refused(r"taken: a conversion needs a folder of its own", target("nnx"), taken)
    refused(r"--model: .* says its own architecture", target("nnx"), config=load_preset("tiny-llama"))
    refused(r"--scan: a Hugging Face folder has a tensor for each layer", target("hf", scan_layers=True))
    refused(r"--tokenizer: only a Hugging Face folder holds a tokenizer", target("nnx", tokenizer=tmp_path))
    with pytest.raises(ValueError, match=r"nowhere: does not exist: a checkpoint is"):
        find_origin(tmp_path / "nowhere", from_step=None)
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".*"))


# --- whole or not at all ---


@pytest.mark.parametrize("format", ["nnx", "hf", "maxtext"])
def test_a_destination_appears_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """At the last rename everything is on the disk beside the destination, and the destination is not there."""
    source, destination, seen = small_step(tmp_path), tmp_path / "b", []
    rename = os.rename

    def watched(old: Any, new: Any) -> None:
        if Path(new) == destination:
            assert not destination.exists()
            seen.append(sorted(path.relative_to(old) for path in Path(old).rglob("*")))
        rename(old, new)

    monkeypatch.setattr(os, "rename", watched)
    convert(source, destination, target(format), config=None, from_step=None)
    assert seen == [sorted(path.relative_to(destination) for path in destination.rglob("*"))]


KILLED = """
import os, signal, sys
from pathlib import Path
from models.checkpoints import convert
rename = os.rename
os.rename = lambda old, new: os.kill(os.getpid(), signal.SIGKILL) if Path(new).name == "b" else rename(old, new)
target = convert.Target("nnx", None, None, False)
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), target, config=None, from_step=None)
"""


def test_a_killed_conversion_leaves_no_destination_and_the_next_one_clears_up(tmp_path: Path) -> None:
    source, destination = small_step(tmp_path), tmp_path / "b"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, source, destination], env=environment, capture_output=True, timeout=400
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not destination.exists() and (tmp_path / ".b.partial").exists()
    # Command lines of other tests may have taken the loggers over, so the records are caught at their source.
    handler, records = logging.Handler(), []
    handler.emit = records.append  # type: ignore[method-assign]
    conversion.logger.addHandler(handler)
    written = convert(source, destination, target("nnx"), config=None, from_step=None).written
    conversion.logger.removeHandler(handler)
    assert any("removing what an interrupted conversion left" in record.getMessage() for record in records)
    assert read_run_info(written).step == STEP and not (tmp_path / ".b.partial").exists()
