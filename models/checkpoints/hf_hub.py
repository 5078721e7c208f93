"""Where a Hugging Face model lies: a local folder, or a repository of the hub, fetched into the hub's own cache."""

import re
from collections.abc import Callable
from pathlib import Path

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
# What a causal language model's checkpoint needs; repositories often hold other formats of the same weights beside it.
_WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
_UNWANTED = ("consolidated*", "original/*", "*/*.safetensors")


def checkpoint_folder(path: str | Path) -> Path:
    """The folder of a whole checkpoint: `path` itself where it is a local folder, else the hub's snapshot of it.

    Raises:
        ValueError: neither a folder nor a repository that can be had.
    """

    def fetch(hub_id: str) -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(hub_id, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED))

    return _local_or(path, fetch)


def config_folder(path: str | Path) -> Path:
    """A folder that holds the checkpoint's config.json; from the hub that file alone is fetched.

    Raises:
        ValueError: neither a folder nor a repository that can be had.
    """

    def fetch(hub_id: str) -> str:
        from huggingface_hub import hf_hub_download

        return str(Path(hf_hub_download(hub_id, "config.json")).parent)

    return _local_or(path, fetch)


def _local_or(path: str | Path, fetch: Callable[[str], str]) -> Path:
    """A local folder wins over a repository of the same name."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise ValueError(
            f"{path}: a checkpoint is a folder, and this is a file; name the folder that holds config.json"
        )
    if not _HUB_ID.fullmatch(str(path)):
        raise ValueError(f"{path}: no such folder, and no hub id (owner/name) either; name an existing folder")
    try:
        return Path(fetch(str(path)))
    except (OSError, ValueError) as error:
        # Every error of the hub's client is one of the two, failed connections and refused access included.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: no local folder of this name, and the hub did not give it ({reason}); name an existing folder, "
            "or check the id, the connection and the access token"
        ) from None
