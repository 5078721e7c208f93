"""A Hugging Face folder's logits in NumPy float64, by its own config.json and tensor names.

This is the second opinion of `convert --verify`: it shares nothing with the importer, the exporter or our models but
the reading of files, so a mistake that import and export make alike (a transposed square kernel, say) is seen all the
same. It reads one tensor at a time and keeps no cache, which suits a few prompts of any model.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from models.checkpoints.hf_config import CONFIG_FILE, read_json
from models.checkpoints.hf_files import TensorFiles, open_tensors

Read = Callable[[str], np.ndarray]
# What transformers takes where config.json says nothing.
_ABSENT: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10_000.0,
    "max_window_layers": 28,
}
_TIED_WHEN_ABSENT = ("gemma2", "gpt2")


def reference_logits(
    folder: Path,
    tokens: Int[np.ndarray, "B T"],
    positions: Int[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
) -> Float[np.ndarray, "B T V"]:
    """Computes the logits that the folder's files describe.

    Args:
        folder: a local checkpoint of one of the six architectures that the project writes.
        tokens: ids.
        positions: of each token in its document.
        segment_ids: the document of each token, 0 for padding, where the result means nothing.

    Raises:
        ValueError: a file or a tensor is missing.
    """
    values = {**_ABSENT, **read_json(folder / CONFIG_FILE)}
    with open_tensors(folder) as files:
        run = _gpt2 if values["model_type"] == "gpt2" else _llama_like
        return run(values, _reader(folder, files), tokens, positions, _Masks(segment_ids))


def _reader(folder: Path, files: TensorFiles) -> Read:
    def read(name: str) -> np.ndarray:
        bare = name.removeprefix("transformer.").removeprefix("model.")
        found = name if name in files.stored else bare
        if found not in files.stored:
            raise ValueError(f"{folder}: {name}: the tensor is missing, and config.json asks for it; mend the files")
        return files.read(found).astype(np.float64)

    return read


class _Masks:
    """Which key each query sees."""

    def __init__(self, segment_ids: Int[np.ndarray, "B T"]) -> None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        index = np.arange(segment_ids.shape[1])
        self._distance = index[:, None] - index[None, :]
        self._visible = same & (self._distance >= 0)

    def window(self, size: int | None) -> Bool[np.ndarray, "B T T"]:
        """Causal, within a document, and at most `size` tokens back, the query's own included."""
        return self._visible if size is None else self._visible & (self._distance < size)


def _llama_like(values: Mapping[str, Any], read: Read, tokens: Any, positions: Any, masks: _Masks) -> np.ndarray:
    """Llama, Mistral, Qwen 2, Qwen 3 and Gemma 2."""
    kind = values["model_type"]
    gemma = kind == "gemma2"
    width, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = values.get("head_dim") or width // heads
    angles = positions[..., None] * _frequencies(values, head_dim)
    scale = values["query_pre_attn_scalar"] ** -0.5 if gemma else head_dim**-0.5
    cap = values["attn_logit_softcapping"] if gemma else None
    act = _ACTIVATIONS[values["hidden_activation" if gemma else "hidden_act"]]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        weight = read(f"{name}.weight") + (1.0 if gemma else 0.0)
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + values["rms_norm_eps"]) * weight

    def linear(x: np.ndarray, name: str, bias: bool) -> np.ndarray:
        product = x @ read(f"{name}.weight").T
        return product + read(f"{name}.bias") if bias else product

    qkv_bias = kind == "qwen2" or bool(values.get("attention_bias"))
    out_bias = kind != "qwen2" and bool(values.get("attention_bias"))
    mlp_bias = bool(values.get("mlp_bias"))

    def attention(x: np.ndarray, index: int) -> np.ndarray:
        name = f"model.layers.{index}.self_attn"
        projected: dict[str, np.ndarray] = {}
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            split = linear(x, f"{name}.{part}_proj", qkv_bias).reshape(*x.shape[:2], count, head_dim)
            if kind == "qwen3" and part != "v":
                split = norm(split, f"{name}.{part}_norm")
            projected[part] = _rotate(split, angles) if part != "v" else split
        visible = masks.window(_window(values, index))
        mixed = _attend(projected["q"], projected["k"], projected["v"], visible, scale=scale, cap=cap)
        return linear(mixed, f"{name}.o_proj", out_bias)

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (linear(x, f"{name}.{part}_proj", mlp_bias) for part in ("gate", "up"))
        return linear(act(gate) * up, f"{name}.down_proj", mlp_bias)

    table = read("model.embed_tokens.weight")
    x = table[tokens] * (width**0.5 if gemma else 1.0)
    for index in range(values["num_hidden_layers"]):
        name = f"model.layers.{index}"
        mixed = attention(norm(x, f"{name}.input_layernorm"), index)
        x = x + (norm(mixed, f"{name}.post_attention_layernorm") if gemma else mixed)
        before = f"{name}.pre_feedforward_layernorm" if gemma else f"{name}.post_attention_layernorm"
        fed = mlp(norm(x, before), f"{name}.mlp")
        x = x + (norm(fed, f"{name}.post_feedforward_layernorm") if gemma else fed)
    head = table if _is_tied(values) else read("lm_head.weight")
    logits = norm(x, "model.norm") @ head.T
    return _cap(logits, values["final_logit_softcapping"]) if gemma else logits


