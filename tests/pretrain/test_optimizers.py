"""First updates by hand, trajectories against optax, and what stays frozen."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.config import load_preset
from models.parameters import flatten, param_specs, unflatten
from pretrain import optimizers
from pretrain.optimizers import (
    adam_pax,
    clip_by_global_norm,
    make_optimizer,
    muon_dimension_numbers,
    require_updates_survive,
)
from recipes.layers import shipped_recipes
from recipes.load import load_recipe
from recipes.schema import ModelSection, OptimizerSection, TrainingRecipe

RATE = 0.1
PAX = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "eps_root": 0.0, "weight_decay": 0.1}


def constant(count):
    return jnp.full((), RATE)


def falling(count):
    return 0.02 / (1 + 0.1 * count)


def first_update(params, grads, **keys):
    tx = make_optimizer(OptimizerSection(**keys), constant, list(params))
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates


def run(tx, steps, params, state=None, first=0):
    """Takes steps on a quadratic bowl whose slopes differ by a factor of a thousand, with a gradient that turns."""
    slopes = {"a": jnp.asarray([1.0, 0.03, 0.001]), "b": jnp.full((2, 2), 0.3)}

    @jax.jit
    def step(params, state, t):
        grads = jax.tree.map(lambda p, slope: slope * p + 0.1 * jnp.sin(t * slope), params, slopes)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    for t in range(first, first + steps):
        params, state = step(params, state, t)
    return params, state


@pytest.fixture
def bowl():
    return {"a": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.asarray([[0.5, -0.5], [1.5, 2.5]])}


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.abs(a - e).max() <= tolerance * np.abs(e).max()


@pytest.mark.parametrize("name", ["adamw", "adam_pax"])
def test_first_adam_update_is_the_rate_times_sign_and_decay(name):
    # With bias correction m = g and v = g^2, so the first step is -rate (sign(g) + wd p): for p = 2 and g = -3
    # -0.1 (-1 + 0.2) = 0.08; for p = -1 and g = 0.5 -0.1 (1 - 0.1) = -0.09.
    params, grads = {"w": jnp.asarray([2.0, -1.0])}, {"w": jnp.asarray([-3.0, 0.5])}
    np.testing.assert_allclose(first_update(params, grads, name=name)["w"], [0.08, -0.09], rtol=1e-6)


def test_adam_pax_second_step_uses_the_decay_of_the_second_step():
    # beta_2 = beta (1 - beta) / (1 - beta^2) = beta / (1 + beta): 9/19 and 95/195. With g = 1, then 3:
    # m = 9/19 + 10/19 * 3 = 39/19, v = 95/195 + 100/195 * 9 = 995/195; update = -0.1 (m / sqrt(v) + 0.1 p).
    params = {"w": jnp.asarray([2.0])}
    tx = adam_pax(RATE, **PAX)
    state = tx.init(params)
    _, state = tx.update({"w": jnp.asarray([1.0])}, state, params)
    updates, state = tx.update({"w": jnp.asarray([3.0])}, state, params)
    assert float(state.mu["w"][0]) == pytest.approx(39 / 19, rel=1e-6)
    assert float(state.nu["w"][0]) == pytest.approx(995 / 195, rel=1e-6)
    assert float(updates["w"][0]) == pytest.approx(-0.1 * ((39 / 19) / (995 / 195) ** 0.5 + 0.2), rel=1e-6)
    assert int(state.count) == 2


def test_adam_pax_takes_the_steps_of_adamw_and_keeps_its_corrected_moments(bowl):
    # A moderate eps and eps_root, since they enter after the bias correction in both.
    settings = PAX | {"eps": 1e-3, "eps_root": 1e-4}
    pax_params, pax = run(adam_pax(falling, **settings), 50, bowl)
    adamw_params, (adamw, _, _) = run(optax.adamw(falling, **settings), 50, bowl)
    assert_close(pax_params, adamw_params, 1e-5)
    assert_close(jax.tree.map(lambda m: m * (1 - 0.9**50), pax.mu), adamw.mu, 1e-5)
    assert_close(jax.tree.map(lambda v: v * (1 - 0.95**50), pax.nu), adamw.nu, 1e-5)


def test_adamw_goes_on_from_adam_pax_when_the_moments_are_scaled(bowl):
    tx = adam_pax(falling, **PAX)
    straight, _ = run(tx, 12, bowl)
    params, pax = run(tx, 6, bowl)
    scaled = optax.ScaleByAdamState(
        pax.count,
        jax.tree.map(lambda m: m * (1 - 0.9**6), pax.mu),
        jax.tree.map(lambda v: v * (1 - 0.95**6), pax.nu),
    )
    state = (scaled, optax.EmptyState(), optax.ScaleByScheduleState(pax.count))
    resumed, _ = run(optax.adamw(falling, **PAX), 6, params, state, first=6)
    assert_close(resumed, straight, 1e-5)


def test_adam_pax_under_injected_hyperparameters_equals_the_plain_one(bowl):
    injected = optax.inject_hyperparams(adam_pax)(learning_rate=falling, **PAX)
    assert_close(run(injected, 20, bowl)[0], run(adam_pax(falling, **PAX), 20, bowl)[0], 1e-6)


def test_adam_pax_reads_the_rate_of_the_count_before_it_grows():
    params, grads = {"w": jnp.asarray([0.0])}, {"w": jnp.asarray([1.0])}
    tx = adam_pax(lambda count: jnp.where(count == 0, 0.25, 0.0), **PAX)
    updates, state = tx.update(grads, tx.init(params), params)
    assert float(updates["w"][0]) == pytest.approx(-0.25)
    assert not np.any(tx.update(grads, state, params)[0]["w"])


def test_adam_pax_keeps_bf16_moments_for_bf16_parameters():
    params = {"w": jnp.ones((3,), jnp.bfloat16)}
    tx = adam_pax(falling, **PAX)
    for dtype in (jnp.bfloat16, jnp.float32):
        updates, state = tx.update({"w": jnp.ones((3,), dtype)}, tx.init(params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves((updates, state.mu, state.nu))} == {jnp.dtype(jnp.bfloat16)}


def test_sgd_with_momentum_follows_the_hand_formula():
    # v1 = 1, v2 = 0.5 * 1 + 3 = 3.5; updates -0.1 v; without momentum -0.1 g.
    params, grads = {"w": jnp.asarray([2.0])}, [{"w": jnp.asarray([g])} for g in (1.0, 3.0)]
    for momentum, expected in [(0.5, [-0.1, -0.35]), (None, [-0.1, -0.3])]:
        tx = make_optimizer(OptimizerSection(name="sgd", momentum=momentum), constant, ["w"])
        state = tx.init(params)
        for grad, update in zip(grads, expected, strict=True):
            updates, state = tx.update(grad, state, params)
            assert float(updates["w"][0]) == pytest.approx(update, rel=1e-6)


def test_first_adafactor_update_is_relative_to_the_parameters_size_and_decays_with_the_rate():
    # The first second moment is g^2, so the direction is sign(g), of rms 1; the rate is taken times the parameter's
    # root mean square, sqrt((9 + 1) / 2) = sqrt 5. The decay takes rate * 0.1 * p: -(0.1 sqrt 5 sign + 0.01 p).
    params, grads = {"w": jnp.asarray([3.0, -1.0])}, {"w": jnp.asarray([-4.0, 0.5])}
    expected = [0.1 * 5**0.5 - 0.03, -0.1 * 5**0.5 + 0.01]
    np.testing.assert_allclose(first_update(params, grads, name="adafactor")["w"], expected, rtol=1e-5)


def state_paths(state):
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(state)}


def test_state_layouts_are_those_of_checkpoints():
    params = {"w": jnp.ones((2,))}
    init = lambda name: make_optimizer(OptimizerSection(name=name), constant, ["w"]).init(params)  # noqa: E731
    assert state_paths(init("adamw")) == {"0/count", "0/mu/w", "0/nu/w", "2/count"}
    assert state_paths(init("adam_pax")) == {"count", "mu/w", "nu/w"}
    assert isinstance(init("adam_pax"), optax.ScaleByAdamState)


@pytest.mark.parametrize(("name", "keys"), [("adamw", {}), ("muon", {}), ("sgd", {"momentum": 0.9})])
def test_moment_dtype_is_that_of_the_first_moments(name, keys):
    section = OptimizerSection(name=name, moment_dtype="bfloat16", **keys)
    params = {"w": jnp.ones((4, 4))}
    state = make_optimizer(section, constant, {"w": ("embed", "mlp")}).init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert moments[0].dtype == jnp.bfloat16


# --- frozen parameters ---

TREE = {
    "decoder": {"layers": {"mlp": {"wi_0": {"kernel": jnp.ones((4, 6))}}, "norm": {"scale": jnp.ones((4,))}}},
    "token_embedder": {"embedding": jnp.ones((8, 4))},
}
AXES = {
    "decoder/layers/mlp/wi_0/kernel": ("embed", "mlp"),
    "decoder/layers/norm/scale": ("norm",),
    "token_embedder/embedding": ("vocab", "embed"),
}


@pytest.mark.parametrize("name", ["adamw", "adam_pax", "sgd", "adafactor", "muon"])
def test_frozen_parameters_get_zero_updates_and_no_state(name):
    keys = {"momentum": 0.9} if name in ("sgd", "adafactor") else {}
    section = OptimizerSection(name=name, trainable=["decoder/.*kernel", "scale$"], **keys)
    tx = make_optimizer(section, constant, AXES)
    state = tx.init(TREE)
    assert not any("embedding" in path for path in state_paths(state))
    assert any("kernel" in path for path in state_paths(state))
    grads = jax.tree.map(lambda p: 0.5 * p, TREE)
    updates, new_state = jax.jit(tx.update)(grads, state, TREE)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert not np.any(updates["token_embedder"]["embedding"])
    # The rest moves as if the frozen parameter did not exist.
    rest = {"decoder": TREE["decoder"]}
    alone = make_optimizer(section.model_copy(update={"trainable": ()}), constant, AXES)
    expected, _ = alone.update({"decoder": grads["decoder"]}, alone.init(rest), rest)
    assert_close(updates["decoder"], expected["decoder"], 1e-6)
    assert np.all(np.asarray(updates["decoder"]["layers"]["norm"]["scale"]) != 0)


def test_frozen_parameters_leave_the_paths_of_adamws_state_as_they_are():
    state = make_optimizer(OptimizerSection(trainable=["scale"]), constant, AXES).init(TREE)
    scale = "decoder/layers/norm/scale"
    assert state_paths(state) == {"0/count", f"0/mu/{scale}", f"0/nu/{scale}", "2/count"}


@pytest.mark.parametrize("name", ["adamw", "adam_pax", "muon"])
def test_state_of_a_partly_frozen_model_maps_to_its_parameters(name):
    tx = make_optimizer(OptimizerSection(name=name, trainable=["decoder"]), constant, AXES)
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), TREE)
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else name,
        tx.init(TREE),
        names,
        transform_non_params=lambda _: None,
        is_leaf=is_masked,
    )
    leaves = set(jax.tree.leaves(mapped))
    assert leaves == {
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(TREE) if "decoder" in str(path)
    }


def test_trainable_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    section = OptimizerSection(trainable=["scale", "token_embeder/embedding"])
    with pytest.raises(ValueError, match=r"optimizer.trainable: 'token_embeder/embedding'.*token_embedder/embedding$"):
        make_optimizer(section, constant, AXES)


def test_frozen_gradients_are_stopped_and_the_others_untouched():
    trainable = optimizers.trainable_paths(["mlp"], AXES)

    def loss(params):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(optimizers.stop_frozen_gradients(params, trainable)))

    grads = jax.grad(loss)(TREE)
    np.testing.assert_array_equal(grads["decoder"]["layers"]["mlp"]["wi_0"]["kernel"], 2 * np.ones((4, 6)))
    assert not np.any(grads["token_embedder"]["embedding"])
    assert not np.any(grads["decoder"]["layers"]["norm"]["scale"])


# --- clipping ---


def test_clipping_scales_to_the_bound_and_returns_the_norm_before():
    # The norm of (3, 4, 12) is 13: clipped to 6.5, all halve.
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    clipped, norm = clip_by_global_norm(grads, 6.5)
    assert float(norm) == 13.0
    assert clipped["a"].tolist() == [1.5, 2.0]
    assert clipped["b"].tolist() == [[6.0]]


@pytest.mark.parametrize("max_norm", [0.0, 13.0, 20.0])
def test_gradients_within_the_bound_are_untouched(max_norm):
    grads = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    clipped, norm = clip_by_global_norm(grads, max_norm)
    assert float(norm) == 13.0
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)


def test_norm_of_bf16_gradients_is_summed_in_float32_and_zero_gradients_stay_finite():
    # 4096 times 1 + 2^-7: the norm is 64 (1 + 2^-7) = 64.5. In bfloat16 the squares alone would lose 2^-14.
    clipped, norm = clip_by_global_norm({"a": jnp.full((4096,), 1 + 2**-7, jnp.bfloat16)}, 1.0)
    assert norm.dtype == jnp.float32
    assert float(norm) == 64.5
    assert clipped["a"].dtype == jnp.bfloat16
    assert float(clipped["a"][0]) == 1 / 64
    zeros, norm = clip_by_global_norm({"a": jnp.zeros((3,))}, 1.0)
    assert float(norm) == 0.0
    assert zeros["a"].tolist() == [0.0, 0.0, 0.0]


# --- muon ---


def test_muon_dimension_numbers_of_attention_mlp_and_the_excluded():
    number = lambda path, *axes: muon_dimension_numbers(f"decoder/layers/{path}", axes)  # noqa: E731
    numbers = optax.contrib.MuonDimensionNumbers
    assert number("self_attention/query/kernel", "embed", "layers", "heads", "head_dim") == numbers((0,), (2, 3))
    assert number("self_attention/out/kernel", "heads", "layers", "head_dim", "embed") == numbers((0, 2), (3,))
    assert number("self_attention/out/kernel", "layers", "heads", "head_dim", "embed") == numbers((1, 2), (3,))
    assert number("self_attention/qkv_proj/kernel", "embed", "qkv", "heads", "head_dim") == numbers((0,), (3,))
    assert number("mlp/wi_0/kernel", "embed", "layers", "mlp") == numbers((0,), (2,))
    assert number("mlp/wo/kernel", "mlp", "embed") == numbers((0,), (1,))
    assert number("self_attention/query/bias", "layers", "heads", "head_dim") is None
    assert number("self_attention/query_norm/scale", "head_dim", "layers") is None
    assert muon_dimension_numbers("token_embedder/embedding", ("vocab", "embed")) is None
    assert muon_dimension_numbers("decoder/logits_dense/kernel", ("embed", "vocab")) is None


def muon_updates(scan_layers, axis, grads_of):
    """The first updates of a small gpt3, by path; gradients are `grads_of(name, shape)`."""
    config = load_preset("gpt3-52k").model_copy(update={"num_layers": 2})
    specs = dict(flatten(param_specs(config, scan_layers=scan_layers, param_scan_axis=axis)))
    section = OptimizerSection(name="muon", weight_decay=0.0)
    tx = make_optimizer(section, constant, {"/".join(path): spec.axes for path, spec in specs.items()})
    params = unflatten({path: jnp.zeros(spec.shape) for path, spec in specs.items()})
    grads = unflatten({path: grads_of("/".join(path), spec.shape) for path, spec in specs.items()})
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    return dict(flatten(updates))


def drawn(name, shape):
    return jnp.asarray(np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape), jnp.float32)


def test_muon_orthogonalises_each_matrix_and_leaves_the_rest_to_adam():
    updates = muon_updates(False, 1, drawn)
    kernel = updates["decoder", "layers_0", "self_attention", "out", "kernel"]
    inputs, outputs = kernel.shape[0] * kernel.shape[1], kernel.shape[2]
    singular = np.linalg.svd(np.asarray(kernel).reshape(inputs, outputs), compute_uv=False)
    # Five iterations with these coefficients bring singular values into a band that starts at 0.68, not quite at the
    # customary 0.7; the rate 0.1 and the width's factor scale them.
    singular = singular / (RATE * max(1, outputs / inputs) ** 0.5)
    assert 0.68 <= singular.min() <= singular.max() <= 1.2
    # Adam's first step is a sign, up to Nesterov's constant factor.
    table = np.abs(updates["token_embedder", "embedding"])
    assert table.max() == pytest.approx(table.min(), rel=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_muon_updates_of_stacked_layers_equal_those_of_single_layers(axis):
    single = muon_updates(False, axis, drawn)

    def stacked_gradient(name, shape):
        if "/layers/" not in name:
            return drawn(name, shape)
        count = shape[min(axis, len(shape) - 1)]
        each = tuple(size for i, size in enumerate(shape) if i != min(axis, len(shape) - 1))
        layers = [drawn(name.replace("/layers/", f"/layers_{i}/"), each) for i in range(count)]
        return jnp.stack(layers, axis=min(axis, len(shape) - 1))

    stacked = muon_updates(True, axis, stacked_gradient)
    for path, update in single.items():
        if path[1].startswith("layers_"):
            whole = stacked[(path[0], "layers", *path[2:])]
            index = int(path[1].removeprefix("layers_"))
            assert_close(jnp.take(whole, index, axis=min(axis, whole.ndim - 1)), update, 1e-5)


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 2.0**-17), ("float16", 2.0**-20)])
def test_a_rate_that_is_refused_changes_one_weight_in_ten_and_float32_changes_all(dtype, rate):
    """Half a unit in the last place of 2**-9 is 2**-9 / 256 in bfloat16, with 8 bits, and 2**-9 / 2048 in float16."""
    section = OptimizerSection(learning_rate=rate)
    with pytest.raises(
        ValueError, match=rf"model\.param_dtype={dtype}: .* optimizer\.learning_rate=.*param_dtype=float32"
    ):
        require_updates_survive(section, ModelSection(preset="tiny-llama", param_dtype=dtype))
    weights = 0.02 * np.random.default_rng(0).standard_normal(10_000)

    def changed(kind):
        params = before = jnp.asarray(weights, kind)
        for _ in range(200):
            params = optax.apply_updates(params, jnp.full_like(params, -rate))
        return float((params != before).mean())

    assert changed(dtype) < 0.12 and changed("float32") == 1.0


@pytest.mark.parametrize(("name", "rate"), [("adamw", 2.0**-16), ("sgd", 1e-6), ("adafactor", 1e-6)])
def test_trained_bfloat16_parameters_are_warned_of_where_some_updates_survive(caplog, name, rate):
    keys = {"weight_decay": 0.0} if name == "adafactor" else {}
    section = OptimizerSection(name=name, learning_rate=rate, **keys)
    require_updates_survive(section, ModelSection(preset="tiny-llama"))
    assert not caplog.records
    require_updates_survive(section, ModelSection(preset="tiny-llama", param_dtype="bfloat16"))
    assert "less than a 512th of a weight" in caplog.text and "set model.param_dtype=float32" in caplog.text


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_shipped_recipe_trains_parameters_that_round_updates_away(caplog, name):
    loaded = load_recipe(name, [])
    for one in (loaded, *(stage.loaded for stage in loaded.stages)):
        if isinstance(one.recipe, TrainingRecipe):
            require_updates_survive(one.recipe.optimizer, one.recipe.model)
    assert not caplog.records
