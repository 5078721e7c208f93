"""MaxText's trees: its own checkpoints give its own logits, and ours go there and back.

Its tied head multiplies with the token table rounded to bfloat16 whatever its dtypes (tests/models/test_gpt3.py), so
where its logits are wanted to 1e-4 the head is untied here, and holds the rounded table. All else is as converted.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from models.checkpoints import store
from models.checkpoints.contents import Contents, read_foreign, read_ours
from models.checkpoints.convert import Target, convert
from models.checkpoints.layouts import optimizer_from_dict
from models.checkpoints.maxtext import maxtext_items, read_maxtext, read_raw
from models.checkpoints.maxtext_numerics import as_maxtext_computes, numerics_of
from models.checkpoints.restack import Layout, restack_params
from models.config import RopeScaling, TransformerConfig, load_preset
from models.functional import FunctionalModel
from models.parameters import flatten, init_params, unflatten
from pretrain.data.batch import TokenBatch
from pretrain.losses import make_loss_fn
from pretrain.optimizers import make_optimizer
from recipes.schema import ModelSection, OptimizerSection

ATOL = 1e-4
OPTIONS = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)
FIXTURES = {
    "gpt3-52k": load_preset("gpt3-52k"),
    "llama-tiny": load_preset("tiny-llama").replace(num_layers=3, rope_theta=500_000.0),
}
LAYOUTS = [(framework, scan) for framework in ("linen", "nnx") for scan in (True, False)]


def target(format: str, **changes: Any) -> Target:
    return Target(**({"format": format, "scan_layers": None, "dtype": None, "params_only": False} | changes))


def maxtext_logits(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "logits.npz"))


def with_rounded_head(config: TransformerConfig, params: dict[str, Any]) -> tuple[TransformerConfig, dict[str, Any]]:
    """The head untied, holding the table as MaxText's head multiplies with it."""
    if not config.tied_embeddings:
        return config, params
    rounded = params["token_embedder"]["embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)
    decoder = {**params["decoder"], "logits_dense": {"kernel": rounded.T}}
    return config.replace(tied_embeddings=False), {**params, "decoder": decoder}


def logits_of(config: TransformerConfig, params: Any, rows: dict[str, np.ndarray], framework: str) -> np.ndarray:
    model = FunctionalModel(config, ModelSection(framework=framework, scan_layers="layers" in params["decoder"]))
    fields = (rows["tokens"], rows["positions"], rows["segment_ids"])
    run = jax.jit(lambda params, fields: model(params, fields[0], fields[1], segment_ids=fields[2])[0])
    return np.asarray(run(params, fields))


# --- what MaxText wrote ---


@pytest.mark.parametrize(("framework", "scan"), LAYOUTS)
@pytest.mark.parametrize("name", FIXTURES)
def test_converted_fixtures_give_maxtexts_logits(
    shared_dir: Path, tmp_path: Path, name: str, framework: str, scan: bool
) -> None:
    source = shared_dir / "fixtures/maxtext" / name
    done = convert(
        source, tmp_path / "ours", target(framework, scan_layers=scan), config=FIXTURES[name], from_step=None
    )
    contents = read_ours(done.written)
    given = maxtext_logits(source)
    config, params = with_rounded_head(contents.config, contents.params)
    assert np.abs(logits_of(config, params, given, framework) - given["logits"]).max() < ATOL
    # The whole state came along: steps 4 and 6, and every moment.
    assert int(contents.step) == {"gpt3-52k": 4, "llama-tiny": 6}[name]
    assert contents.moments is not None


def test_moments_of_a_rescaled_kernel_are_scaled_inversely(shared_dir: Path) -> None:
    """head_dim 16: our kernel is MaxText's times 4, so gradients are a quarter and their squares a sixteenth."""
    items, config = shared_dir / "fixtures/maxtext/llama-tiny/items", FIXTURES["llama-tiny"]
    raw, ours = store.read_host(items, only=["params", "opt_state"]), read_maxtext(items, config)
    theirs = {"params": raw["params"]["params"]}
    theirs |= {name: raw["opt_state"]["0"][name]["params"] for name in ("mu", "nu")}
    own = {"params": ours.params, **ours.moments["0"]}
    for name, factor in (("params", 4), ("mu", 1 / 4), ("nu", 1 / 16)):
        for path, leaf in flatten(theirs[name]):
            expected = leaf * factor if "query" in path else leaf
            assert np.array_equal(dict(flatten(own[name]))[path], expected), (name, path)
    assert ours.moments["1"] is None and int(ours.moments["2"]["count"]) == 6


def test_what_was_converted_and_dropped_is_said(shared_dir: Path) -> None:
    notes = read_maxtext(shared_dir / "fixtures/maxtext/llama-tiny/items", FIXTURES["llama-tiny"]).notes
    assert notes[0] == "converted: query projections times 4 (mu / 4, nu / 16)"
    assert "dropped 12 random keys" in notes[1] and "nnx_aux/model/decoder/rngs/dropout" in notes[1]


def shifted(given: dict[str, np.ndarray]) -> TokenBatch:
    """Each token predicts the next one of its document."""
    tokens, segments = given["tokens"], given["segment_ids"]
    targets = np.roll(tokens, -1, axis=1)
    same = segments == np.roll(segments, -1, axis=1)
    same[:, -1] = False
    counted = np.where(same, segments, 0).astype(np.int32)
    position = given["positions"]
    return TokenBatch(tokens, position, segments, np.where(same, targets, 0).astype(np.int32), position, counted)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("name", FIXTURES)
def test_training_goes_on_from_a_fixture_at_the_loss_of_maxtexts_logits(
    shared_dir: Path, tmp_path: Path, name: str, framework: str
) -> None:
    """The oracle is the cross entropy of MaxText's logits in float64; the next step lowers that batch's loss."""
    source = shared_dir / "fixtures/maxtext" / name
    given = maxtext_logits(source)
    batch = shifted(given)
    logits = given["logits"].astype(np.float64)
    peak = logits.max(axis=-1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
    counted = np.asarray(batch.targets_segmentation) != 0
    expected = -np.take_along_axis(logprobs, np.asarray(batch.targets)[..., None], axis=-1)[..., 0][counted].mean()

    written = convert(source, tmp_path / "ours", target(framework), config=FIXTURES[name], from_step=None).written
    contents = read_ours(written)
    config, params = with_rounded_head(contents.config, contents.params)
    loss_fn = make_loss_fn(
        FunctionalModel(config, ModelSection(framework=framework)), z_loss=0.0, chunk_size=64, trainable=None
    )

    @jax.jit
    def mean_loss(params: Any, batch: TokenBatch) -> jax.Array:
        sums = loss_fn(params, batch, None)
        return sums.loss_sum / sums.weight_sum

    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    first, grads = jax.value_and_grad(mean_loss)(params, batch)
    assert abs(float(first) - expected) < ATOL
    if config != contents.config:
        return
    tx = make_optimizer(OptimizerSection(), lambda count: 1e-3, [])
    state = optimizer_from_dict(jax.eval_shape(tx.init, params), contents.moments)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    moved = jax.tree.map(lambda leaf, update: leaf + update, params, updates)
    assert float(mean_loss(moved, batch)) < float(first) - 0.01


# --- the layouts that it has written ---


def rewritten(items: Path, folder: Path, *, scan: bool, config: TransformerConfig) -> Path:
    """A fixture in the NNX layout of older versions: `value` leaves, random keys among them, an unsigned step."""
    tree = store.read_host(items, only=["params", "opt_state", "step"])
    layouts = (Layout(True, 1), Layout(scan, 1))

    def nnx(params: Any, *suffix: str) -> Any:
        params = restack_params(params, config, *layouts)
        renamed = {}
        for path, leaf in flatten(params):
            if path[1].startswith("layers_"):
                path = ("decoder", "layers", path[1].removeprefix("layers_"), *path[2:])
            renamed[(*path, *suffix)] = leaf
        return unflatten(renamed)

    opt_state = tree["opt_state"]
    adam = {"count": opt_state["0"]["count"]} | {name: nnx(opt_state["0"][name]["params"]) for name in ("mu", "nu")}
    model = nnx(tree["params"]["params"], "value")
    model["decoder"]["dropout"] = {"rngs": {"dropout": {"count": {"value": np.uint32(3)}}}}
    model["decoder"]["rngs"] = {"params": {"key": {"value": np.arange(2, dtype=np.uint32)}}}
    rest = {"1": None, "2": {"count": opt_state["2"]["count"]}}
    store.save(
        folder / "items",
        {"model": model, "optimizer": {"step": np.uint32(6), "opt_state": {"0": adam, **rest}}},
        options=OPTIONS,
    )
    return folder / "items"


@pytest.mark.parametrize("scan", [True, False])
def test_the_nnx_layout_reads_like_the_linen_layout(shared_dir: Path, tmp_path: Path, scan: bool) -> None:
    items, config = shared_dir / "fixtures/maxtext/llama-tiny/items", FIXTURES["llama-tiny"]
    linen, nnx = read_foreign(items, config), read_foreign(rewritten(items, tmp_path, scan=scan, config=config), config)
    assert nnx.layout == Layout(scan, 1)
    assert_same(linen.params, restack_params(nnx.params, config, nnx.layout, linen.layout))
    for name in ("mu", "nu"):
        own = restack_params(nnx.moments["0"][name], config, nnx.layout, linen.layout)
        assert_same(linen.moments["0"][name], own)
    assert int(nnx.moments["2"]["count"]) == 6 and nnx.moments["1"] is None
    assert (int(nnx.step), nnx.step.dtype) == (6, np.int32)
    assert any("dropped 2 random keys" in note for note in nnx.notes)


def test_leaves_without_a_place_are_named_and_not_dropped(shared_dir: Path, tmp_path: Path) -> None:
    tree = store.read_host(shared_dir / "fixtures/maxtext/gpt3-52k/items", only=["params", "step"])
    tree["nnx_aux"] = {"model": {"batch_stats": {"mean": np.zeros(3)}}}
    store.save(tmp_path / "items", tree, options=OPTIONS)
    with pytest.raises(ValueError, match=r"1 leaves have no place in our models.*\n  nnx_aux/model/batch_stats/mean"):
        read_foreign(tmp_path / "items", FIXTURES["gpt3-52k"])
    tree.pop("nnx_aux")
    tree["params"]["params"]["decoder"]["adapter"] = {"kernel": np.zeros((2, 2))}
    store.save(tmp_path / "more/items", tree, options=OPTIONS)
    with pytest.raises(ValueError, match=r"surplus: decoder/adapter/kernel \[2, 2\]"):
        read_foreign(tmp_path / "more/items", FIXTURES["gpt3-52k"])


def test_a_tree_of_another_architecture_is_refused_by_leaf(shared_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"misshapen: token_embedder/embedding \[512, 64\], expected \[32000, 64\]"):
        read_foreign(shared_dir / "fixtures/maxtext/llama-tiny/items", load_preset("tiny-32k").replace(num_layers=3))


# --- there and back ---


def test_a_written_tree_restores_into_optax_states_as_maxtext_restores_it(shared_dir: Path, tmp_path: Path) -> None:
    """MaxText hands Orbax its state, whose optimizer is a tuple of named tuples. The fixture takes the same target."""
    fixture, config = shared_dir / "fixtures/maxtext/llama-tiny", FIXTURES["llama-tiny"]
    convert(fixture, tmp_path / "ours", target("nnx", scan_layers=False), config=config, from_step=None)
    there = target("maxtext", scan_layers=True)
    written = convert(tmp_path / "ours", tmp_path / "theirs", there, config=None, from_step=None).written
    assert written == tmp_path / "theirs/5/items"
    params = store.read_host(fixture / "items", only=["params"])["params"]
    state = {"params": params, "opt_state": optax.adamw(lambda count: 1e-3).init(params), "step": np.int32(0)}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def restore(items: Path) -> Any:
        arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=place), state)
        # The fixture holds random keys besides.
        wanted = ocp.args.PyTreeRestore(item=state, restore_args=arguments, partial_restore=items != written)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(items.absolute(), args=wanted)

    ours, theirs = restore(written), restore(fixture / "items")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(one, other) and one.dtype == other.dtype


