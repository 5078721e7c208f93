"""Checkpoints of adapters: nothing of the base in them, moments in their places; and PEFT's reading of the export."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import lora
from models.checkpoints import store
from models.checkpoints.adapters import (
    BaseInfo,
    adapter_extra,
    adapter_items,
    base_info,
    read_adapters,
    require_base,
    with_frozen_moments,
)
from models.checkpoints.hf_adapters import export_peft
from models.checkpoints.huggingface import ModelCard, export_hf, import_hf
from models.checkpoints.layouts import from_disk, optimizer_from_dict
from models.checkpoints.loader import Placement, load_params
from models.checkpoints.manager import CheckpointManager
from models.checkpoints.run_info import read_run_info
from models.config import load_preset
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, unflatten
from models.sharding import DEFAULT_RULES
from pretrain.optimizers import train_only
from recipes.schema import MeshSection, ModelSection
from recipes.sections.alignment import LoraSection
from tests.models.checkpoints import run_states

CONFIG = load_preset("tiny-llama")
ADAPTERS = LoraSection(rank=2, alpha=3.0)
LAYOUTS = [("nnx", True), ("nnx", False), ("linen", True), ("linen", False)]


def model_of(framework: Any, scan: bool) -> FunctionalModel:
    options = ModelSection(preset="tiny-llama", framework=framework, scan_layers=scan)
    return FunctionalModel(CONFIG, options, ADAPTERS)


def state_of(model: FunctionalModel) -> tuple[dict[str, Any], optax.OptState]:
    """Parameters, and moments with numbers of their own."""
    params = model.init(jax.random.key(0))
    names = frozenset("/".join(path) for path, _ in flatten(params) if lora.is_adapter(path))
    opt_state = train_only(optax.adamw(1e-3), names).init(params)
    return params, jax.tree.map(
        lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), opt_state
    )


def save(root: Path, model: FunctionalModel, **extra: Any) -> Path:
    """A checkpoint of adapters as a run writes it."""
    params, opt_state = state_of(model)
    options = model.options
    described = adapter_extra(model.adapters, base_info(options, params)) | extra
    info = run_states.run_info(
        3,
        model=CONFIG.model_dump(mode="json"),
        framework=options.framework,
        scan_layers=options.scan_layers,
        extra=described,
    )
    with CheckpointManager(root, options=run_states.OPTIONS, keep=None) as manager:
        items = adapter_items(params, opt_state, jnp.int32(3), framework=options.framework)
        manager.save(3, items, info, blocking=True)
    return root / "3"


@pytest.mark.parametrize(("framework", "scan"), LAYOUTS)
def test_a_checkpoint_holds_adapters_moments_and_step_and_gives_them_back(
    tmp_path: Path, framework: Any, scan: bool
) -> None:
    model = model_of(framework, scan)
    params, opt_state = state_of(model)
    step_dir = save(tmp_path, model)
    items = store.read_host(step_dir / "items", only=None)
    pairs, moments, step = from_disk(items)
    bookkeeping = {path for path in store.flatten(items) if not {"lora_a", "lora_b"} & set(path)}
    assert {path[-1] for path in bookkeeping} <= {"step", "count", "1", "2"}, bookkeeping
    # Three trees of adapters: weights and two moments. A base leaf, even an empty one, would be one more.
    assert len(store.flatten(items)) - len(bookkeeping) == 3 * len(list(flatten(lora.split(params)[1])))
    assert step == 3
    restored = optimizer_from_dict(opt_state, with_frozen_moments(moments, opt_state))
    assert jax.tree.structure(restored) == jax.tree.structure(opt_state)
    for found, wanted in ((restored, opt_state), (lora.join(lora.split(params)[0], pairs), params)):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    read = read_adapters(step_dir)
    assert read.adapters == ADAPTERS and read.config == CONFIG and read.layout == model.layout
    jax.tree.map(np.testing.assert_array_equal, read.pairs, lora.split(params)[1])


def test_the_checkpoint_weighs_what_the_adapters_do(tmp_path: Path) -> None:
    model = model_of("nnx", True)
    params, _ = state_of(model)
    step_dir = save(tmp_path, model)
    stored = sum(
        leaf.nbytes
        for leaf in store.flatten(store.read_host(step_dir / "items", only=None)).values()
        if leaf is not None
    )
    assert stored <= 3 * sum(leaf.nbytes for _, leaf in flatten(lora.split(params)[1])) + 16


def test_adapters_are_refused_where_a_model_is_wanted_and_the_reverse(tmp_path: Path) -> None:
    step_dir = save(tmp_path / "adapters", model_of("nnx", True))
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    plain = FunctionalModel(CONFIG, ModelSection(preset="tiny-llama"))
    with pytest.raises(ValueError, match=r"holds adapters without their base.*posttrain merge"):
        load_params(step_dir, plain, placement, verify="quick")
    whole = run_states.run_info(3, model=CONFIG.model_dump(mode="json"))
    with CheckpointManager(tmp_path / "whole", options=run_states.OPTIONS, keep=None) as manager:
        manager.save(3, run_states.state(3), whole, blocking=True)
    with pytest.raises(ValueError, match="holds a whole model and no adapters"):
        read_adapters(tmp_path / "whole" / "3")


def test_a_damaged_step_and_one_that_belies_its_run_json_are_refused(tmp_path: Path) -> None:
    other = ADAPTERS.model_copy(update={"modules": ("mlp/",)}).model_dump(mode="json")
    with pytest.raises(ValueError, match=r"adapters: .*self_attention/query/lora_a.* not as run\.json describes"):
        read_adapters(save(tmp_path / "belied", model_of("linen", True), lora=other))
    step_dir = save(tmp_path / "damaged", model_of("linen", True))
    (step_dir / "run.json").write_bytes((step_dir / "run.json").read_bytes().replace(b"3.0", b"9.0"))
    with pytest.raises(ValueError, match=r"is damaged.*\n.*run\.json"):
        read_adapters(step_dir)


def test_another_base_is_refused_by_its_checksum(tmp_path: Path) -> None:
    model = model_of("nnx", True)
    step_dir = save(tmp_path, model)
    info = read_run_info(step_dir)
    base = lora.split(model.init(jax.random.key(0)))[0]
    require_base(base, info, step_dir)
    embedding = base["token_embedder"]["embedding"]
    base["token_embedder"]["embedding"] = embedding.at[3, 5].set(jnp.nextafter(embedding[3, 5], 9.0))
    with pytest.raises(ValueError, match=r"base: its checksum is .* \(random weights of the run's seed\)"):
        require_base(base, info, step_dir)
    assert BaseInfo(**info.extra["base"]).source == "random"


@pytest.mark.parity
@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "gpt2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("mistral", "qwen2", "qwen3"))],
)
def test_adapters_equal_their_merged_model_and_both_as_others_read_them(
    reference: Callable[[str], Any], tmp_path: Path, family: str
) -> None:
    """Ours, ours merged, PEFT on the base, and transformers on the merged export: logits within 1e-5 of the largest."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ref = reference(f"{family}-even")
    adapters = LoraSection(rank=3, alpha=4.0, modules=("self_attention", "mlp"))
    scan = family in ("llama", "gemma2", "gpt2")
    config, base = import_hf(ref.folder, scan_layers=scan, param_scan_axis=1, dtype="float32")
    model = FunctionalModel(config, ModelSection(hf_path=str(ref.folder), scan_layers=scan), adapters)
    pairs = lora.split(model.init(jax.random.key(0)))[1]
    keys = iter(jax.random.split(jax.random.key(1), 200))
    pairs = unflatten({path: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape) for path, leaf in flatten(pairs)})
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, 12))
    ours, _ = jax.jit(model)(lora.join(base, pairs), jnp.asarray(ids, jnp.int32))

    (tmp_path / "peft").mkdir()
    export_peft(tmp_path / "peft", config, pairs, adapters, model.layout, base_model=str(ref.folder))
    merged = lora.merged(lora.join(base, pairs), adapters, model.layout, dtype=None)
    card = ModelCard(name="merged", base_model=None, how="Merged.")
    export_hf(
        tmp_path / "merged",
        config,
        merged,
        param_scan_axis=1,
        dtype="float32",
        max_shard_bytes=1 << 30,
        tokenizer_source=None,
        generation={},
        card=card,
    )
    with torch.no_grad():
        tokens = torch.tensor(ids).long()
        plain = ref.model(tokens).logits.numpy()
        adapted = PeftModel.from_pretrained(copy.deepcopy(ref.model), tmp_path / "peft")
        peft = adapted(tokens).logits.numpy()
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
        whole = reloaded(tokens).logits.numpy()
    scale = np.abs(peft).max()
    assert np.abs(ours - plain).max() > 0.02 * scale
    for other in (peft, whole):
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-5 * scale)
    described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert described["r"] == 3 and described["lora_alpha"] == 4
    assert described["base_model_name_or_path"] == str(ref.folder)


def test_an_adapter_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    model = model_of("nnx", True)
    pairs = lora.split(model.init(jax.random.key(0)))[1]
    wo = pairs["decoder"]["layers"]["mlp"]["wo"]
    wo["lora_b"] = wo["lora_b"].at[0, 1, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.lora_B\.weight: not finite"):
        export_peft(tmp_path, CONFIG, pairs, ADAPTERS, model.layout, base_model=None)
