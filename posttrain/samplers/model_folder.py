"""The folder an engine of another project starts from: configuration and tokenizer of our model, and no weights.

Weights reach the engine through `sync`, so that there is one way for them and no file that can be stale.
"""

import json
from pathlib import Path
from typing import Any

from models.checkpoints.hf_config import CONFIG_FILE, config_to_hf
from models.config import TransformerConfig
from models.tokenizer import Tokenizer, save_tokenizer

GENERATION_FILE = "generation_config.json"


def write_model_folder(
    folder: Path, config: TransformerConfig, tokenizer: Tokenizer, *, dtype: str, max_length: int
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files; what an earlier call wrote is replaced.

    Args:
        folder: where to write; made if missing.
        config: the architecture.
        tokenizer: that of the model.
        dtype: that the engine is to compute in: float32, bfloat16 or float16.
        max_length: the longest sequence in tokens that the engine is to hold.

    Raises:
        ValueError: a folder with weights in it (a checkpoint, whose files are not ours to replace), a length that the
            model does not have, a tokenizer with more ids than the model, or a configuration that the family's
            config.json cannot say.
    """
    weights = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if weights:
        raise ValueError(
            f"sampler folder {folder}: holds {weights[0]}: an engine's folder is overwritten and has no weights; name "
            "another folder"
        )
    if max_length > config.max_position:
        raise ValueError(
            f"sampler max_length={max_length}: the model has positions for {config.max_position} tokens; lower "
            "max_length, or set model.overrides.max_position if its positions are rotary and it was trained so"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name}: {tokenizer.vocab_size} ids: the model's vocabulary has {config.vocab_size}; "
            "use the model's own tokenizer"
        )
    # Scoring a sequence of the full length takes one position more, since engines sample at least one token.
    config = config.replace(max_position=max(config.max_position, max_length + 1))
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    token_ids: dict[str, Any] = {name: value for name, value in ids.items() if value is not None}
    if tokenizer.stop_ids:
        token_ids["eos_token_id"] = list(tokenizer.stop_ids)
    content = config_to_hf(config, dtype=dtype, token_ids=token_ids)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    for name, values in ((CONFIG_FILE, content), (GENERATION_FILE, token_ids)):
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
