"""Where a checkpoint is looked for. No test reaches for the network: the hub's client is offline."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from models.checkpoints.hf_hub import checkpoint_folder, config_folder


@pytest.mark.parametrize("find", [checkpoint_folder, config_folder])
def test_a_local_folder_wins_over_a_repository_of_the_same_name(
    find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find("owner/name").resolve() == tmp_path / "owner" / "name"


@pytest.mark.parametrize("find", [checkpoint_folder, config_folder])
def test_a_repository_that_cannot_be_had_is_one_sentence_with_a_remedy(find) -> None:
    with pytest.raises(ValueError, match=r"^owner/no-such-model: no local folder .* hub did not give it .*; name an"):
        find("owner/no-such-model")


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", "~/nowhere-at-all"])
def test_what_is_no_hub_id_is_never_asked_of_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="no such folder, and no hub id"):
        checkpoint_folder(path)


def test_a_file_is_no_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="a checkpoint is a folder"):
        checkpoint_folder(tmp_path / "model.safetensors")


def test_of_a_repository_only_one_format_of_the_weights_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        files = [
            "config.json",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "merges.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "README.md",
            "pytorch_model.bin",
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "onnx/model.onnx",
            "flax_model.msgpack",
            "extra/other.safetensors",
        ]
        fetched.append(repo_id)
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint_folder("owner/name") == tmp_path
    assert fetched[0] == "owner/name" and len(fetched) == 14
    assert fetched[1] == "config.json" and fetched[-1] == "chat_template.jinja"
