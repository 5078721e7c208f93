"""`--verify`: it passes what is right, by every route, and catches each planted fault.

Faults are planted in the destination's files, or in the code that import and export share, where only NumPy's route
sees them. Measured: right conversions differ by at most 7e-6, and the least of the faults (a lost soft cap) by 0.16.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.checkpoints import hf_names, maxtext
from models.checkpoints.contents import Contents
from models.checkpoints.convert import Converted, Target, convert, write_ours
from models.checkpoints.hf_reference import reference_logits
from models.checkpoints.restack import Layout
from models.checkpoints.verify import fixed_prompts, verify
from models.config import TransformerConfig, load_preset
from models.parameters import flatten, param_specs, unflatten

FAMILIES = ("gpt3", "llama", "mistral", "qwen2", "qwen3", "gemma2")


def target(format: str, **changes: Any) -> Target:
    return Target(**({"format": format, "scan_layers": None, "dtype": None, "params_only": False} | changes))


def config_of(family: str, *, tied: bool = True, **changes: Any) -> TransformerConfig:
    """Square projections and as many key heads as query heads, so that no fault shows in a shape."""
    preset = {"gemma2": "tiny-gemma2", "qwen3": "tiny-qwen3", "gpt3": "gpt3-52k"}.get(family, "tiny-llama")
    sizes: dict[str, Any] = {"embed_dim": 32, "mlp_dim": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    sizes |= {"vocab_size": 48, "num_layers": 2, "max_position": 64, "tied_embeddings": tied}
    if family in ("mistral", "qwen2"):
        sizes |= {"family": family, "qkv_bias": family == "qwen2"}
    if family == "mistral":
        sizes |= {"sliding_window": 5, "attention_pattern": ("sliding",)}
    return load_preset(preset).replace(**sizes, **changes)


def contents_of(config: TransformerConfig) -> Contents:
    """Random parameters of every kind, none like another."""
    generator = np.random.default_rng(0)
    specs = flatten(param_specs(config, scan_layers=True, param_scan_axis=1))

    def draw(path: tuple[str, ...], spec: Any) -> np.ndarray:
        centre = 1.0 if path[-1] == "scale" and not config.norm_scale_plus_one else 0.0
        return (centre + generator.normal(size=spec.shape) * 0.25).astype(np.float32)

    params = unflatten({path: draw(path, spec) for path, spec in specs})
    return Contents(config, params, None, np.int32(0), Layout(True, 1), None)


@pytest.fixture
def source(tmp_path: Path) -> Callable[[TransformerConfig], Path]:
    """`source(config)`: a checkpoint of ours with random parameters."""

    def make(config: TransformerConfig) -> Path:
        write_ours(tmp_path / "source", contents_of(config), framework="linen", origin="ours")
        return tmp_path / "source"

    return make


def run(source: Path, destination: Path, to: Target, config: TransformerConfig | None = None) -> Converted:
    return convert(source, destination, to, config=config, from_step=None)


# --- what is right passes ---


@pytest.mark.parametrize("family", FAMILIES)
def test_right_conversions_pass_by_every_route(source: Any, tmp_path: Path, family: str) -> None:
    path = source(config_of(family, tied=family != "llama"))
    nnx = verify(run(path, tmp_path / "nnx", target("nnx", scan_layers=False)), tolerance=None)
    hf = verify(run(path, tmp_path / "hf", target("hf")), tolerance=None)
    maxtext = verify(run(path, tmp_path / "maxtext", target("maxtext")), tolerance=None)
    back = verify(run(tmp_path / "hf", tmp_path / "back", target("linen")), tolerance=None)
    assert set(hf.differences) == {"our model on the folder", "NumPy on the folder"}
    for verdict in (nnx, hf, maxtext, back):
        # Far inside the tolerance, so that this is no matter of luck.
        assert verdict.passes and verdict.max_difference < verdict.tolerance / 5, verdict


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounding_that_was_asked_for_is_no_difference(source: Any, tmp_path: Path, dtype: str) -> None:
    path = source(config_of("llama"))
    for to in ("nnx", "hf", "maxtext"):
        verdict = verify(run(path, tmp_path / to, target(to, dtype=dtype)), tolerance=None)
        # head_dim 16: MaxText's factor 4 costs nothing in 16 bits either.
        assert verdict.passes and verdict.max_difference < 1e-3, (to, verdict)


@pytest.mark.parity
@pytest.mark.parametrize(
    "case",
    [
        f"{family}-{size}"
        for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")
        for size in ("even", "odd")
    ],
)
def test_the_numpy_reference_is_transformers(reference: Callable[[str], Any], case: str) -> None:
    """The second opinion is itself held against transformers, document by document, to 1e-4 of float32 logits."""
    import torch

    found = reference(case)
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 160, (2, 24))
    positions = np.tile(np.arange(24), (2, 1))
    with torch.no_grad():
        expected = found.model(torch.tensor(tokens), use_cache=False).logits.numpy()
    logits = reference_logits(found.folder, tokens, positions, np.ones_like(tokens))
    assert np.abs(logits - expected).max() < 1e-4


def test_prompts_are_fixed_and_hold_packing_padding_and_far_positions() -> None:
    one, other = (fixed_prompts(load_preset("tiny-llama")) for _ in range(2))
    assert np.array_equal(one.tokens, other.tokens)
    assert set(one.segment_ids[0]) == {0, 1, 2} and one.segment_ids[0, -1] == 0 and one.segment_ids[1, 0] == 0
    assert one.positions[2, -1] == 511 and fixed_prompts(load_preset("llama3.1-8b")).positions.max() == 2047


# --- faults in a Hugging Face folder ---


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def transpose(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"].T}))


def swap_query_and_key(folder: Path) -> None:
    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{Q}.weight"], tensors[f"{K}.weight"] = tensors[f"{K}.weight"], tensors[f"{Q}.weight"]

    edit_tensors(folder, swap)


def leave_rotary_unpermuted(folder: Path) -> None:
    """Heads in the order of neighbouring pairs, as Meta's own files and MaxText's Llama 3.1 have them."""
    order = np.arange(16).reshape(2, 8).T.reshape(-1)

    def permute(tensors: dict[str, np.ndarray]) -> None:
        for name in (f"{Q}.weight", f"{K}.weight"):
            tensors[name] = tensors[name].reshape(2, 16, 32)[:, order].reshape(32, 32)

    edit_tensors(folder, permute)


def drop_bias(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{Q}.bias": np.zeros_like(tensors[f"{Q}.bias"])}))


def drop_bias_and_its_tensors(folder: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith(".bias")]:
            del tensors[name]

    edit_tensors(folder, drop)
    edit_config(folder, attention_bias=False)


def untie(folder: Path) -> None:
    """A head of its own, drawn anew, where the table should serve."""
    draw = np.random.default_rng(3).normal(size=(48, 32)).astype(np.float32)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": draw}))
    edit_config(folder, tie_word_embeddings=False)


def tie(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(folder, tie_word_embeddings=True)


FAULTS: dict[str, tuple[TransformerConfig, Callable[[Path], None]]] = {
    "a transposed square matrix": (config_of("llama"), transpose),
    "swapped query and key": (config_of("llama"), swap_query_and_key),
    "a wrong rope theta": (config_of("llama"), lambda folder: edit_config(folder, rope_theta=500_000.0)),
    "unpermuted rotary": (config_of("llama"), leave_rotary_unpermuted),
    "a dropped bias": (config_of("qwen2"), drop_bias),
    "dropped biases": (config_of("llama", qkv_bias=True, out_bias=True), drop_bias_and_its_tensors),
    "an untied head": (config_of("llama"), untie),
    "a tied head": (config_of("llama", tied=False), tie),
    "a wrong window": (config_of("mistral"), lambda folder: edit_config(folder, sliding_window=4)),
    "a lost soft cap": (config_of("gemma2"), lambda folder: edit_config(folder, final_logit_softcapping=None)),
    "a wrong epsilon": (config_of("qwen3"), lambda folder: edit_config(folder, rms_norm_eps=1e-2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_in_a_hugging_face_folder_is_caught(source: Any, tmp_path: Path, fault: str) -> None:
    config, plant = FAULTS[fault]
    done = run(source(config), tmp_path / "hf", target("hf"))
    plant(done.written)
    verdict = verify(done, tolerance=None)
    assert not verdict.passes
    # By both routes, and far beyond the tolerance.
    assert all(difference > 100 * verdict.tolerance for difference in verdict.differences.values()), verdict


def test_a_missing_bias_tensor_is_named(source: Any, tmp_path: Path) -> None:
    done = run(source(config_of("qwen2")), tmp_path / "hf", target("hf"))
    edit_tensors(done.written, lambda tensors: tensors.pop(f"{Q}.bias"))
    with pytest.raises(ValueError, match=r"missing: model.layers.1.self_attn.q_proj.bias"):
        verify(done, tolerance=None)


def transposed_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square kernels are not transposed, neither on the way out nor on the way in, so import undoes export."""
    to_hf, to_ours = hf_names.Tensor.to_hf, hf_names.Tensor.to_ours
    monkeypatch.setattr(
        hf_names.Tensor,
        "to_hf",
        lambda self, value: to_hf(self, value).T if "q_proj" in self.name else to_hf(self, value),
    )
    monkeypatch.setattr(
        hf_names.Tensor, "to_ours", lambda self, value: to_ours(self, value.T if "q_proj" in self.name else value)
    )


