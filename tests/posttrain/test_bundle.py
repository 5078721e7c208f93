"""Frozen roles and what they cost: a checksum that sees every change, views that copy nothing, bytes by hand."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checksum import checksum
from models.config import load_preset
from models.functional import FunctionalModel
from models.lora import split
from models.mesh import make_mesh
from models.parameters import flatten
from posttrain.bundle import (
    AdapterBase,
    LinenPolicy,
    ModelBundle,
    activation_bytes,
    as_module,
    freeze,
    require_offload_effect,
    resting,
)
from pretrain.setup import prepare_model
from recipes.schema import (
    MeshSection,
    ModelSection,
    PosttrainDataSection,
    SFTRecipe,
    TokenizerSection,
    TrainSection,
)
from recipes.sections.alignment import LoraSection

CONFIG = load_preset("tiny-llama").replace(embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=1, vocab_size=40)


def model(**options: Any) -> FunctionalModel:
    return FunctionalModel(CONFIG, ModelSection(preset="tiny-llama", **options))


def changed(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> dict[str, Any]:
    """A copy of a tree with another leaf."""
    head, *rest = path
    return {**tree, head: changed(tree[head], tuple(rest), leaf) if rest else leaf}


# --- the checksum ---


@settings(max_examples=40)
@given(st.data())
def test_any_bit_of_any_number_changes_the_checksum(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(), (7,), (3, 40), (2, 3, 35)]))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int8", "uint8"]))
    raw = np.random.default_rng(data.draw(st.integers(0, 5))).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    raw = raw.astype(np.uint8)
    cell, bit = data.draw(st.integers(0, raw.size - 1)), data.draw(st.integers(0, 7))
    other = raw.copy()
    other.reshape(-1)[cell] ^= np.uint8(1 << bit)

    def of(part: np.ndarray) -> int:
        return checksum({"a": jnp.asarray(part.view(jnp.dtype(dtype)).reshape(shape)), "b": jnp.ones(3)})

    assert of(raw) == of(raw.copy()) != of(other)


@pytest.mark.parametrize("shape", [(50,), (40, 40), (5, 4, 33)])
def test_swapped_numbers_change_the_checksum(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Also where one stands a row further and some columns back."""
    values = rng.normal(size=shape).astype(np.float32)
    plain = checksum({"a": jnp.asarray(values)})
    flat = values.reshape(-1)
    pairs = [(0, 1), (31, shape[-1]) if values.ndim > 1 else (31, 32), (0, flat.size - 1)]
    pairs += [tuple(rng.choice(flat.size, 2, replace=False)) for _ in range(20)]
    for one, other in pairs:
        swapped = flat.copy()
        swapped[[one, other]] = swapped[[other, one]]
        assert checksum({"a": jnp.asarray(swapped.reshape(shape))}) != plain, (one, other)


def test_swapped_layers_and_swapped_arrays_change_the_checksum() -> None:
    params = model().init(jax.random.key(0))
    plain = checksum(params)
    stacked = params["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    layers = changed(params, ("decoder", "layers", "mlp", "wi_0", "kernel"), stacked[:, ::-1])
    assert stacked.shape == (16, 2, 24) and checksum(layers) != plain
    other = params["decoder"]["layers"]["mlp"]["wi_1"]["kernel"]
    arrays = changed(params, ("decoder", "layers", "mlp", "wi_0", "kernel"), other)
    arrays = changed(arrays, ("decoder", "layers", "mlp", "wi_1", "kernel"), stacked)
    assert checksum(arrays) != plain
    # The order of a dict is no part of a tree.
    assert checksum(dict(reversed(params.items()))) == plain


def test_zeros_of_another_sign_and_numbers_that_are_none_are_told_apart() -> None:
    sums = {checksum({"a": jnp.full(4, value)}) for value in (0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf)}
    assert len(sums) == 5
    params = model().init(jax.random.key(0))
    assert checksum(jax.tree.map(jnp.negative, params)) != checksum(params)


# --- frozen roles ---


def test_a_role_that_was_written_to_is_named() -> None:
    params = model().init(jax.random.key(0))
    role = freeze("reference", model(), params)
    role.require_unchanged()
    params["decoder"]["decoder_norm"]["scale"] = params["decoder"]["decoder_norm"]["scale"].at[3].add(1e-7)
    with pytest.raises(
        RuntimeError, match=r"reference: its parameters changed in training \(checksum [0-9a-f]{8}, now"
    ):
        role.require_unchanged()


def test_a_bundle_checks_each_of_its_frozen_roles() -> None:
    setup: Any = None
    good, bad = (freeze(name, model(), model().init(jax.random.key(0))) for name in ("reference", "teacher"))
    ModelBundle(setup).require_frozen()
    bad.params["decoder"]["decoder_norm"]["scale"] *= 2
    ModelBundle(setup, reference=good).require_frozen()
    with pytest.raises(RuntimeError, match="teacher: its parameters changed"):
        ModelBundle(setup, reference=good, teacher=bad).require_frozen()


# --- where roles rest ---


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_role_on_the_host_is_the_same_model_and_keeps_nothing_on_the_device(framework: Any) -> None:
    """A CPU has the memory kind too, so that the way there and back is real; only its use isn't."""
    plain = model(framework=framework)
    role = freeze("teacher", plain, plain.init(jax.random.key(0)))
    aside = resting(role, "pinned_host")
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(aside.params)} == {"pinned_host"}
    assert resting(role, "device") is role
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    run = jax.jit(lambda arrays: plain(aside.seen(arrays), tokens)[0])
    np.testing.assert_array_equal(run(aside.arrays({})), jax.jit(lambda params: plain(params, tokens)[0])(role.params))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(aside.head())} == {
        leaf.sharding.memory_kind for leaf in jax.tree.leaves(role.params)
    }
    aside.require_unchanged()
    with pytest.raises(RuntimeError, match="teacher: its parameters changed"):
        replace(aside, params=jax.tree.map(lambda leaf: leaf * 2, aside.params)).require_unchanged()


