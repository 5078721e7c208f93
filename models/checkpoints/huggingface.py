"""Whole models from and to Hugging Face's format: safetensors, config.json and what stands beside them; no torch.

Reading goes tensor by tensor into arrays that are allocated once, so its peak is the model and one tensor. Writing
fills a folder beside the destination and renames it, so a folder of that name is always whole.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from models.checkpoints.hf_config import CONFIG_FILE, config_to_hf, read_config
from models.checkpoints.hf_families import SPELLINGS
from models.checkpoints.hf_files import DTYPES, OutgoingTensor, TensorFiles, open_tensors, write_tensors
from models.checkpoints.hf_hub import checkpoint_folder
from models.checkpoints.hf_names import HEAD_NAME, TABLES, Tensor, checkpoint_tensors, is_ignored, leaf_view
from models.config import TransformerConfig
from models.parameters import count_params, flatten, param_specs, unflatten

Params = dict[str, Any]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES_FOLDER = "additional_chat_templates"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def import_hf(
    path: str | Path, *, scan_layers: bool, param_scan_axis: int, dtype: str
) -> tuple[TransformerConfig, Params]:
    """Reads a checkpoint: a local folder, or a hub id.

    Args:
        path: the folder, which wins, or the id.
        scan_layers: stack the layers along `param_scan_axis`, else name them layers_0, layers_1, ...
        param_scan_axis: where the layer axis stands.
        dtype: of the parameters: float32, bfloat16 or float16.

    Returns:
        The architecture, and NumPy arrays in Linen's naming.

    Raises:
        ValueError: a config.json or files that cannot be read, or tensors that do not fit; every one is named.
    """
    folder = checkpoint_folder(path)
    config = read_config(folder)
    return config, import_params(folder, config, scan_layers=scan_layers, param_scan_axis=param_scan_axis, dtype=dtype)


def import_params(
    path: str | Path, config: TransformerConfig, *, scan_layers: bool, param_scan_axis: int, dtype: str
) -> Params:
    """Reads a checkpoint's weights for an architecture that is already known; see `import_hf`."""
    folder = checkpoint_folder(path)
    specs = dict(flatten(param_specs(config, scan_layers=scan_layers, param_scan_axis=param_scan_axis)))
    tensors = checkpoint_tensors(config)
    with open_tensors(folder) as files:
        names = _names_in_files(folder, config, tensors, files)
        leaves = {path: np.empty(spec.shape, DTYPES[dtype]) for path, spec in specs.items()}
        for tensor in tensors:
            leaf = leaves[_tree_path(tensor, scan_layers)]
            place = leaf_view(leaf, tensor, stacked=scan_layers, param_scan_axis=param_scan_axis)
            place[...] = tensor.to_ours(files.read(names[tensor.name]))
    return unflatten(leaves)


def _tree_path(tensor: Tensor, stacked: bool) -> tuple[str, ...]:
    """Where a tensor's leaf stands in a tree in Linen's naming."""
    if tensor.layer is None:
        return tensor.path
    return ("decoder", "layers" if stacked else f"layers_{tensor.layer}", *tensor.path)


def _names_in_files(
    folder: Path, config: TransformerConfig, tensors: list[Tensor], files: TensorFiles
) -> dict[str, str]:
    """The name of each tensor in the files, once all of them are known to be there and to fit."""
    prefix = TABLES[config.family].prefix
    # Some checkpoints, GPT-2's own among them, hold the bare model, whose names go without the prefix.
    bare = not any(name.startswith(prefix) for name in files.stored)
    names = {tensor.name: tensor.name.removeprefix(prefix) if bare else tensor.name for tensor in tensors}
    problems = []
    for tensor in tensors:
        name = names[tensor.name]
        stored = files.stored.get(name)
        if stored is None:
            problems.append(f"missing: {name} {list(tensor.hf_shape)}")
        elif stored.shape != tensor.hf_shape:
            problems.append(f"misshapen: {name} {list(stored.shape)}, expected {list(tensor.hf_shape)}")
        elif not stored.is_float:
            problems.append(f"of a dtype that is not read: {name} {stored.dtype}, expected F32, BF16 or F16")
    surplus = files.stored.keys() - set(names.values())
    if config.tied_embeddings and HEAD_NAME in surplus and names[tensors[0].name] in files.stored:
        surplus.remove(HEAD_NAME)
        # The first tensor is the embedding.
        if not np.array_equal(files.read(HEAD_NAME), files.read(names[tensors[0].name])):
            problems.append(
                f"surplus: {HEAD_NAME} differs from the embedding, and tie_word_embeddings says they are one"
            )
    problems += [
        f"surplus: {name} {list(files.stored[name].shape)}" for name in sorted(surplus) if not is_ignored(name)
    ]
    if problems:
        raise ValueError(
            f"{folder}: {len(problems)} tensors: the files hold exactly what config.json describes "
            f"({config.family}, {config.num_layers} layers); mend the files, or the sizes in config.json and in "
            "model.overrides:\n  " + "\n  ".join(problems)
        )
    return names


@dataclass(frozen=True)
class ModelCard:
    """What the README of an exported model says beyond its sizes."""

    name: str
    base_model: str | None
    """The checkpoint that training started from, as a hub id; None for random weights."""
    how: str
    """How the model was made, in Markdown."""