def state_of(config: TransformerConfig, *, scan: bool, head: float = 1.0) -> Contents:
    """Random parameters (norms and biases too) and adam moments."""
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: init_params(config, jax.random.key(0), scan_layers=scan, param_scan_axis=1, dtype="float32")
    )

    def draw() -> Any:
        return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32) * 0.3, shapes)

    moments = {"count": np.int32(5), "mu": draw(), "nu": jax.tree.map(np.square, draw())}
    return Contents(config, draw(), moments, np.int32(5), Layout(scan, 1), None)


def there_and_back(contents: Contents, folder: Path) -> Contents:
    items = maxtext_items(contents.config, contents.params, contents.moments, contents.step, contents.layout)
    store.save(folder / "items", items, options=OPTIONS)
    return read_foreign(folder / "items", contents.config)


def small(family: str, *, tied: bool, head_dim: int) -> TransformerConfig:
    preset = {"gemma2": "tiny-gemma2", "qwen3": "tiny-qwen3", "gpt3": "gpt3-52k"}.get(family, "tiny-llama")
    sizes: dict[str, Any] = {"embed_dim": 64, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 40}
    sizes |= {"head_dim": head_dim, "num_layers": 4, "max_position": 64, "tied_embeddings": tied, "query_scale": None}
    if family == "gpt3":
        sizes["num_kv_heads"] = 2
    if family in ("mistral", "qwen2"):
        sizes |= {"family": family, "qkv_bias": family == "qwen2"}
    return load_preset(preset).replace(**sizes)


