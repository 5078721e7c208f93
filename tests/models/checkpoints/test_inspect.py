"""What an inspection says of checkpoints: ours in each layout, damaged, MaxText's, Hugging Face's."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.checkpoints import store
from models.checkpoints.huggingface import ModelCard, export_hf
from models.checkpoints.inspect import Inspection, inspect_checkpoint, size_text
from models.mesh import make_mesh
from recipes.schema import MeshSection
from tests.models.checkpoints.stored_models import CONFIG, LAYOUTS, Layout, weights, write_step

# By hand: D 16, F 24, V 32, 4 heads and 2 kv heads of 8. A layer has 3*16*24 + 2*16*4*8 + 2*16*2*8 + 2*16 = 2720
# values; the model 3*2720 + 2*32*16 + 16 = 9200.
NUM_VALUES = 9200


def inspect(path: Path, *, verify: Any = "full", verbose: bool = False) -> tuple[Inspection, dict[str, str]]:
    found = inspect_checkpoint(path, verify=verify, verbose=verbose)
    assert len(dict(found.facts)) == len(found.facts)
    return found, dict(found.facts)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_full_state_is_told_with_its_totals_origin_and_integrity(tmp_path: Path, layout: Layout) -> None:
    step = write_step(tmp_path / "run" / "checkpoints", layout, weights())
    found, facts = inspect(tmp_path / "run")
    framework, scan, axis = layout
    layers = f"layers stacked along axis {axis}" if scan else "layers apart"
    assert facts["path"] == str(step) and facts["format"] == "posttrain-1" and facts["step"] == "5"
    assert facts["layout"] == f"{'NNX' if framework == 'nnx' else 'Linen'}, {layers}, full state"
    assert facts["recipe hash"] == "abc123" and facts["framework"] == framework
    assert facts["model"].startswith("llama num_layers=3 embed_dim=16")
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert facts["integrity"].startswith(f"sound: {len(files)} files, ")
    assert facts["integrity"].endswith("by SHA-256 of every byte")
    totals = {name: (count, values, size) for name, count, values, size in found.totals}
    num_arrays = 12 if scan else 30
    assert totals["params"] == (num_arrays, NUM_VALUES, 4 * NUM_VALUES)
    assert totals["opt_state"] == (2 * num_arrays + 1, 2 * NUM_VALUES + 1, 4 * (2 * NUM_VALUES + 1))
    assert totals["all"] == (3 * num_arrays + 2, 3 * NUM_VALUES + 2, 4 * (3 * NUM_VALUES + 2))
    assert found.problems == []


def test_layers_that_are_alike_share_a_row_unless_each_is_asked_for(tmp_path: Path) -> None:
    params = weights()
    params["decoder"]["layers_2"]["mlp"]["wo"]["kernel"] = params["decoder"]["layers_2"]["mlp"]["wo"]["kernel"].astype(
        np.float16
    )
    step = write_step(tmp_path, LAYOUTS[1], params, moments=False)
    found, _ = inspect(step)
    rows = {(row.name, row.dtype): row for row in found.rows}
    shared = rows["model/decoder/layers/*/self_attention/query/kernel/value", "float32"]
    assert (shared.shape, shared.count, shared.num_bytes) == ((16, 4, 8), 3, 3 * 4 * 512)
    assert rows["model/decoder/layers/*/mlp/wo/kernel/value", "float32"].count == 2
    assert rows["model/decoder/layers/2/mlp/wo/kernel/value", "float16"].count == 1
    assert len(inspect(step, verbose=True)[0].rows) == 31
    # Parameters stand first.
    assert [row.name for row in found.rows][-1] == "optimizer/step"


def test_a_damaged_step_is_told_by_its_problems_and_its_tree_is_not_trusted(tmp_path: Path) -> None:
    step = write_step(tmp_path, LAYOUTS[0], weights())
    victim = max((path for path in (step / "items").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    found, facts = inspect(step)
    assert facts["integrity"] == "DAMAGED: 1 problem" and found.rows == []
    assert found.problems[0].startswith(f"{victim.relative_to(step).as_posix()}: changed: SHA-256 ")
    # The quick mode reads no content, and says so.
    quick, facts = inspect(step, verify="quick")
    assert quick.problems == [] and facts["integrity"].endswith("by names and sizes only (--quick)")
    victim.unlink()
    assert "missing" in inspect(step, verify="quick")[0].problems[0]


def test_the_newest_step_of_a_run_is_told_damaged_or_not_and_the_others_are_named(tmp_path: Path) -> None:
    for number in (3, 12, 5):
        write_step(tmp_path / "checkpoints", LAYOUTS[0], weights(), step=number, moments=False)
    _, facts = inspect(tmp_path)
    assert facts["step"] == "12" and facts["other steps"] == "3 5"
    # What a writer without a commit marker would leave.
    half = tmp_path / "checkpoints" / "20"
    shutil.copytree(tmp_path / "checkpoints" / "12" / "items" / "array_metadatas", half / "items" / "array_metadatas")
    found, facts = inspect(tmp_path)
    assert facts["path"] == str(half) and found.problems == ["manifest.json: missing: the step was not completed"]


@pytest.mark.parametrize("depth", ["step", "items"])
def test_a_maxtext_checkpoint_is_told_as_not_ours(tmp_path: Path, shared_dir: Path, depth: str) -> None:
    folder = shared_dir / "fixtures/maxtext/llama-tiny"
    found, facts = inspect(folder if depth == "step" else folder / "items")
    assert facts["format"] == "not ours: no posttrain-1 marker"
    assert facts["layout"] == "Linen with nnx_aux, layers stacked along axis 1, full state"
    # It made 6 steps (its README says so).
    assert facts["step"] == "6" and facts["integrity"] == "not checked: no manifest of ours"
    totals = {name: values for name, _, values, _ in found.totals}
    # D 64, F 128, V 512, 3 layers, 4 and 2 heads of 16: 3*(3*64*128 + 2*64*64 + 2*64*32 + 2*64) + 2*512*64 + 64.
    assert totals["params"] == 3 * (24576 + 8192 + 4096 + 128) + 65536 + 64
    assert totals["rngs"] == 3 * 3 * (1 + 4) + 3 * (1 + 4)


def test_a_hugging_face_folder_is_told(tmp_path: Path) -> None:
    export_hf(
        tmp_path / "hf",
        CONFIG,
        weights(),
        param_scan_axis=1,
        dtype="bfloat16",
        max_shard_bytes=1 << 30,
        tokenizer_source=None,
        generation={},
        card=ModelCard("x", None, ""),
    )
    found, facts = inspect(tmp_path / "hf")
    assert facts["format"] == "Hugging Face" and facts["step"] == "none"
    rows = {row.name: row for row in found.rows}
    assert rows["model.layers.*.mlp.down_proj.weight"].count == 3
    assert rows["model.layers.*.mlp.down_proj.weight"].dtype == "bfloat16"
    assert found.totals[-1] == ("all", 30, NUM_VALUES, 2 * NUM_VALUES)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no run\.json with our format marker"):
        inspect(tmp_path)


def test_sizes_are_told_in_binary_units() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 2**20, 3 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "3.0 GiB",
        "2.0 TiB",
    ]


def write_on_a_mesh(root: str) -> None:
    """Runs in a process of its own."""
    mesh = make_mesh(MeshSection(fsdp=4, tensor=2))
    tree = {
        "params": {
            "params": {
                "decoder": {
                    "both": jax.device_put(
                        np.zeros((8, 4, 2)), NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
                    ),
                    "merged": jax.device_put(np.zeros(8), NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))),
                    "whole": jax.device_put(np.zeros(3), NamedSharding(mesh, PartitionSpec())),
                }
            }
        }
    }
    store.save(Path(root) / "items", tree, options=store.StoreOptions(True, True, 1 << 31))
    found = inspect_checkpoint(Path(root) / "items", verify="quick", verbose=False)
    assert dict(found.facts)["written on mesh"] == "fsdp=4 tensor=2"
    assert {row.name.split("/")[-1]: row.placement for row in found.rows} == {
        "both": "(fsdp, -, tensor)",
        "merged": "(fsdp+tensor)",
        "whole": "()",
    }


@pytest.mark.multidevice
def test_the_mesh_that_wrote_a_checkpoint_is_told(tmp_path: Path, run_on_devices: Any) -> None:
    run_on_devices(8, write_on_a_mesh, str(tmp_path))
