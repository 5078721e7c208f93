"""Provenance: versions without imports, the commit, and a command line without its secrets."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

from recipes import provenance
from recipes.provenance import REDACTED, git_state, package_versions, redact, redact_text, redact_values

ROOT = Path(__file__).resolve().parents[2]
HF_TOKEN = "hf_" + "aB3" * 11
SECRETS = {
    "hugging face": HF_TOKEN,
    "github": "ghp_" + "x1" * 18,
    "github fine-grained": "github_pat_" + "y2" * 20,
    "openai": "sk-" + "z3" * 16,
    "aws": "AKIA" + "ABCD1234" * 2,
    "google": "AIza" + "q-w_e" * 7,
    "wandb": "wandb_v1_" + "r5" * 20,
    "jwt": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl",
    "forty hex digits": "0123456789abcdef" * 2 + "01234567",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_credential_is_taken_out_wherever_it_stands(secret):
    command = ["posttrain", "pretrain", secret, f"data.path={secret}", f"--note={secret}"]
    assert redact(command) == ["posttrain", "pretrain", REDACTED, f"data.path={REDACTED}", f"--note={REDACTED}"]


@pytest.mark.parametrize(
    ("argument", "cleaned"),
    [
        ("hub.token=abc", f"hub.token={REDACTED}"),
        ("WANDB_API_KEY=abc", f"WANDB_API_KEY={REDACTED}"),
        ("--api-key=abc", f"--api-key={REDACTED}"),
        ("db.password=a=b", f"db.password={REDACTED}"),
        ("client_secret=abc", f"client_secret={REDACTED}"),
        ("apikey=abc", f"apikey={REDACTED}"),
        ("x={user: me, password: abc, n: 1}", f"x={{user: me, password: {REDACTED}, n: 1}}"),
        ("url=https://me:abc@host/path", f"url=https://{REDACTED}@host/path"),
        # What must stay: a record without its settings records nothing.
        ("tokenizer.path=bytes", "tokenizer.path=bytes"),
        ("rl.max_tokens=512", "rl.max_tokens=512"),
        ("train.steps=20", "train.steps=20"),
        ("hub.token=", "hub.token="),
        ("keys.path=x", "keys.path=x"),
        ("model.hf_path=org/model", "model.hf_path=org/model"),
        ("data.path=https://host/a:b", "data.path=https://host/a:b"),
    ],
)
def test_value_is_taken_out_where_its_key_says_secret_and_nowhere_else(argument, cleaned):
    assert redact([argument]) == [cleaned]


def test_value_after_a_secret_flag_is_taken_out():
    assert redact(["--hf-token", "abc", "x", "--api_key", "--verbose", "y"]) == [
        "--hf-token",
        REDACTED,
        "x",
        "--api_key",
        "--verbose",
        "y",
    ]


def test_nested_values_are_cleaned_by_key_and_by_look():
    values = {"a": {"token": "abc", "n": 1, "list": ["x", HF_TOKEN]}, "path": f"see {HF_TOKEN} here", "key": None}
    assert redact_values(values) == {
        "a": {"token": REDACTED, "n": 1, "list": ["x", REDACTED]},
        "path": f"see {REDACTED} here",
        "key": None,
    }


def test_text_without_secrets_is_unchanged():
    for text in ("recipes/pretrain_tiny.yaml", "lr=1e-3", "decoder/.*key.*", "a" * 39, "sk-short", ""):
        assert redact_text(text) == text


def test_versions_are_those_of_the_installed_packages():
    versions = package_versions()
    assert versions["jax"] == importlib.metadata.version("jax")
    assert versions["pydantic"] == importlib.metadata.version("pydantic")
    assert "not-a-package" not in versions


def commit_file(folder):
    """Makes a folder a repository with one committed file."""
    (folder / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "x"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


def test_git_state_is_the_checkouts_commit():
    state = git_state()
    if not (ROOT / ".git").exists():
        pytest.skip("the tests run outside a git checkout")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{40}", state["commit"]) and isinstance(state["dirty"], bool)
    assert state["commit"] == head


def test_git_state_of_an_installed_package_inside_a_foreign_repository_is_none(tmp_path, monkeypatch):
    commit_file(tmp_path)
    (tmp_path / "env" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "env" / "recipes" / "provenance.py"))
    assert git_state() is None


def test_missing_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_dirty_follows_the_working_tree(tmp_path, monkeypatch):
    commit_file(tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "recipes" / "provenance.py"))
    assert git_state()["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert git_state()["dirty"] is True
