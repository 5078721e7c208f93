"""Adapters as PEFT's folder: adapter_config.json and adapter_model.safetensors, which transformers and vLLM open.

PEFT keeps torch's order of axes: `lora_A.weight` is [rank, inputs] and `lora_B.weight` [outputs, rank], under the name
of the layer that they adapt.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from models.checkpoints.hf_names import Tensor, checkpoint_tensors
from models.config import TransformerConfig
from models.lora import Layout, adapted_modules, num_inputs
from models.parameters import flatten
from recipes.sections.alignment import LoraSection

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def export_peft(
    folder: Path,
    config: TransformerConfig,
    pairs: dict[str, Any],
    adapters: LoraSection,
    layout: Layout,
    *,
    base_model: str | None,
) -> None:
    """Writes adapters into an empty folder.

    Args:
        folder: it exists.
        config: of the base.
        pairs: the adapters' leaves in Linen's naming.
        adapters: their rank, alpha and modules.
        layout: where layers stand.
        base_model: folder or hub id of the base in Hugging Face's format; None where it has none.

    Raises:
        ValueError: values that are not finite, by adapter.
    """
    leaves = dict(flatten(pairs))
    modules = adapted_modules(config, adapters)
    kernels = [tensor for tensor in checkpoint_tensors(config) if tensor.path[-1] == "kernel"]
    weights: dict[str, np.ndarray] = {}
    for tensor in kernels:
        module = tensor.path[:-1]
        if tensor.layer is None or module not in modules:
            continue
        name = _PREFIX + tensor.name.removesuffix(".weight")
        lora_a, lora_b = (_one_layer(leaves, tensor.layer, (*module, leaf), layout) for leaf in ("lora_a", "lora_b"))
        inputs = int(np.prod(tensor.shape[: num_inputs(module)]))
        weights[f"{name}.lora_A.weight"] = np.ascontiguousarray(lora_a.reshape(inputs, adapters.rank).T)
        weights[f"{name}.lora_B.weight"] = np.ascontiguousarray(lora_b.reshape(adapters.rank, -1).T)
    bad = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"export: {', '.join(bad)}: not finite, and such an adapter gives no text; use another step")
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha.is_integer() else adapters.alpha,
        "target_modules": _targets(kernels, modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt3",
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _one_layer(leaves: dict[tuple[str, ...], Any], layer: int, inner: tuple[str, ...], layout: Layout) -> np.ndarray:
    """One layer's part of an adapter, in float32."""
    if not layout.scan_layers:
        return np.asarray(leaves["decoder", f"layers_{layer}", *inner], np.float32)
    leaf = np.asarray(leaves["decoder", "layers", *inner], np.float32)
    return np.take(leaf, layer, axis=min(layout.param_scan_axis, leaf.ndim - 1))


def _targets(kernels: list[Tensor], modules: list[tuple[str, ...]]) -> list[str]:
    """The adapted layers' names as PEFT looks for them: the last part, or two where one is not enough (GPT-2)."""
    first = [tensor for tensor in kernels if tensor.layer == 0]
    names = {tensor.path[:-1]: tensor.name.removesuffix(".weight").split(".") for tensor in first}
    uses = Counter(parts[-1] for parts in names.values())
    return sorted(".".join(names[module][-1 if uses[names[module][-1]] == 1 else -2 :]) for module in modules)
