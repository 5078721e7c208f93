"""Random transformers checkpoints, small and in two sizes for each family, that several test files read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

EVEN = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# The width is a multiple of the heads only because transformers asks for it; heads x head_dim is another number.
ODD = {
    **EVEN,
    "vocab_size": 517,
    "hidden_size": 60,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "rms_norm_eps": 1e-6,
}
# In tokens: with head_dim 24 one wavelength is below 32/4 (kept), two lie between (blended), the rest is above 32.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Family and size to the class of transformers' configuration and its arguments. Between the two sizes each family shows
# its variants: tied and untied heads, windows on and off, biases, scaled rotation.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-even": ("LlamaConfig", {**EVEN, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-odd": (
        "LlamaConfig",
        {
            **ODD,
            "rope_parameters": LLAMA3_SCALING,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral-even": ("MistralConfig", {**EVEN, "sliding_window": 5}),
    "mistral-odd": (
        "MistralConfig",
        {**ODD, "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2-even": ("Qwen2Config", {**EVEN, "tie_word_embeddings": True}),
    "qwen2-odd": (
        "Qwen2Config",
        {**ODD, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3-even": ("Qwen3Config", {**EVEN, "tie_word_embeddings": True}),
    "qwen3-odd": ("Qwen3Config", {**ODD, "attention_bias": True}),
    # Caps this low bend every product, and three layers end on a sliding one.
    "gemma2-even": (
        "Gemma2Config",
        {
            **EVEN,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2-odd": (
        "Gemma2Config",
        {
            **ODD,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2-even": ("GPT2Config", {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2-odd": (
        "GPT2Config",
        {
            "vocab_size": 517,
            "n_embd": 60,
            "n_layer": 3,
            "n_head": 6,
            "n_inner": 200,
            "n_positions": 40,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
}


@dataclass(frozen=True)
class Reference:
    """A transformers model in evaluation mode, float32, and the folder it was saved in."""

    model: Any
    folder: Path


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """`reference("llama-even")`: a random checkpoint of that case, made once a session."""
    made: dict[str, Reference] = {}

    def make(case: str) -> Reference:
        if case not in made:
            model = _random_model(case)
            folder = tmp_path_factory.mktemp(case)
            model.save_pretrained(folder)
            made[case] = Reference(model, folder)
        return made[case]

    return make


def _random_model(case: str) -> Any:
    """Every tensor is random, so that no norm is one and no bias is zero."""
    import torch
    import transformers

    name, arguments = CASES[case]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, name)(**arguments, **ids)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(draw * 0.15)
            else:
                # Norms stay near their initial one (Gemma's zero), biases near zero.
                parameter.add_(draw * 0.3)
    return model
