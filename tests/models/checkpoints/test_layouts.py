"""The two layouts on disk, path by path, and the way back from both."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints import store
from models.checkpoints.layouts import Framework, detect_framework, from_disk, optimizer_from_dict, to_disk
from models.config import load_preset
from models.functional import FunctionalModel
from models.parameters import flatten, param_specs
from pretrain.optimizers import make_optimizer
from pretrain.schedules import make_schedule
from pretrain.state import TrainState, abstract_state
from recipes.schema import ModelSection, OptimizerSection, ScheduleSection

CONFIG = load_preset("tiny-llama")
LAYER = (
    "pre_self_attention_layer_norm/scale",
    "post_self_attention_layer_norm/scale",
    *(f"self_attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    *(f"mlp/{name}/kernel" for name in ("wi_0", "wi_1", "wo")),
)
REST = ("token_embedder/embedding", "decoder/decoder_norm/scale", "decoder/logits_dense/kernel")
LINEN = {
    True: {*REST, *(f"decoder/layers/{leaf}" for leaf in LAYER)},
    False: {*REST, *(f"decoder/layers_{i}/{leaf}" for i in range(2) for leaf in LAYER)},
}
NNX = {
    True: LINEN[True],
    False: {*REST, *(f"decoder/layers/{i}/{leaf}" for i in range(2) for leaf in LAYER)},
}

# Where each optimizer keeps a copy of the parameters' tree, its counts, and its stages without state.
OPTIMIZERS: dict[str, tuple[dict[str, Any], list[str], list[str], list[str]]] = {
    "adamw": ({}, ["0/mu", "0/nu"], ["0/count", "2/count"], ["1"]),
    "adam_pax": ({"name": "adam_pax"}, ["mu", "nu"], ["count"], []),
    "sgd": ({"name": "sgd"}, [], ["1/count"], ["0"]),
    "momentum": ({"name": "sgd", "momentum": 0.9}, ["0/trace"], ["1/count"], []),
    "adafactor": (
        {"name": "adafactor"},
        ["0/v_row", "0/v_col", "0/v"],
        ["0/count", "2/count", "4/count"],
        ["1", "3", "5"],
    ),
}


def state_of(scan: bool, **optimizer: Any) -> TrainState:
    """A training state whose leaves are shapes."""
    specs = dict(flatten(param_specs(CONFIG, scan_layers=scan, param_scan_axis=1)))
    axes = {"/".join(path): spec.axes for path, spec in specs.items()}
    tx = make_optimizer(OptimizerSection(**optimizer), make_schedule(ScheduleSection(), 1e-3, 10), axes)
    return abstract_state(FunctionalModel(CONFIG, ModelSection(preset="tiny-llama", scan_layers=scan)), tx)


def numbered(state: TrainState) -> TrainState:
    """The same state with arrays for shapes, every element of every leaf another number."""
    leaves, structure = jax.tree.flatten(state)
    start, filled = 0, []
    for leaf in leaves:
        size = int(np.prod(leaf.shape))
        filled.append(jnp.asarray(np.arange(start, start + size).reshape(leaf.shape), leaf.dtype))
        start += size
    return jax.tree.unflatten(structure, filled)


def on_disk(state: TrainState, framework: Framework) -> dict[str, Any]:
    tree = to_disk(state.params, state.opt_state, state.step, framework=framework)
    return {"/".join(path): leaf for path, leaf in store.flatten(tree).items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_a_linen_state_lies_where_linens_users_look(optimizer: str, scan: bool) -> None:
    settings, trees, counts, empty = OPTIMIZERS[optimizer]
    expected = {f"params/params/{path}" for path in LINEN[scan]} | {"step"}
    expected |= {f"opt_state/{tree}/params/{path}" for tree in trees for path in LINEN[scan]}
    expected |= {f"opt_state/{path}" for path in (*counts, *empty)}
    found = on_disk(state_of(scan, **settings), "linen")
    assert set(found) == expected
    assert {path for path, leaf in found.items() if leaf is None} == {f"opt_state/{path}" for path in empty}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_an_nnx_state_lies_where_nnxs_users_look(optimizer: str, scan: bool) -> None:
    settings, trees, counts, empty = OPTIMIZERS[optimizer]
    expected = {f"model/{path}/value" for path in NNX[scan]} | {"optimizer/step"}
    expected |= {f"optimizer/opt_state/{tree}/{path}" for tree in trees for path in NNX[scan]}
    expected |= {f"optimizer/opt_state/{path}" for path in (*counts, *empty)}
    found = on_disk(state_of(scan, **settings), "nnx")
    assert set(found) == expected
    assert {path for path, leaf in found.items() if leaf is None} == {f"optimizer/opt_state/{path}" for path in empty}


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_frozen_parameters_have_no_moments(framework: Framework) -> None:
    state = state_of(True, trainable=("mlp/wo",))
    found = on_disk(state, framework)
    moments = {path: leaf for path, leaf in found.items() if "/mu/" in path or "/nu/" in path}
    assert len(moments) == 2 * len(LINEN[True])
    for path, leaf in moments.items():
        assert (leaf is not None) == path.endswith("decoder/layers/mlp/wo/kernel"), path
    assert sum(leaf is not None for leaf in moments.values()) == 2


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "muon", "frozen"])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_every_leaf_comes_back_to_its_place(optimizer: str, framework: Framework, scan: bool) -> None:
    others: dict[str, dict[str, Any]] = {"muon": {"name": "muon"}, "frozen": {"trainable": ("embedding", "mlp/wo")}}
    abstract = state_of(scan, **(others[optimizer] if optimizer in others else OPTIMIZERS[optimizer][0]))
    state = numbered(abstract)
    tree = to_disk(state.params, state.opt_state, state.step, framework=framework)
    assert detect_framework(tree) == framework
    params, moments, step = from_disk(tree)
    back = TrainState(step, params, optimizer_from_dict(abstract.opt_state, moments))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert one is other, "functions that only rename hand on the very arrays"


def test_both_layouts_hold_the_same_parameter_under_their_two_names() -> None:
    """Layer 1 of an unrolled model: `layers_1` and `layers/1` are one array, in the weights and in the moments."""
    state = numbered(state_of(False))
    linen, nnx = on_disk(state, "linen"), on_disk(state, "nnx")
    leaf = "mlp/wo/kernel"
    assert linen[f"params/params/decoder/layers_1/{leaf}"] is nnx[f"model/decoder/layers/1/{leaf}/value"]
    assert (
        linen[f"opt_state/0/mu/params/decoder/layers_1/{leaf}"]
        is nnx[f"optimizer/opt_state/0/mu/decoder/layers/1/{leaf}"]
    )
    assert linen["step"] is nnx["optimizer/step"]


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_parameters_may_be_stored_without_an_optimizer(framework: Framework) -> None:
    params = numbered(state_of(False)).params
    tree = to_disk(params, None, np.int32(7), framework=framework)
    found, moments, step = from_disk(tree)
    assert moments is None and step == 7
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert not any("opt_state" in "/".join(path) for path in store.flatten(tree))


def test_ten_layers_and_more_keep_their_numbers() -> None:
    """Sorted by text, layer 10 would come before layer 2."""
    params = {"decoder": {f"layers_{i}": {"scale": np.float32(i)} for i in range(12)}}
    tree = to_disk(params, None, np.int32(0), framework="nnx")
    back, _, _ = from_disk(tree)
    assert {name: leaf["scale"] for name, leaf in back["decoder"].items()} == {
        f"layers_{i}": np.float32(i) for i in range(12)
    }


def test_a_tree_of_neither_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint: top-level keys \['decoder', 'step'\]: a Linen tree has params"):
        from_disk({"decoder": {}, "step": 0})
