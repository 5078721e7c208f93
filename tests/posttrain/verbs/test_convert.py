"""`posttrain convert` on the command line: what it prints, exit codes, and what it refuses before JAX is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.checkpoints import convert as conversion
from models.checkpoints.run_info import read_run_info
from models.config import load_preset
from posttrain.cli import main
from posttrain.verbs.convert import model_config
from recipes.load import dump_recipe, load_recipe
from tests.models.checkpoints.conversions import leaves, small_step

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("--to", "nnx")`: exit code, stdout and stderr of `posttrain convert`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["convert", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_conversion_says_what_it_wrote_and_how_close_it_is(run: Run, tmp_path: Path) -> None:
    source = small_step(tmp_path)
    code, out, err = run(source, tmp_path / "hf", "--to", "hf", "--verify")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert f"{tmp_path / 'hf'}: converted from {source}" in lines
    assert any("the optimizer's state stays behind" in line for line in lines)
    # One line for each route; both are right to float32.
    verified = [line for line in lines if line.startswith("verify: max |delta logits| = ")]
    assert [line.split(" by ")[1] for line in verified] == ["our model on the folder", "NumPy on the folder"]
    assert all(float(line.split("= ")[1].split(" ")[0]) < 1e-5 for line in verified)


def test_a_conversion_that_computes_something_else_exits_with_1(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = conversion.write

    def transposing(destination: Path, *arguments: object) -> Path:
        written = write(destination, *arguments)
        tensors = load_file(written / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        save_file({**tensors, name: np.ascontiguousarray(tensors[name].T)}, written / "model.safetensors")
        return written

    monkeypatch.setattr(conversion, "write", transposing)
    code, out, err = run(small_step(tmp_path), tmp_path / "hf", "--to", "hf", "--verify")
    assert code == 1 and "verify: max |delta logits|" in out
    assert err.strip() == f"{tmp_path / 'hf'}: computes something else than {tmp_path / 'a/7'}; do not use it"


def test_the_tolerance_is_the_users_to_set(run: Run, tmp_path: Path) -> None:
    source = small_step(tmp_path)
    assert run(source, tmp_path / "b", "--to", "hf", "--verify", "--tolerance", "0")[0] == 1
    code, _, err = run(source, tmp_path / "c", "--to", "hf", "--tolerance", "1")
    assert code == 2 and "--tolerance=1.0: it has no effect without --verify" in err


def test_maxtexts_trees_take_their_architecture_from_a_recipe(run: Run, shared_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kind: pretrain\nmodel: {preset: tiny-llama, overrides: {num_layers: 3, rope_theta: 500000.0}}\n")
    fixture = shared_dir / "fixtures/maxtext/llama-tiny"
    code, out, err = run(fixture, tmp_path / "b", "--to", "nnx", "--no-scan", "--model", recipe, "--verify")
    assert (code, err) == (0, "")
    assert "converted: query projections times 4 (mu / 4, nu / 16)" in out
    assert "dropped 12 random keys and counters" in out and "by our loader and model" in out
    code, _, err = run(fixture, tmp_path / "c", "--to", "nnx")
    assert code == 2 and "name it with --model, a preset or a recipe" in err


def test_model_names_a_preset_or_a_recipe() -> None:
    assert model_config("gpt3-52k") == load_preset("gpt3-52k")
    assert model_config("pretrain_tiny") == load_preset("tiny-llama")
    with pytest.raises(ValueError, match=r"--model=tiny-lama: neither a preset nor a recipe; presets are .*tiny-llama"):
        model_config("tiny-lama")


def test_a_converted_run_is_a_run_with_the_other_framework_in_its_recipe(run: Run, tmp_path: Path) -> None:
    """tests/conformance/test_switch_framework.py trains on from such a run."""
    old, new = tmp_path / "old", tmp_path / "new"
    small_step(tmp_path)
    old.mkdir()
    (tmp_path / "a").rename(old / "checkpoints")
    recipe = load_recipe("pretrain_tiny", ["model.framework=linen", "train.steps=7"]).recipe
    (old / "resolved.yaml").write_text(dump_recipe(recipe))
    code, out, _ = run(old, new / "checkpoints", "--to", "nnx", "--no-scan")
    assert code == 0
    command = f"posttrain pretrain {new}/resolved.yaml run.dir={new} run.resume=must"
    assert f"{new}: resumes with: {command}" in out.splitlines()
    converted = load_recipe(str(new / "resolved.yaml"), []).recipe
    assert (converted.model.framework, converted.model.scan_layers) == ("nnx", False)
    kept = {"framework": "linen", "scan_layers": True}
    assert converted.model_copy(update={"model": converted.model.model_copy(update=kept)}) == recipe
    info, before = read_run_info(new / "checkpoints/7"), read_run_info(old / "checkpoints/7")
    changed = {"framework": "nnx", "scan_layers": False}
    assert info == before.model_copy(update=changed) and info.data_state == {"hosts": [{"row": 3}]}
    # Elsewhere, or with parameters alone, there is no run to make.
    assert run(old, tmp_path / "loose", "--to", "nnx")[0] == 0
    assert run(old, tmp_path / "params/checkpoints", "--to", "nnx", "--params-only")[0] == 0
    assert not list(tmp_path.glob("*/resolved.yaml.*")) and not (tmp_path / "params/resolved.yaml").exists()
    assert ("optimizer", "opt_state", "0", "count") not in leaves(tmp_path / "params/checkpoints/0")


def test_mistakes_are_told_before_jax_is_imported(tmp_path: Path) -> None:
    source = (
        "import sys, json; from posttrain.cli import main\n"
        f"codes = [main(['convert', 'x', {str(tmp_path / 'b')!r}, *rest]) for rest in json.loads(sys.argv[1])]\n"
        "print(codes, 'jax' in sys.modules)"
    )
    cases = [["--to", "onnx"], ["--to", "nnx", "--dtype", "int8"], ["--to", "nnx", "--tolerance", "1"], ["--help"]]
    done = subprocess.run(
        [sys.executable, "-c", source, json.dumps(cases)], capture_output=True, text=True, timeout=400, check=True
    )
    assert done.stdout.splitlines()[-1] == "[2, 2, 2, 0] False"
    assert "--to=onnx: no such format; choose from linen, nnx, hf, maxtext" in done.stderr
    assert "--dtype=int8: no dtype of parameters; choose from float32, bfloat16, float16" in done.stderr
