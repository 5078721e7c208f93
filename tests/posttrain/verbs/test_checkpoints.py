"""`posttrain compare`, `inspect` and `export-params`: what they print, how they refuse, how they end."""

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import cli
from tests.models.checkpoints.stored_models import LAYOUTS, weights, write_step

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
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A state in two layouts, the same with two layers swapped, and with one weight changed."""
    folder = tmp_path_factory.mktemp("verbs")
    swapped, changed = weights(), weights()
    decoder = swapped["decoder"]
    decoder["layers_1"], decoder["layers_2"] = decoder["layers_2"], decoder["layers_1"]
    changed["decoder"]["layers_0"]["mlp"]["wi_1"]["kernel"][4, 5] += 1e-4
    return {
        "nnx": write_step(folder / "nnx" / "checkpoints", LAYOUTS[0], weights()),
        "linen": write_step(folder / "linen", LAYOUTS[3], weights()),
        "swapped": write_step(folder / "swapped", LAYOUTS[3], swapped),
        "changed": write_step(folder / "changed", LAYOUTS[2], changed, moments=False),
    }


def test_compare_ends_with_0_for_the_same_1_for_different_and_2_for_what_it_cannot_read(
    run: Run, steps: dict[str, Path], tmp_path: Path
) -> None:
    code, out, err = run("compare", steps["nnx"], steps["linen"], "--values", "--atol", "0", "--rtol", "0")
    assert code == 0 and out.endswith("the same: 92 arrays in common, by values\n") and not err
    assert f"A: {steps['nnx']} (NNX, layers stacked along axis 1, full state)" in out
    code, out, _ = run("compare", steps["nnx"], steps["swapped"], "--values")
    assert code == 1 and "layers 1 and 2 are swapped\n" in out
    code, out, err = run("compare", steps["nnx"], tmp_path / "nowhere")
    assert code == 2 and out == ""
    assert err.startswith(f"checkpoint={tmp_path / 'nowhere'}: does not exist: ")


def test_compare_reads_numbers_only_when_asked_and_within_the_tolerances_given(
    run: Run, steps: dict[str, Path]
) -> None:
    pair = ("compare", steps["nnx"], steps["changed"], "--only", "params")
    code, out, _ = run(*pair)
    assert code == 0 and "values were not read: --values" in out
    code, out, _ = run(*pair, "--values")
    assert code == 1 and "params/decoder/layers_0/mlp/wi_1/kernel: 1 of 384 values; largest |difference| 0.000" in out
    assert "at [4, 5]: A " in out
    code, out, _ = run(*pair, "--values", "--atol", "1e-3")
    assert code == 0 and re.search(
        r"largest \|difference\| of all: \S+ in params/decoder/layers_0/mlp/wi_1/kernel", out
    )
    code, _, err = run(*pair[:3], "--only", "moments")
    assert code == 2 and err == "--only=moments: no such selection; use params or all\n"


def test_inspect_prints_columns_and_ends_with_1_for_a_damaged_step(
    run: Run, steps: dict[str, Path], tmp_path: Path
) -> None:
    code, out, err = run("inspect", steps["nnx"].parent.parent)
    lines = out.splitlines()
    assert code == 0 and not err and "\x1b" not in out
    assert "step             5" in lines and "recipe hash      abc123" in lines
    row = next(line for line in lines if line.startswith("model/decoder/layers/mlp/wo/kernel/value "))
    assert row.split() == ["model/decoder/layers/mlp/wo/kernel/value", "[24,", "3,", "16]", "float32", "4.5", "KiB"]
    assert next(line for line in lines if line.startswith("params ")).split() == [
        "params",
        "12",
        "9,200",
        "35.9",
        "KiB",
    ]
    broken = tmp_path / "5"
    shutil.copytree(steps["nnx"], broken)
    os.truncate(broken / "items" / "_METADATA", 10)
    code, out, _ = run("inspect", broken, "--quick")
    assert code == 1 and "DAMAGED: 1 problem" in out and "  items/_METADATA: truncated: 10 bytes, " in out
    code, _, err = run("inspect", tmp_path / "nowhere")
    assert code == 2 and "nowhere: does not exist" in err


def test_export_params_writes_what_inspect_and_compare_then_read(
    run: Run, steps: dict[str, Path], tmp_path: Path
) -> None:
    out_dir = tmp_path / "decode"
    code, out, err = run("export-params", steps["nnx"], out_dir)
    assert code == 0 and out == f"{out_dir / '0'}: parameters of {steps['nnx']} in bfloat16\n" and not err
    code, out, _ = run("inspect", out_dir)
    assert code == 0 and "NNX, layers apart, parameters only" in out and "opt_state" not in out
    # 8 bits of mantissa: half a unit in the last place is 2^-9 of the value.
    code, out, _ = run("compare", steps["linen"], out_dir, "--only", "params", "--values", "--rtol", 2.0**-8)
    assert code == 1 and "dtype (30):" in out and "value (" not in out
    code, _, err = run("export-params", steps["nnx"], out_dir)
    assert code == 2 and "decode: holds 0: an export needs a folder of its own; choose another" in err


def test_export_params_that_cannot_be_written_ends_with_1(
    run: Run, steps: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.checkpoints.manifest.write_manifest", full)
    code, out, err = run("export-params", steps["nnx"], tmp_path / "decode")
    assert code == 1 and "bfloat16" not in out and "not saved: [Errno 28] No space left on device" in err
    assert not (tmp_path / "decode" / "0").exists()


@pytest.mark.parametrize("verb", ["compare", "inspect", "export-params"])
def test_help_answers_without_jax(verb: str) -> None:
    look = f"code = cli.main([{verb!r}, '--help']); print('jax' in sys.modules, code)"
    source = f"import sys; from posttrain import cli; {look}"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False 0\n") and "Exit codes: 0 " in " ".join(done.stdout.split())


def test_a_terminal_gets_tables(steps: dict[str, Path]) -> None:
    reader, writer = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "posttrain", "inspect", str(steps["nnx"]), "--quick"],
        stdout=writer,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(writer)
    written = b""
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:
            # Linux ends a terminal whose other side has closed with an error.
            break
        if not piece:
            break
        written += piece
    assert child.wait(300) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", written.decode())
    assert b"\x1b[32m" in written and "────" in text
    assert re.search(r"model/decoder/layers/mlp/wo/kernel/value +\[24, 3, 16\] +float32 +4\.5 KiB", text)
