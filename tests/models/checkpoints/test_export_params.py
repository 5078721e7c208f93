"""Parameters exported alone: each slice's bytes are the bfloat16 cast's, and nothing else is in the files."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.checkpoints import export_params as module
from models.checkpoints import store
from models.checkpoints.export_params import export_params
from models.checkpoints.loader import Placement, load_params
from models.checkpoints.manager import latest_verified, list_steps
from models.checkpoints.run_info import read_run_info
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, linen_path
from models.sharding import DEFAULT_RULES
from recipes.schema import MeshSection, ModelSection
from tests.models.checkpoints.stored_models import CONFIG, LAYOUTS, Layout, weights, write_step

ROOT = Path(__file__).parents[3]


def slices_on_disk(step_dir: Path, framework: str) -> dict[tuple[str, ...], np.ndarray]:
    """Parameters as they lie in the files, under Linen's names; any other leaf but the step fails."""
    leaves = store.flatten(store.read_host(step_dir / "items", only=None))
    found = {}
    for path, value in leaves.items():
        if framework == "linen" and path[:2] == ("params", "params"):
            found[path[2:]] = value
        elif framework == "nnx" and path[0] == "model":
            assert path[-1] == "value"
            found[linen_path(tuple(int(part) if part.isdigit() else part for part in path[1:-1]))] = value
        else:
            assert path in {("step",), ("optimizer", "step")} and int(value) == 0
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_slice_is_the_bfloat16_cast_of_its_layer_and_there_is_nothing_else(
    tmp_path: Path, layout: Layout
) -> None:
    source = write_step(tmp_path / "run" / "checkpoints", layout, weights())
    written = export_params(tmp_path / "run", tmp_path / "out", scan_layers=False, verify="full")
    assert written == tmp_path / "out" / "0"
    found, expected = slices_on_disk(written, layout[0]), dict(flatten(weights()))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == ml_dtypes.bfloat16
        assert found[path].tobytes() == np.asarray(value).astype(ml_dtypes.bfloat16).tobytes(), path
    # Keys of arrays stand in the files as they are, so a moment would be seen.
    content = b"".join(path.read_bytes() for path in (written / "items").rglob("*") if path.is_file())
    assert b"decoder_norm" in content and b"opt_state" not in content
    info, original = read_run_info(written), read_run_info(source)
    assert (info.framework, info.scan_layers, info.step) == (layout[0], False, 0)
    assert info.model == original.model and info.recipe_hash == original.recipe_hash
    assert info.extra == {"exported_from_step": 5} and info.data_state is None


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4]], ids=str)
def test_layers_stay_stacked_where_that_is_asked_for(tmp_path: Path, layout: Layout) -> None:
    source = write_step(tmp_path / "source", layout, weights())
    written = export_params(source, tmp_path / "out", scan_layers=True, verify="quick")
    info = read_run_info(written)
    assert info.scan_layers and info.param_scan_axis == layout[2]
    before = store.flatten(store.read_host(source / "items", only=None))
    after = store.flatten(store.read_host(written / "items", only=None))
    kernels = [path for path in after if path[-1] != "step"]
    assert len(kernels) == 12
    for path in kernels:
        assert after[path].tobytes() == before[path].astype(ml_dtypes.bfloat16).tobytes(), path


def test_the_export_gives_the_same_logits_in_scanned_and_unrolled_models_of_both_frameworks(tmp_path: Path) -> None:
    source = write_step(tmp_path / "source", LAYOUTS[0], weights())
    export_params(source, tmp_path / "out", scan_layers=False, verify="full")
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    ids = jnp.arange(12).reshape(2, 6) % 32
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(ml_dtypes.bfloat16).astype(np.float32)), weights())
    unrolled = ModelSection(preset="tiny-llama", scan_layers=False)
    expected, _ = FunctionalModel(CONFIG, unrolled)(rounded, ids)
    for framework in ("linen", "nnx"):
        for scan in (True, False):
            section = ModelSection(preset="tiny-llama", framework=framework, scan_layers=scan)
            model = FunctionalModel(CONFIG, section)
            params = load_params(tmp_path / "out", model, placement, verify="full")
            found, _ = model(params, ids)
            # float32, relative to the largest logit: the scan sums in another order at most.
            np.testing.assert_allclose(found, expected, atol=1e-6 * float(jnp.abs(expected).max()))


