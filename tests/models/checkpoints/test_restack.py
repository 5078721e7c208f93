"""Layers stacked and split on the host: moments exactly like their weights, whatever the optimizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoints.convert import convert
from models.checkpoints.restack import Layout, restack_moments
from models.checkpoints.run_info import read_run_info
from tests.models.checkpoints.conversions import assert_same_step, config_of, leaves, small_step, target, write_step

OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "adamw"},
    {"name": "adam_pax"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "muon"},
    {"name": "adafactor", "momentum": 0.9},
    {"name": "adamw", "trainable": ["mlp", "norm"]},
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda section: "-".join(map(str, section.values())))
def test_moments_of_every_optimizer_move_with_their_weights(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """Each moment's layer 10 of the split tree is the 11th slice of the stacked one, as its weight is.

    Eleven layers, so that their names sort otherwise than their numbers.
    """
    config = config_of("llama", tied=False, num_layers=11)
    source = write_step(tmp_path / "a", config, framework="linen", scan=True, optimizer=optimizer)
    split = convert(source, tmp_path / "b", target("linen", scan_layers=False), config=None, from_step=None).written
    back = convert(split, tmp_path / "c", target("linen", scan_layers=True), config=None, from_step=None).written
    assert_same_step(source, back)
    stacked, unstacked = leaves(source), leaves(split)
    checked = 0
    for path, value in stacked.items():
        if "layers" not in path or value is None or value.shape == (1,):
            continue
        at = path.index("layers")
        for number in (0, 9, 10):
            own = unstacked[(*path[:at], f"layers_{number}", *path[at + 1 :])]
            assert np.array_equal(own, np.take(value, number, axis=min(1, value.ndim - 1))), path
            checked += 1
    assert checked > 0


def test_layers_stacked_along_the_first_axis_are_split_and_stacked_too(tmp_path: Path) -> None:
    source = small_step(tmp_path, axis=0)
    split = convert(source, tmp_path / "b", target("linen", scan_layers=False), config=None, from_step=None).written
    second = convert(split, tmp_path / "c", target("linen", scan_layers=True), config=None, from_step=None).written
    path = ("decoder", "layers", "self_attention", "query", "kernel")
    for prefix in (("params", "params"), ("opt_state", "0", "nu", "params")):
        first = leaves(source)[(*prefix, *path)]
        assert first.shape[0] == 3
        assert np.array_equal(np.moveaxis(first, 0, 1), leaves(second)[(*prefix, *path)])
    assert [read_run_info(step).param_scan_axis for step in (source, split, second)] == [0, 1, 1]


def test_adafactors_means_are_stacked_where_the_same_axes_are_factored() -> None:
    """By hand: of [130, 3, 140] the means over axis 2 are [130, 3], those over axis 0 are [3, 140]."""
    config = config_of("llama", tied=True, num_layers=3).replace(embed_dim=130, mlp_dim=140)
    generator = np.random.default_rng(0)

    def tree(shape: tuple[int, ...]) -> dict[str, Any]:
        return {"decoder": {"layers": {"mlp": {"wi_0": {"kernel": generator.normal(size=shape)}}}}}

    moments = {"0": {"v_row": tree((130, 3)), "v_col": tree((3, 140)), "v": tree((1,))}}
    split = restack_moments(moments, config, Layout(True, 1), Layout(False, 1))

    def of(tree: Any, layer: str) -> np.ndarray:
        return tree["decoder"][layer]["mlp"]["wi_0"]["kernel"]

    for number in range(3):
        layer = f"layers_{number}"
        assert np.array_equal(of(split["0"]["v_row"], layer), of(moments["0"]["v_row"], "layers")[:, number])
        assert np.array_equal(of(split["0"]["v_col"], layer), of(moments["0"]["v_col"], "layers")[number])
        assert np.array_equal(of(split["0"]["v"], layer), of(moments["0"]["v"], "layers"))
    back = restack_moments(split, config, Layout(False, 1), Layout(True, 1))
    for name in ("v_row", "v_col", "v"):
        assert np.array_equal(of(back["0"][name], "layers"), of(moments["0"][name], "layers"))


def test_adafactors_means_over_layers_are_refused() -> None:
    """150 layers of [16, 200]: together 200 and 150 are factored, alone nothing is."""
    config = config_of("llama", tied=True, num_layers=150).replace(mlp_dim=200)
    tree = {"decoder": {"layers": {"mlp": {"wi_0": {"kernel": np.zeros((16, 150))}}}}}
    with pytest.raises(ValueError, match=r"0/v_row/mlp/wi_0/kernel: Adafactor's means .* run over different axes"):
        restack_moments({"0": {"v_row": tree}}, config, Layout(True, 1), Layout(False, 1))


def test_a_parameter_frozen_in_some_layers_is_not_stacked_without_a_word(tmp_path: Path) -> None:
    source = small_step(tmp_path, scan=False, optimizer={"name": "adamw", "trainable": ["layers_1/mlp"]})
    with pytest.raises(ValueError, match=r"mu/mlp/wi_0/kernel: layers \[0, 2\] have no moment and the others have"):
        convert(source, tmp_path / "b", target("linen", scan_layers=True), config=None, from_step=None)
    assert not (tmp_path / "b").exists()