def assert_same(one: Any, other: Any) -> None:
    left, right = dict(flatten(one)), dict(flatten(other))
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype and leaf.tobytes() == right[path].tobytes(), path


def ulps(one: Any, other: Any) -> float:
    """The largest difference of two trees, in units of the last place of the larger value."""
    left, right = dict(flatten(one)), dict(flatten(other))
    assert left.keys() == right.keys()
    return max(float((np.abs(left[path] - right[path]) / np.spacing(np.abs(left[path]))).max()) for path in left)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt3", "llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_ours_to_maxtext_and_back_is_bit_equal_where_factors_are_powers_of_two(
    tmp_path: Path, family: str, tied: bool, scan: bool
) -> None:
    """head_dim 16 and width 64: factors 4 and 8. Gemma's norms are stored plus one, to half a last place of about 1."""
    contents = state_of(small(family, tied=tied, head_dim=16), scan=scan)
    back = there_and_back(contents, tmp_path)
    assert back.layout == contents.layout and int(back.step) == 5
    for name in ("mu", "nu"):
        assert_same(contents.moments[name], back.moments[name])
    if family != "gemma2":
        assert_same(contents.params, back.params)
        return
    theirs = dict(flatten(back.params))
    for path, leaf in flatten(contents.params):
        if path[-1] == "scale":
            assert np.abs(theirs[path] - leaf).max() <= 2.0**-23
        else:
            assert np.array_equal(theirs[path], leaf)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_other_factors_cost_at_most_a_last_place_each_way(tmp_path: Path, family: str) -> None:
    config = small(family, tied=True, head_dim=24).replace(embed_dim=48)
    contents = state_of(config, scan=True)
    back = there_and_back(contents, tmp_path)
    assert 0 < ulps(contents.params["token_embedder"], back.params["token_embedder"]) <= 2 or family == "llama"
    for one, other in [(contents.params, back.params), *((contents.moments[n], back.moments[n]) for n in ("mu", "nu"))]:
        attention = [tree["decoder"]["layers"]["self_attention"] for tree in (one, other)]
        assert ulps(*attention) <= 2


ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


