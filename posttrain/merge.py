"""Adapters of a run, joined with the base that they were trained on, or written for PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.adapters import AdapterCheckpoint, read_adapters, require_base
from models.checkpoints.contents import find_origin
from models.checkpoints.convert import MAX_SHARD_BYTES, appearing_whole
from models.checkpoints.hf_adapters import export_peft
from models.checkpoints.hf_config import CONFIG_FILE
from models.checkpoints.huggingface import ModelCard, export_hf
from models.checkpoints.loader import Placement
from models.checkpoints.manifest import EVERYTHING, hash_files
from models.functional import FunctionalModel, Params
from models.lora import join, merged, quantize_base
from models.mesh import make_mesh
from models.sharding import DEFAULT_RULES
from models.tokenizer import generation_ids, load_tokenizer
from pretrain.start import role_params
from recipes.schema import MeshSection, ModelSection, TokenizerSection


def merge(
    run: Path,
    destination: Path,
    *,
    to: str,
    base: Path | None,
    from_step: int | None,
    dtype: str | None,
    tokenizer: Path | None,
) -> Path:
    """Writes what a run of adapters has learnt as a folder that others open.

    Args:
        run: a run, its checkpoints, or a step.
        destination: a folder that does not exist, or is empty.
        to: hf (the merged model) or peft (the adapters alone).
        base: where the base lies now; None is where it lay in training. It is checked either way.
        from_step: which step; None is the newest.
        dtype: of a merged model's files; None is the base's.
        tokenizer: a folder whose tokenizer goes into a merged model's; None is a Hugging Face base's own.

    Returns:
        The step's folder that was read.

    Raises:
        ValueError: there are no adapters in `run`, the base is another than theirs, or the destination is taken.
    """
    origin = find_origin(run, from_step=from_step)
    if origin.kind != "ours":
        raise ValueError(f"{run}: holds no adapters: a run with lora.rank holds them; name one")
    stored = read_adapters(origin.folder)
    if base is not None:
        source: Any = "huggingface" if (base / CONFIG_FILE).is_file() else "checkpoint"
        stored = replace(stored, base=replace(stored.base, source=source, path=str(base)))
    if to == "peft":
        named = stored.base.path if stored.base.source == "huggingface" else None
        with appearing_whole(destination) as place:
            export_peft(place, stored.config, stored.pairs, stored.adapters, stored.layout, base_model=named)
        return origin.folder
    params = merged_params(stored, origin.folder)
    if tokenizer is None and stored.base.source == "huggingface" and stored.base.path is not None:
        beside = Path(stored.base.path).expanduser()
        tokenizer = beside if (beside / "tokenizer_config.json").is_file() else None
    card = ModelCard(
        name=destination.name,
        base_model=stored.base.path if stored.base.source == "huggingface" else None,
        how=f"Low-rank adapters of {stored.info.step} steps, merged by `posttrain merge`.",
    )
    with appearing_whole(destination) as place:
        export_hf(
            place,
            stored.config,
            jax.device_get(params),
            param_scan_axis=stored.layout.param_scan_axis,
            dtype=stored.base.dtype if dtype is None else dtype,
            max_shard_bytes=MAX_SHARD_BYTES,
            tokenizer_source=tokenizer,
            generation=_token_ids(tokenizer),
            card=card,
        )
        hash_files(place, share=EVERYTHING)
    return origin.folder


def merged_params(stored: AdapterCheckpoint, step_dir: Path) -> Params:
    """The plain model that a run's adapters and base compute together, on one device.

    A base that rested quantised is merged as the adapters knew it, rounding included.

    Raises:
        ValueError: the base is not there, or not the one that the adapters were trained on.
    """
    info, base, adapters = stored.info, stored.base, stored.adapters
    options = ModelSection(
        framework=info.framework,
        scan_layers=info.scan_layers,
        param_scan_axis=info.param_scan_axis,
        param_dtype=base.dtype,  # type: ignore[arg-type]
        hf_path=base.path if base.source == "huggingface" else None,
        load_parameters_path=base.path if base.source == "checkpoint" else None,
    )
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    plain = FunctionalModel(stored.config, options)
    whole = role_params(options, plain, placement, verify="full", seed=info.rng.seed)
    resting = quantize_base(whole, stored.config, adapters, stored.layout)
    require_base(resting, info, step_dir)
    pairs = jax.device_put(stored.pairs, jax.tree.leaves(resting)[0].sharding)
    return merged(join(resting, pairs), adapters, stored.layout, dtype=base.dtype)


def _token_ids(tokenizer: Path | None) -> dict[str, int | list[int]]:
    """The content of generation_config.json: the tokenizer's own ids."""
    return {} if tokenizer is None else generation_ids(load_tokenizer(TokenizerSection(path=str(tokenizer))))
