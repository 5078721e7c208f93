"""Hugging Face's config.json to TransformerConfig and back; no JAX, so that a recipe is checked before JAX starts.

What a config.json may leave out is filled in as transformers fills it in, because that is what the weights were trained
with. What our models do not compute is refused by key and value, never ignored. Writing proves itself: the written dict
is read back, and a field that did not survive is an error.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoints.hf_families import ACTIVATIONS, LAYER_TYPES, SPELLINGS, Spelling
from models.checkpoints.hf_hub import config_folder
from models.config import TransformerConfig, build_config, load_preset
from recipes.schema import ModelSection
from recipes.sections.base import plain

CONFIG_FILE = "config.json"

_FAMILIES = {spelling.model_type: name for name, spelling in SPELLINGS.items()}
_LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
_ORIGINAL_LENGTH = "original_max_position_embeddings"


def resolve_config(section: ModelSection) -> TransformerConfig:
    """The architecture that a recipe's `model` section names, with its overrides.

    Raises:
        ValueError: neither preset nor hf_path, an unknown preset, an unreadable config.json, or a wrong override.
    """
    if section.preset is not None:
        config = load_preset(section.preset)
    elif section.hf_path is not None:
        config = read_config(config_folder(section.hf_path))
    else:
        raise ValueError("model.preset=None: a model has an architecture; set model.preset or model.hf_path")
    return config.replace(**plain(section.overrides)) if section.overrides else config


def read_config(folder: Path) -> TransformerConfig:
    """Reads a checkpoint folder's config.json.

    Raises:
        ValueError: no such file, no JSON, or an architecture that our models do not compute.
    """
    path = folder / CONFIG_FILE
    return config_from_hf(read_json(path), where=str(path))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        ValueError: no such file, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "name the folder of a Hugging Face checkpoint"
        raise ValueError(f"{path.parent}: {path.name}: there is no such file; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: this is no JSON ({error}); get the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__} where an object belongs; get the file again")
    return content


class _Reader:
    """Keys of one config.json; gathers everything that is wrong with them, so that one error tells all."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self.values, self.defaults, self.where, self.problems = values, defaults, where, problems

    def refuse(self, key: str, value: Any, rule: str, remedy: str) -> None:
        """Notes one problem."""
        self.problems.append(f"{self.where}: {key}={value!r}: {rule}; {remedy}")

    def get(self, key: str) -> Any:
        """The value, or what transformers takes where it is absent; None for a missing key that is required."""
        if key in self.values:
            return self.values[key]
        if key not in self.defaults:
            self.problems.append(f"{self.where}: {key}: the key is missing, and nothing else says it; add it")
            return None
        return self.defaults[key]

    def number(self, key: str, *, whole: bool, nullable: bool) -> Any:
        """A positive number, or None; 1 stands in for a wrong one until the problems are raised."""
        value = self.get(key)
        if value is None and nullable:
            return None
        kinds = int if whole else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            return value
        if key in self.values:
            kind = "positive whole number" if whole else "positive number"
            self.refuse(key, value, f"this key holds a {kind}{' or null' if nullable else ''}", "correct the file")
        return 1

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            self.refuse(key, value, "this key is true or false", "correct the file")
        return bool(value)

    def raise_problems(self) -> None:
        """Raises ValueError with one line for each problem, if there are any."""
        if self.problems:
            raise ValueError("\n".join(self.problems))


def config_from_hf(config_json: Mapping[str, Any], *, where: str) -> TransformerConfig:
    """Reads the content of a config.json.

    Args:
        config_json: the file's content, as transformers 4 or 5 writes it.
        where: what to blame in an error, e.g. the file.

    Raises:
        ValueError: an architecture, a value or a combination that our models do not compute; one line for each.
    """
    model_type = config_json.get("model_type")
    name = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if name is None:
        rule = "no model family of this project"
        raise ValueError(f"{where}: model_type={model_type!r}: {rule}; use one of {', '.join(_FAMILIES)}")
    spelling = SPELLINGS[name]
    reader = _Reader(config_json, spelling.defaults, where, [])
    _check_values(reader, spelling)
    fields: dict[str, Any] = {"family": name, **spelling.fixed, **_sizes(reader, spelling)}
    reader.raise_problems()
    if name != "gpt3":
        fields |= _rope(reader)
        fields |= _windows(reader, name, fields["num_layers"])
    if spelling.attention_bias:
        fields["qkv_bias"] = fields["out_bias"] = reader.flag("attention_bias")
    if name == "llama":
        fields["mlp_bias"] = reader.flag("mlp_bias")
    if name == "gemma2":
        fields["query_scale"] = reader.number("query_pre_attn_scalar", whole=False, nullable=False) ** -0.5
    reader.raise_problems()
    return build_config(fields, where=where)