def export_hf(
    folder: Path,
    config: TransformerConfig,
    params: Mapping[str, Any],
    *,
    param_scan_axis: int,
    dtype: str,
    max_shard_bytes: int,
    tokenizer_source: Path | None,
    generation: Mapping[str, Any],
    card: ModelCard,
) -> None:
    """Writes a folder that transformers, vLLM and others open.

    Args:
        folder: where to write; it must not exist, or be empty.
        config: the architecture.
        params: arrays in Linen's naming, scanned or not; whole on this process.
        param_scan_axis: where the layer axis stands in a scanned tree.
        dtype: of the files: float32, bfloat16 or float16.
        max_shard_bytes: size that a file is kept under.
        tokenizer_source: a folder whose tokenizer files and chat templates are copied; None copies none.
        generation: content of generation_config.json; its token ids go into config.json too.
        card: for README.md.

    Raises:
        ValueError: the folder is taken, the family's format has no way to say the configuration, parameters that do not
            fit it, values that are not finite, or no tokenizer at `tokenizer_source`.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: an export needs a folder of its own, and this one has files; choose another")
    token_ids = {name: generation[name] for name in _TOKEN_IDS if name in generation}
    config_json = config_to_hf(config, dtype=dtype, token_ids=token_ids)
    stacked = "layers" in params["decoder"]
    leaves = _fitting_leaves(config, params, stacked=stacked, param_scan_axis=param_scan_axis)
    tokenizer_files = [] if tokenizer_source is None else _tokenizer_files(tokenizer_source)

    def values_of(tensor: Tensor) -> Callable[[], np.ndarray]:
        leaf = leaves[_tree_path(tensor, stacked)]
        return lambda: tensor.to_hf(
            np.asarray(leaf_view(leaf, tensor, stacked=stacked, param_scan_axis=param_scan_axis))
        )

    outgoing = [
        OutgoingTensor(tensor.name, tensor.hf_shape, values_of(tensor)) for tensor in checkpoint_tensors(config)
    ]
    with _appearing_whole(folder) as place:
        write_tensors(place, outgoing, dtype=dtype, max_shard_bytes=max_shard_bytes)
        _write_json(place / CONFIG_FILE, config_json)
        _write_json(place / "generation_config.json", generation)
        (place / "README.md").write_text(_readme(config, dtype, card, has_tokenizer=bool(tokenizer_files)))
        for file in tokenizer_files:
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, place / file.name)


def _fitting_leaves(
    config: TransformerConfig, params: Mapping[str, Any], *, stacked: bool, param_scan_axis: int
) -> dict[tuple[str, ...], Any]:
    """The leaves by path, once they are known to be what the configuration describes."""
    specs = dict(flatten(param_specs(config, scan_layers=stacked, param_scan_axis=param_scan_axis)))
    leaves = dict(flatten(params))
    problems = [f"missing: {'/'.join(path)} {list(specs[path].shape)}" for path in specs if path not in leaves]
    for path, leaf in leaves.items():
        if path not in specs:
            problems.append(f"surplus: {'/'.join(path)} {list(leaf.shape)}")
        elif tuple(leaf.shape) != specs[path].shape:
            problems.append(f"misshapen: {'/'.join(path)} {list(leaf.shape)}, expected {list(specs[path].shape)}")
    if problems:
        raise ValueError(
            f"export: {len(problems)} parameters: a tree holds exactly what the model's configuration describes "
            f"({config.family}, {config.num_layers} layers); export with the configuration of the checkpoint:\n  "
            + "\n  ".join(problems)
        )
    return leaves


def _tokenizer_files(source: Path) -> list[Path]:
    """What of a tokenizer's folder is copied."""
    found = [source / name for name in (*TOKENIZER_FILES, TEMPLATES_FOLDER) if (source / name).exists()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in found):
        raise ValueError(
            f"{source}: a tokenizer is tokenizer.json, tokenizer.model, or vocab.json with merges.txt, and none is "
            "here; name the tokenizer's folder, or none"
        )
    return found


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name only when all went well."""
    place = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        place.replace(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _readme(config: TransformerConfig, dtype: str, card: ModelCard, *, has_tokenizer: bool) -> str:
    """The model card: metadata that the hub reads, then prose."""
    spelling = SPELLINGS[config.family]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata["tags"] = ["posttrain", spelling.model_type]
    if card.base_model is not None:
        metadata["base_model"] = card.base_model
    rows = {
        "Architecture": f"{config.family} ({spelling.architecture})",
        "Parameters": f"{count_params(config):,}",
        "Weights": dtype,
        "Layers": config.num_layers,
        "Width": f"{config.embed_dim:,}, feed-forward {config.mlp_dim:,}",
        "Heads": f"{config.num_heads} queries, {config.num_kv_heads} keys and values, {config.head_dim} wide",
        "Vocabulary": f"{config.vocab_size:,}",
        "Longest sequence": f"{config.max_position:,} tokens",
        "Started from": card.base_model or "random weights",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n' if has_tokenizer else ""
    names = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    return (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n# {card.name}\n\n|  |  |\n|---|---|\n{table}\n\n"
        f"## How it was made\n\n{card.how}\n\n## Use\n\n```python\nfrom transformers import {names}\n\n{tokenizer}"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n```\n'
    )