def swapped_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of names calls queries keys and keys queries."""
    table = hf_names.TABLES["llama"]
    names = {"self_attn.q_proj.weight": "self_attn.k_proj.weight", "self_attn.k_proj.weight": "self_attn.q_proj.weight"}
    rows = tuple((names.get(name, name), path, form) for name, path, form in table.layer)
    swapped = hf_names.NameTable(table.prefix, table.layer_prefix, table.before, rows, table.after)
    monkeypatch.setitem(hf_names.TABLES, "llama", swapped)


@pytest.mark.parametrize("plant", [transposed_both_ways, swapped_both_ways])
def test_a_mistake_that_import_and_export_share_is_caught_by_numpy(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    path = source(config_of("llama"))
    plant(monkeypatch)
    verdict = verify(run(path, tmp_path / "hf", target("hf")), tolerance=None)
    assert verdict.differences["our model on the folder"] < verdict.tolerance
    assert verdict.differences["NumPy on the folder"] > 100 * verdict.tolerance and not verdict.passes


# --- faults in a checkpoint of ours, and in MaxText's ---


def kernel(params: Any, name: str) -> Any:
    return params["decoder"]["layers"]["self_attention"][name]


def transpose_ours(params: Any) -> None:
    mlp = params["decoder"]["layers"]["mlp"]["wi_0"]
    mlp["kernel"] = mlp["kernel"].transpose(2, 1, 0)


def swap_ours(params: Any) -> None:
    attention = params["decoder"]["layers"]["self_attention"]
    attention["query"], attention["key"] = attention["key"], attention["query"]


def unpermute_ours(params: Any) -> None:
    order = np.arange(16).reshape(2, 8).T.reshape(-1)
    for name in ("query", "key"):
        kernel(params, name)["kernel"] = kernel(params, name)["kernel"][..., order]


def swap_layers(params: Any) -> None:
    norm = params["decoder"]["layers"]["mlp"]["wo"]
    norm["kernel"] = norm["kernel"][:, ::-1]


def zero_bias(params: Any) -> None:
    kernel(params, "key")["bias"] = np.zeros_like(kernel(params, "key")["bias"])
    kernel(params, "value")["bias"] = np.zeros_like(kernel(params, "value")["bias"])


OURS: dict[str, tuple[TransformerConfig, dict[str, Any], Callable[[Any], None]]] = {
    "a transposed square matrix": (config_of("llama"), {}, transpose_ours),
    "swapped query and key": (config_of("llama"), {}, swap_ours),
    "a wrong rope theta": (config_of("llama"), {"rope_theta": 500_000.0}, lambda params: None),
    "unpermuted rotary": (config_of("llama"), {}, unpermute_ours),
    "a dropped bias": (config_of("qwen2"), {}, zero_bias),
    "an untied head": (
        config_of("llama"),
        {"tied_embeddings": False},
        lambda params: params["decoder"].update(
            logits_dense={"kernel": np.random.default_rng(3).normal(size=(32, 48)).astype(np.float32)}
        ),
    ),
    "swapped layers": (config_of("llama"), {}, swap_layers),
}


@pytest.mark.parametrize("fault", OURS)
def test_each_fault_in_a_checkpoint_of_ours_is_caught(source: Any, tmp_path: Path, fault: str) -> None:
    config, changes, plant = OURS[fault]
    right = run(source(config), tmp_path / "right", target("nnx"))
    wrong = contents_of(config)
    plant(wrong.params)
    contents = Contents(config.replace(**changes), wrong.params, None, np.int32(0), Layout(True, 1), None)
    written = write_ours(tmp_path / "wrong", contents, framework="nnx", origin="ours")
    verdict = verify(dataclasses.replace(right, written=written), tolerance=None)
    assert verdict.max_difference > 100 * verdict.tolerance


def test_a_query_factor_that_was_not_folded_is_caught(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(config_of("llama"))
    monkeypatch.setattr(maxtext, "leaf_to_maxtext", lambda path, leaf, kind, numerics: leaf)
    verdict = verify(run(path, tmp_path / "maxtext", target("maxtext")), tolerance=None)
    assert verdict.max_difference > 100 * verdict.tolerance


def test_a_damaged_destination_is_not_compared(source: Any, tmp_path: Path) -> None:
    done = run(source(config_of("llama")), tmp_path / "nnx", target("nnx"))
    victim = max((done.written / "items").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged and was not loaded"):
        verify(done, tolerance=None)