def _check_values(reader: _Reader, spelling: Spelling) -> None:
    """Refuses what would change the mathematics or the meaning of the tensors."""
    named = reader.values.get("architectures")
    if named and (not isinstance(named, list) or spelling.architecture not in named):
        rule = f"of {spelling.model_type} only {spelling.architecture} is modelled"
        reader.refuse("architectures", named, rule, "use a causal language model's checkpoint")
    quantization = reader.values.get("quantization_config")
    if quantization is not None:
        reader.refuse(
            "quantization_config", quantization, "quantised tensors are not read", "use the unquantised checkpoint"
        )
    for key, allowed in spelling.required_values.items():
        value = reader.values.get(key)
        if value not in allowed:
            reader.refuse(key, value, f"our models compute {key}={allowed[-1]!r} alone", "use another checkpoint")


_NULLABLE = ("num_kv_heads", "head_dim", "mlp_dim", "attention_softcap", "logits_softcap")
_FRACTIONAL = ("norm_eps", "attention_softcap", "logits_softcap")


def _sizes(reader: _Reader, spelling: Spelling) -> dict[str, Any]:
    """Fields that stand in the file under a key of their own, and those that follow from them."""
    fields: dict[str, Any] = {"num_kv_heads": None, "head_dim": None}
    for field, key in spelling.keys.items():
        if field == "activation":
            value = reader.get(key)
            fields[field] = ACTIVATIONS.get(value) if isinstance(value, str) else None
            if fields[field] is None:
                known = f"the activations that our models compute are {', '.join(ACTIVATIONS)}"
                reader.refuse(key, value, known, "use another checkpoint")
        elif field == "tied_embeddings":
            fields[field] = reader.flag(key)
        else:
            fields[field] = reader.number(key, whole=field not in _FRACTIONAL, nullable=field in _NULLABLE)
    if reader.problems:
        # What follows from a wrong size would be wrong too, and would be blamed as well.
        return fields
    width, heads = fields["embed_dim"], fields["num_heads"]
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = heads
    if fields["mlp_dim"] is None:
        fields["mlp_dim"] = 4 * width
    if fields["head_dim"] is None:
        if width % heads:
            rule = f"without head_dim each of the {heads} heads gets an equal part of the width"
            reader.refuse(spelling.keys["embed_dim"], width, rule, "correct the sizes, or add head_dim")
        fields["head_dim"] = max(1, width // heads)
    return fields


def _rope(reader: _Reader) -> dict[str, Any]:
    """Rotary base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    # Where both are there, transformers lets rope_scaling win.
    key = "rope_scaling" if reader.values.get("rope_scaling") else "rope_parameters"
    rope = reader.values.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        reader.refuse(key, rope, "one set of rotary parameters serves all layers here", "use another checkpoint")
        return {}
    # The original length is the other way round: beside the rotary parameters it beats the one among them.
    beside = {_ORIGINAL_LENGTH: reader.values[_ORIGINAL_LENGTH]} if _ORIGINAL_LENGTH in reader.values else {}
    defaults = {"rope_theta": 10_000.0, _ORIGINAL_LENGTH: reader.values["max_position_embeddings"]}
    inner = _Reader({**reader.values, **rope, **beside}, defaults, reader.where, reader.problems)
    partial = inner.values.get("partial_rotary_factor")
    if partial not in (None, 1):
        reader.refuse("partial_rotary_factor", partial, "our models rotate whole heads", "use another checkpoint")
    fields: dict[str, Any] = {"rope_theta": float(inner.number("rope_theta", whole=False, nullable=False))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        scaling = {name: inner.number(name, whole=False, nullable=False) for name in _LLAMA3_FACTORS}
        original = inner.number(_ORIGINAL_LENGTH, whole=True, nullable=False)
        fields["rope_scaling"] = {**scaling, "original_max_position": original}
    elif kind != "default":
        known = "the rotary types that our models compute are default and llama3"
        reader.refuse(f"{key}.rope_type", kind, known, "use another checkpoint")
    return fields


def _windows(reader: _Reader, name: str, num_layers: int) -> dict[str, Any]:
    """The sliding window, and which layers slide."""
    if name == "llama":
        return {}
    window = reader.number("sliding_window", whole=True, nullable=True)
    if name in ("qwen2", "qwen3"):
        window = window if reader.flag("use_sliding_window") else None
        first = reader.get("max_window_layers")
        if not isinstance(first, int):
            reader.refuse("max_window_layers", first, "this key holds a number of layers", "correct the file")
            first = num_layers
        slides = [index >= first for index in range(num_layers)]
    else:
        slides = [name == "mistral" or index % 2 == 0 for index in range(num_layers)]
    kinds = ["sliding" if slide and window is not None else "full" for slide in slides]
    types = reader.values.get("layer_types")
    if types is not None:
        known = list(LAYER_TYPES)
        if not isinstance(types, list) or len(types) != num_layers or any(kind not in known for kind in types):
            rule = f"a list of {num_layers} names, one a layer, from {', '.join(LAYER_TYPES)}"
            reader.refuse("layer_types", types, rule, "correct the file")
            return {}
        listed = [LAYER_TYPES[kind] for kind in types]
        if name == "mistral" and listed != kinds:
            rule = f"transformers' mistral gives every layer the kind that sliding_window={window} says"
            reader.refuse("layer_types", types, rule, "remove the key, or correct sliding_window")
        elif "sliding" in listed and window is None:
            rule = "layers slide, and no sliding window is in force"
            reader.refuse("layer_types", types, rule, "set sliding_window (and use_sliding_window, for Qwen)")
        kinds = listed
    if "sliding" not in kinds:
        return {}
    return {"sliding_window": window, "attention_pattern": _shortest_cycle(kinds)}


def _shortest_cycle(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that gives `kinds` when it is cycled."""
    return next(
        tuple(kinds[:period])
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[index % period] for index, kind in enumerate(kinds))
    )


