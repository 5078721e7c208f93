"""How each architecture of transformers spells a TransformerConfig in its config.json; data only, no JAX."""

from dataclasses import dataclass
from typing import Any

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}


@dataclass(frozen=True)
class Spelling:
    """One architecture's config.json."""

    model_type: str
    architecture: str
    keys: dict[str, str]
    """Field of TransformerConfig to key, for what stands in the file under a key of its own."""
    defaults: dict[str, Any]
    """What transformers takes where a key is absent; a key that is not listed here is required."""
    fixed: dict[str, Any]
    """Fields that all models of the architecture share, other than TransformerConfig's defaults."""
    required_values: dict[str, tuple[Any, ...]]
    """Keys that change the mathematics, with the values that our models compute."""
    attention_bias: bool
    """Whether a key `attention_bias` gives query, key, value and output a bias."""
    even_width: bool
    """Whether transformers wants the width to be a multiple of the heads even where head_dim is given."""


_KEYS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
}
_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

LLAMA = Spelling("llama", "LlamaForCausalLM", _KEYS, _DEFAULTS, {}, {}, attention_bias=True, even_width=True)

MISTRAL = Spelling(
    "mistral",
    "MistralForCausalLM",
    _KEYS,
    {**_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    {},
    {},
    attention_bias=False,
    even_width=False,
)

QWEN2 = Spelling(
    "qwen2",
    "Qwen2ForCausalLM",
    _KEYS,
    _QWEN_DEFAULTS,
    {"qkv_bias": True},
    {},
    attention_bias=False,
    even_width=False,
)

QWEN3 = Spelling(
    "qwen3",
    "Qwen3ForCausalLM",
    _KEYS,
    {**_QWEN_DEFAULTS, "head_dim": 128},
    {"qk_norm": True},
    {},
    attention_bias=True,
    even_width=False,
)

GEMMA2 = Spelling(
    "gemma2",
    "Gemma2ForCausalLM",
    {
        **_KEYS,
        "activation": "hidden_activation",
        "attention_softcap": "attn_logit_softcapping",
        "logits_softcap": "final_logit_softcapping",
    },
    {
        **_DEFAULTS,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    {"norm_scale_plus_one": True, "sandwich_norms": True, "scale_embeddings": True},
    {"use_bidirectional_attention": (None, False)},
    attention_bias=True,
    even_width=True,
)

GPT2 = Spelling(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocab_size": "vocab_size",
        "embed_dim": "n_embd",
        "mlp_dim": "n_inner",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_position": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
        "activation": "activation_function",
    },
    {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "activation_function": "gelu_new"},
    {
        "position": "learned",
        "gated_mlp": False,
        "norm": "layer",
        "norm_scale_plus_one": True,
        "fused_qkv": True,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    {
        "scale_attn_weights": (None, True),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "add_cross_attention": (None, False),
    },
    attention_bias=False,
    even_width=True,
)

SPELLINGS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gpt3": GPT2,
}
"""By the name of our family."""