@pytest.mark.parametrize(
    ("config", "scan"),
    [
        (small("llama", tied=False, head_dim=16).replace(rope_scaling=ROPE, qkv_bias=True), True),
        (small("llama", tied=True, head_dim=24), False),
        (small("gemma2", tied=True, head_dim=16), True),
        (small("gemma2", tied=False, head_dim=16).replace(query_scale=0.2), False),
        (small("qwen2", tied=True, head_dim=16).replace(query_scale=0.2), True),
        (small("gpt3", tied=True, head_dim=16), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else f"{value.family}-{value.tied_embeddings}",
)
def test_converted_parameters_compute_what_maxtexts_own_numbers_compute(
    tmp_path: Path, config: TransformerConfig, scan: bool
) -> None:
    """Two routes to the same logits: our numbers in our model, and MaxText's under a configuration that reads them."""
    contents = state_of(config, scan=scan)
    items = maxtext_items(config, contents.params, None, np.int32(0), contents.layout)
    store.save(tmp_path / "items", items, options=OPTIONS)
    its_config, its_params = as_maxtext_computes(config, read_raw(tmp_path / "items", config).params)
    generator = np.random.default_rng(1)
    rows = {
        "tokens": generator.integers(0, 40, (2, 12)).astype(np.int32),
        "positions": np.tile(np.arange(12, dtype=np.int32) * 5, (2, 1)),
        "segment_ids": np.ones((2, 12), np.int32),
    }
    ours, theirs = logits_of(config, contents.params, rows, "linen"), logits_of(its_config, its_params, rows, "linen")
    assert np.abs(ours - theirs).max() < 1e-4 * max(1.0, np.abs(ours).max())
    if numerics_of(config).changes():
        # Read as ours without conversion, the same arrays give other logits.
        unconverted = read_raw(tmp_path / "items", config).params
        wrong = logits_of(config, unconverted, rows, "linen")
        assert np.abs(ours - wrong).max() > 1e-2


def test_neighbouring_rotary_pairs_become_halves(tmp_path: Path) -> None:
    """By hand: element i of our halves is element 2 i of MaxText's neighbours, element i + N / 2 its 2 i + 1."""
    config = small("llama", tied=False, head_dim=8).replace(rope_scaling=ROPE)
    contents = state_of(config, scan=False)
    kernel = np.zeros((64, 1, 8), np.float32) + np.arange(8, dtype=np.float32)
    contents.params["decoder"]["layers_0"]["self_attention"]["key"]["kernel"] = kernel
    items = maxtext_items(config, contents.params, None, np.int32(0), contents.layout)
    theirs = items["params"]["params"]["decoder"]["layers_0"]["self_attention"]["key"]["kernel"]
    assert theirs[0, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# --- what is refused ---


def test_what_maxtext_does_not_compute_is_refused() -> None:
    llama32 = load_preset("llama3.2-1b")
    with pytest.raises(ValueError, match=r"rope_scaling=.*MaxText scales in llama alone, by the numbers of Llama 3.1"):
        numerics_of(llama32)
    with pytest.raises(ValueError, match=r"num_layers=3, .*blocks of a sliding and a full one"):
        numerics_of(load_preset("tiny-gemma2"))
    numerics_of(load_preset("llama3.1-8b"))


def test_moments_that_do_not_follow_a_rescaled_parameter_are_refused() -> None:
    contents = state_of(small("llama", tied=True, head_dim=16), scan=True)
    moments = {"0": {"v_row": contents.params}}
    with pytest.raises(ValueError, match=r"opt_state/0/v_row: .*only the moments mu, nu, trace.*--params-only"):
        maxtext_items(contents.config, contents.params, moments, contents.step, contents.layout)


def test_a_tree_without_our_marker_is_never_read_as_ours(shared_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no run.json of ours, so it is read as MaxText's.*--model"):
        convert(shared_dir / "fixtures/maxtext/llama-tiny", tmp_path / "x", target("nnx"), config=None, from_step=None)
    with pytest.raises(ValueError, match=r"is damaged and was not converted"):
        read_ours(shared_dir / "fixtures/maxtext/llama-tiny")