def test_a_rest_on_the_host_has_no_effect_on_a_cpu() -> None:
    mesh = make_mesh(MeshSection(num_devices=1))
    require_offload_effect("teacher.memory", "device", mesh)
    with pytest.raises(ValueError, match=r"teacher\.memory=pinned_host: has no effect on a CPU"):
        require_offload_effect("teacher.memory", "pinned_host", mesh)


def test_the_base_under_adapters_computes_what_the_base_alone_does() -> None:
    """Whatever the adapters have learnt, to the bit."""
    adapters = LoraSection(rank=2)
    adapted = FunctionalModel(CONFIG, ModelSection(preset="tiny-llama"), adapters)
    params = jax.tree.map(lambda leaf: leaf + 0.5, adapted.init(jax.random.key(0)))
    role = AdapterBase("reference", adapted)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    found = jax.jit(lambda arrays: adapted(role.seen(arrays), tokens)[0])(role.arrays(params))
    expected = jax.jit(lambda base: model()(base, tokens)[0])(split(params)[0])
    np.testing.assert_array_equal(found, expected)
    assert np.abs(np.asarray(adapted(params, tokens)[0] - found)).max() > 0.1


# --- views ---


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_view_shares_the_arrays_and_computes_what_the_model_does(framework: Any) -> None:
    """Segments included; a copy would hold a model twice."""
    plain = model(framework=framework)
    params = plain.init(jax.random.key(0))
    view: Any = as_module(plain, params)
    assert isinstance(view, LinenPolicy) == (framework == "linen")
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 40)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0, 0]])
    found, cache = view(tokens, positions, None, None, segments)
    expected, _ = plain(params, tokens, positions, segment_ids=segments)
    assert cache is None
    np.testing.assert_array_equal(found, expected)
    one_segment, _ = view(tokens, positions)
    assert np.abs(np.asarray(one_segment - found)[0, 4:]).max() > 1e-3
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    seen = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(view, nnx.Param))}
    assert seen == held
    role = freeze("teacher", plain, params)
    assert isinstance(ModelBundle.view(role), type(view))


# --- memory ---


def test_the_memory_table_by_hand() -> None:
    """Embeddings of 8 MiB each way, so that MiB are easy to count; AdamW holds twice what the parameters do."""
    section = ModelSection(preset="tiny-llama", overrides={"vocab_size": 2**15})
    recipe = SFTRecipe(
        model=section,
        tokenizer=TokenizerSection(path="bytes"),
        data=PosttrainDataSection(path="unread.jsonl", sequence_length=128),
        train=TrainSection(per_device_batch_size=4.0, loss_chunk_size=256),
    )
    setup = prepare_model(recipe, sequence_length=128)
    params = setup.model.init(jax.random.key(0))
    # Two layers: attention 64 x (64 + 32 + 32 + 64), MLP 3 x 64 x 128, two norms of 64; the last norm; 2 x V x 64.
    count = 2 * (64 * 192 + 3 * 64 * 128 + 128) + 64 + 2 * 2**15 * 64
    assert sum(leaf.size for _, leaf in flatten(params)) == count
    mib = count * 4 / 2**20
    table = ModelBundle(setup, teacher=freeze("teacher", setup.model, params)).memory_table(recipe.optimizer)
    lines = [line.rsplit(maxsplit=2) for line in table.splitlines()[1:]]
    found = {" ".join(name.split()): float(value.replace(",", "")) for name, value, unit in lines if unit == "MiB"}
    assert found == {
        "policy parameters": pytest.approx(mib, abs=0.06),
        "policy gradients": pytest.approx(mib, abs=0.06),
        # Two moments and two counts.
        "policy optimizer (device)": pytest.approx(2 * mib, abs=0.06),
        "teacher parameters": pytest.approx(mib, abs=0.06),
        # 256 tokens by 32768 by 4 bytes.
        "policy logits of a chunk": 32.0,
        "sum": pytest.approx(5 * mib + 32, abs=0.3),
        # Parameters and moments, as they wait in host memory while a save is written.
        "policy snapshot of a save, on the host": pytest.approx(3 * mib, abs=0.06),
    }
    assert "activations aside" in table
    with_rows = ModelBundle(setup).memory_table(recipe.optimizer, row_length=128, rows_per_example=2)
    (line,) = [line for line in with_rows.splitlines() if "activations, at most" in line]
    kept = activation_bytes(setup.model, None, 8, 128)
    assert float(line.split()[-2].replace(",", "")) == pytest.approx(kept / 2**20, abs=0.06)


def test_activations_grow_by_what_each_layer_keeps() -> None:
    """With all rematerialised a layer keeps its input alone: float32 [rows, T, D] for each of three more layers."""

    def kept(num_layers: int, rows: int, **options: Any) -> int:
        config = CONFIG.replace(num_layers=num_layers)
        whole = FunctionalModel(config, ModelSection(preset="tiny-llama", **options))
        return activation_bytes(whole, None, rows, 20)

    assert kept(5, 3, remat="full") - kept(2, 3, remat="full") == 3 * (3 * 20 * 16 * 4)
    assert kept(2, 6) == 2 * kept(2, 3)
    assert kept(2, 3) > 3 * kept(2, 3, remat="full")
