"""The architecture of a decoder-only transformer as data: one frozen class, presets in YAML, no JAX."""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

Family = Literal["gpt3", "llama", "mistral", "qwen2", "qwen3", "gemma2"]
AttentionKind = Literal["full", "sliding"]


class RopeScaling(BaseModel):
    """Llama 3.1's rotary frequency scaling (the Llama 3 herd of models, section 3.2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    factor: PositiveFloat
    """Divides the frequencies of wavelengths longer than `original_max_position / low_freq_factor`."""
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor}: wavelengths between the two factors are blended, so it is "
                f"above low_freq_factor={self.low_freq_factor}; raise it"
            )
        return self


class TransformerConfig(BaseModel):
    """Everything that decides the function a decoder computes, and the shapes of its parameters.

    How it is computed (framework, scan, remat, dtypes, dropout, quantisation) is the recipe's `model` section.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family
    """Names the Hugging Face architecture and the vocabulary of the parameter tree."""
    vocab_size: PositiveInt
    embed_dim: PositiveInt
    mlp_dim: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    max_position: PositiveInt
    """Longest sequence in tokens; the number of rows of a learned position table."""
    position: Literal["rope", "learned"] = "rope"
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: PositiveFloat = 1e-5
    norm_scale_plus_one: bool = False
    """The stored scale is the weight minus one, so zeros mean identity (Gemma, gpt3)."""
    sandwich_norms: bool = False
    """Normalise the output of attention and MLP too, before the residual sum (Gemma 2)."""
    qk_norm: bool = False
    """RMS-normalise each query and key head before rotation (Qwen 3)."""
    fused_qkv: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    scale_embeddings: bool = False
    """Multiply token embeddings by sqrt(embed_dim) (Gemma)."""
    query_scale: PositiveFloat | None = None
    """Factor on query-key products; None is head_dim ** -0.5."""
    attention_softcap: PositiveFloat | None = None
    logits_softcap: PositiveFloat | None = None
    sliding_window: PositiveInt | None = None
    """Tokens a sliding layer sees, itself included."""
    attention_pattern: tuple[AttentionKind, ...] = ("full",)
    """Kinds of attention, cycled over the layers."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: query heads share key-value heads evenly, and num_kv_heads="
                f"{self.num_kv_heads} does not divide it; choose a divisor"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary embedding turns pairs; choose an even head_dim")
        if "sliding" in self.attention_pattern and self.sliding_window is None:
            raise ValueError("sliding_window=None: attention_pattern has sliding layers; set sliding_window in tokens")
        if not self.attention_pattern:
            raise ValueError("attention_pattern=(): every layer needs a kind; use ('full',)")
        if self.fused_qkv and self.num_heads != self.num_kv_heads:
            raise ValueError("fused_qkv=True: a fused projection needs num_kv_heads == num_heads; unfuse or equalise")
        return self

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products, dimensionless."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def layer_windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer in tokens, None where a layer sees its whole past."""
        kinds = (self.attention_pattern[i % len(self.attention_pattern)] for i in range(self.num_layers))
        return tuple(self.sliding_window if kind == "sliding" else None for kind in kinds)

    def replace(self, **changes: Any) -> "TransformerConfig":
        """A copy with fields changed and validated again; unknown fields are named with the nearest."""
        return build_config({**self.model_dump(), **changes}, where="model.overrides")


def build_config(fields: Mapping[str, Any], *, where: str) -> TransformerConfig:
    """Validates `fields` into a config.

    Args:
        fields: names and values of `TransformerConfig`.
        where: what to blame in an error, e.g. a file.

    Raises:
        ValueError: one line for each wrong field, in the form "where: field=value: rule; remedy".
    """
    known = TransformerConfig.model_fields
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known fields are {', '.join(known)}"
            raise ValueError(f"{where}: {name}: unknown field of the model's configuration; {hint}")
    try:
        return TransformerConfig(**fields)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {name}={problem['input']!r}: {message}" if name else f"{where}: {message}")
        raise ValueError("\n".join(lines)) from None


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    folder = resources.files("models") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_preset(name: str) -> TransformerConfig:
    """Reads a shipped preset.

    Raises:
        ValueError: if there is no preset of that name; the nearest is named.
    """
    names = preset_names()
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"presets are {', '.join(names)}"
        raise ValueError(f"model.preset={name}: no such preset; {hint}")
    text = (resources.files("models") / "presets" / f"{name}.yaml").read_text()
    return build_config(yaml.safe_load(text), where=f"models/presets/{name}.yaml")