def config_to_hf(config: TransformerConfig, *, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 read.

    Args:
        config: the architecture.
        dtype: of the tensors beside the file.
        token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known.

    Raises:
        ValueError: the family's config.json has no way to say a field.
    """
    spelling = SPELLINGS[config.family]
    if spelling.even_width and config.embed_dim % config.num_heads:
        raise ValueError(
            f"model.embed_dim={config.embed_dim}: transformers refuses a {spelling.model_type} whose width is no "
            f"multiple of its {config.num_heads} heads; choose a multiple"
        )
    fields = config.model_dump()
    content: dict[str, Any] = {"architectures": [spelling.architecture], "model_type": spelling.model_type}
    content |= {key: fields[field] for field, key in spelling.keys.items()}
    content[spelling.keys["activation"]] = _activation_name(config, spelling)
    if spelling.attention_bias:
        content["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        content["mlp_bias"] = config.mlp_bias
    if config.family == "gemma2":
        content["query_pre_attn_scalar"] = round(config.attention_scale**-2)
    if config.family != "gpt3":
        content |= _rope_keys(config) | _window_keys(config)
    content |= {"dtype": dtype, "torch_dtype": dtype, **token_ids}
    _prove(config, content, spelling)
    return content


def _activation_name(config: TransformerConfig, spelling: Spelling) -> str:
    """Of several names for the tanh form, GPT-2 uses gelu_new and the others gelu_pytorch_tanh."""
    if config.activation == "gelu_tanh":
        return "gelu_new" if spelling.model_type == "gpt2" else "gelu_pytorch_tanh"
    return config.activation


def _rope_keys(config: TransformerConfig) -> dict[str, Any]:
    """The older spelling, which transformers 5 reads as well."""
    if config.rope_scaling is None:
        return {"rope_theta": config.rope_theta}
    scaling = config.rope_scaling.model_dump()
    scaling[_ORIGINAL_LENGTH] = scaling.pop("original_max_position")
    return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": "llama3", **scaling}}


def _window_keys(config: TransformerConfig) -> dict[str, Any]:
    """What says which layers slide; Llama's config.json has no such keys."""
    windows = config.layer_windows()
    sliding = next((window for window in windows if window is not None), None)
    if config.family == "llama":
        return {}
    if config.family == "mistral":
        return {"sliding_window": sliding}
    names = {kind: name for name, kind in LAYER_TYPES.items()}
    types = [names["full" if window is None else "sliding"] for window in windows]
    keys: dict[str, Any] = {"sliding_window": sliding, "layer_types": types}
    if config.family in ("qwen2", "qwen3"):
        keys["use_sliding_window"] = sliding is not None
        # Readers older than layer_types count the layers before the first that slides.
        keys["max_window_layers"] = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    return keys


def _prove(config: TransformerConfig, content: Mapping[str, Any], spelling: Spelling) -> None:
    """Raises unless reading `content` gives the same function of the same parameters."""
    read = config_from_hf(content, where=f"a config.json of {spelling.model_type}")
    mine, theirs = config.model_dump(), read.model_dump()
    for name in ("query_scale", "sliding_window", "attention_pattern"):
        del mine[name], theirs[name]
    # Different spellings of these three may mean the same.
    mine |= {"layer windows": config.layer_windows(), "query_scale": config.attention_scale}
    close = math.isclose(config.attention_scale, read.attention_scale, rel_tol=1e-6)
    theirs |= {
        "layer windows": read.layer_windows(),
        "query_scale": config.attention_scale if close else read.attention_scale,
    }
    problems = [
        f"model.{name}={value!r}: a config.json of {spelling.model_type} cannot say this, and whoever opens it "
        f"computes {theirs[name]!r}; train a family that has it, or change it before training"
        for name, value in mine.items()
        if value != theirs[name]
    ]
    if problems:
        raise ValueError("\n".join(problems))
