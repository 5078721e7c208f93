"""`run.json` says what a step is; anything that does not say it in our words is not read as ours."""

import json

import numpy as np
import pytest

from models.checkpoints.run_info import parse_run_info, read_run_info, spell_run_info

VALUES = {
    "format": "posttrain-1",
    "step": 5,
    "model": {"family": "llama", "embed_dim": 64, "attention_pattern": ("full", "sliding"), "rope_scaling": None},
    "framework": "nnx",
    "scan_layers": True,
    "param_scan_axis": 1,
    "recipe_hash": "0123abcd",
    "wandb_run_id": None,
    "data_state": {"epoch": 1, "offset": 2**40, "shuffle": [3, 1, 2]},
    "rng": {"seed": 7, "step": 5},
    "extra": {},
}


def test_what_is_written_is_read_back_equal_with_tuples_as_lists(tmp_path):
    info = parse_run_info(VALUES, where="here")
    (tmp_path / "5").mkdir()
    (tmp_path / "5/run.json").write_bytes(spell_run_info(info))
    assert read_run_info(tmp_path / "5") == info
    assert json.loads((tmp_path / "5/run.json").read_text()) == {
        **VALUES,
        "model": {**VALUES["model"], "attention_pattern": ["full", "sliding"]},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "posttrain-2"},
            r"run_info: format='posttrain-2': not ours: .*'posttrain-1'; load foreign parameters",
        ),
        ({"framework": "torch"}, r"run_info: framework: Input should be 'linen' or 'nnx'"),
        ({"step": -1}, r"step: Input should be greater than or equal to 0"),
        ({"scan_layers": 1}, r"scan_layers: Input should be a valid boolean"),
        ({"stpe": 5}, r"stpe: Extra inputs are not permitted"),
        ({"rng": {"seed": 0}}, r"rng\.step: Field required"),
        ({"data_state": {"buffer": np.arange(3)}}, r"data_state\.buffer: array.*plain JSON values; convert arrays"),
        ({"data_state": {"offsets": [0, float("nan")]}}, r"data_state\.offsets\[1\]: nan: .*NaN"),
        ({"data_state": {3: 1}}, r"data_state: key 3: keys in run.json are strings"),
    ],
)
def test_wrong_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_run_info({**VALUES, **change}, where="run_info")


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="recipe_hash: Field required"):
        parse_run_info({name: value for name, value in VALUES.items() if name != "recipe_hash"}, where="run_info")


def test_a_folder_without_our_marker_is_not_ours(tmp_path):
    (tmp_path / "5").mkdir()
    with pytest.raises(ValueError, match=r"5/run\.json: missing: not ours"):
        read_run_info(tmp_path / "5")
    for content in ("{}", "[1]", '{"format": "maxtext"}'):
        (tmp_path / "5/run.json").write_text(content)
        with pytest.raises(ValueError, match=r"5/run\.json: format=.*: not ours"):
            read_run_info(tmp_path / "5")
    (tmp_path / "5/run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is a JSON object; the step is damaged"):
        read_run_info(tmp_path / "5")


def test_a_renamed_step_is_noticed(tmp_path):
    (tmp_path / "10").mkdir()
    (tmp_path / "10/run.json").write_bytes(spell_run_info(parse_run_info(VALUES, where="here")))
    with pytest.raises(ValueError, match=r"10/run\.json: step=5: the folder is named 10"):
        read_run_info(tmp_path / "10")