def test_values_that_are_not_finite_and_trees_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    params = weights()
    params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"][2, 3] = np.nan
    # Finite in float32, and past bfloat16's largest number.
    params["decoder"]["decoder_norm"]["scale"][0] = np.finfo(np.float32).max
    source = write_step(tmp_path / "nan", LAYOUTS[3], params, moments=False)
    with pytest.raises(ValueError) as caught:
        export_params(source, tmp_path / "out", scan_layers=False, verify="full")
    said = str(caught.value)
    assert "2 parameters are not finite" in said
    assert "params/params/decoder/layers_1/mlp/wo/kernel" in said and "decoder_norm/scale" in said
    params = weights()
    del params["decoder"]["logits_dense"]
    source = write_step(tmp_path / "short", LAYOUTS[3], params, moments=False)
    with pytest.raises(ValueError, match=r"decoder/logits_dense/kernel: missing"):
        export_params(source, tmp_path / "out", scan_layers=False, verify="full")
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_and_a_destination_in_use_are_refused(tmp_path: Path) -> None:
    source = write_step(tmp_path / "source", LAYOUTS[0], weights(), moments=False)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"taken: holds notes\.txt: an export needs a folder of its own"):
        export_params(source, taken, scan_layers=False, verify="full")
    with pytest.raises(ValueError, match="is a file"):
        export_params(source, taken / "notes.txt", scan_layers=False, verify="full")
    export_params(source, tmp_path / "out", scan_layers=False, verify="full")
    with pytest.raises(ValueError, match="out: holds 0"):
        export_params(source, tmp_path / "out", scan_layers=False, verify="full")
    (source / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is damaged and was not exported; use another step:\n  run\.json"):
        export_params(source, tmp_path / "again", scan_layers=False, verify="full")
    assert (taken / "notes.txt").read_text() == "mine" and not (tmp_path / "again").exists()


def test_an_export_is_smaller_than_a_quarter_of_the_full_state(tmp_path: Path) -> None:
    """Parameters and two moments in float32 are 12 bytes a value; bfloat16 is 2. Metadata does not grow with values."""
    source = write_step(tmp_path / "source", LAYOUTS[0], weights())
    written = export_params(source, tmp_path / "out", scan_layers=True, verify="full")
    arrays = [sum(p.stat().st_size for p in (d / "items/ocdbt.process_0/d").iterdir()) for d in (source, written)]
    assert arrays[1] * 4 < arrays[0]


KILLED = """
import sys, time
from pathlib import Path
from models.checkpoints import export_params, manifest
stop = sys.argv[3]
def pause(real):
    def call(*args, **kwargs):
        print("there", flush=True)
        time.sleep(600)
        return real(*args, **kwargs)
    return call
if stop == "before the files": export_params.to_disk = pause(export_params.to_disk)
elif stop == "before the marker": manifest.write_manifest = pause(manifest.write_manifest)
else: manifest.sync_folder = pause(manifest.sync_folder)
export_params.export_params(Path(sys.argv[1]), Path(sys.argv[2]), scan_layers=False, verify="quick")
"""


def test_a_killed_export_leaves_nothing_that_loads_and_can_be_repeated(tmp_path: Path) -> None:
    source = write_step(tmp_path / "source", LAYOUTS[0], weights(), moments=False)
    moments = ("before the files", "before the marker", "while it is forced to the disk")
    children = {
        tmp_path / f"out {moment}": subprocess.Popen(
            [sys.executable, "-c", KILLED, str(source), str(tmp_path / f"out {moment}"), moment],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for moment in moments
    }
    for out, child in children.items():
        assert child.stdout is not None and child.stdout.readline() == "there\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait(120) == -signal.SIGKILL
        assert list_steps(out) == [] and latest_verified(out, "full") == (None, [])
        written = export_params(source, out, scan_layers=False, verify="full")
        assert latest_verified(out, "full") == (0, [])
        assert sorted(path.name for path in out.iterdir()) == [".lock", "0"]
        assert len(slices_on_disk(written, "nnx")) == 30


def test_leaves_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_step(tmp_path / "source", LAYOUTS[0], weights())
    real, asked = store.HostReader.read, []

    def read(reader: Any, leaves: Any) -> Any:
        asked.append(list(leaves))
        return real(reader, leaves)

    monkeypatch.setattr(module.store.HostReader, "read", read)
    export_params(source, tmp_path / "out", scan_layers=False, verify="quick")
    assert len(asked) == 12 and all(len(leaves) == 1 and leaves[0][0] == "model" for leaves in asked)