def _gpt2(values: Mapping[str, Any], read: Read, tokens: Any, positions: Any, masks: _Masks) -> np.ndarray:
    heads = values["n_head"]
    act = _ACTIVATIONS[values["activation_function"]]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        normed = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + values["layer_norm_epsilon"])
        return normed * read(f"{name}.weight") + read(f"{name}.bias")

    def conv1d(x: np.ndarray, name: str) -> np.ndarray:
        return x @ read(f"{name}.weight") + read(f"{name}.bias")

    table = read("transformer.wte.weight")
    x = table[tokens] + read("transformer.wpe.weight")[positions]
    for index in range(values["n_layer"]):
        name = f"transformer.h.{index}"
        merged = conv1d(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        query, key, value = (part.reshape(*x.shape[:2], heads, -1) for part in np.split(merged, 3, axis=-1))
        scale = query.shape[-1] ** -0.5
        x = x + conv1d(_attend(query, key, value, masks.window(None), scale=scale, cap=None), f"{name}.attn.c_proj")
        x = x + conv1d(act(conv1d(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
    head = table if _is_tied(values) else read("lm_head.weight")
    return norm(x, "transformer.ln_f") @ head.T


def _is_tied(values: Mapping[str, Any]) -> bool:
    return bool(values.get("tie_word_embeddings", values["model_type"] in _TIED_WHEN_ABSENT))


def _frequencies(values: Mapping[str, Any], head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians a token: theta^(-2i/N), and Llama 3.1's scaling of them (The Llama 3 Herd of Models)."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta = rope.get("rope_theta", values["rope_theta"])
    # In float32 as transformers has them: at large positions the rounding of a frequency shows.
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.get("rope_type", rope.get("type", "default")) != "llama3":
        return frequencies.astype(np.float64)
    original = values.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = original * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float64)


def _window(values: Mapping[str, Any], index: int) -> int | None:
    kind, size = values["model_type"], values.get("sliding_window", 4096)
    if kind == "llama":
        return None
    if kind == "mistral":
        return size
    types = values.get("layer_types")
    if types is not None:
        return size if types[index] == "sliding_attention" else None
    if kind == "gemma2":
        return size if index % 2 == 0 else None
    return size if values.get("use_sliding_window") and index >= values["max_window_layers"] else None


def _rotate(x: Float[np.ndarray, "B T H N"], angles: Float[np.ndarray, "B T half"]) -> Float[np.ndarray, "B T H N"]:
    both = np.concatenate([angles, angles], axis=-1)[:, :, None, :]
    half = x.shape[-1] // 2
    return x * np.cos(both) + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * np.sin(both)


def _attend(
    query: Float[np.ndarray, "B T H N"],
    key: Float[np.ndarray, "B T K N"],
    value: Float[np.ndarray, "B T K N"],
    visible: Bool[np.ndarray, "B T T"],
    *,
    scale: float,
    cap: float | None,
) -> Float[np.ndarray, "B T HN"]:
    groups = query.shape[2] // key.shape[2]
    key, value = (np.repeat(part, groups, axis=2) for part in (key, value))
    scores = np.einsum("bthn,bshn->bhts", query, key) * scale
    scores = np.where(visible[:, None], _cap(scores, cap), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshn->bthn", weights, value).reshape(*query.shape[:2], -1)


def _cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": lambda x: 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
