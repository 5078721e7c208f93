"""Parameters of any checkpoint of ours into any model of the same architecture, and what is refused."""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from models.checkpoints import store
from models.checkpoints.layouts import Framework, to_disk
from models.checkpoints.loader import Placement, find_step_dir, load_params
from models.checkpoints.manager import CheckpointManager
from models.config import load_preset
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, init_params, stack_layers
from models.sharding import DEFAULT_RULES
from recipes.schema import MeshSection, ModelSection

CONFIG = load_preset("tiny-llama").replace(vocab_size=32, embed_dim=16, mlp_dim=24, num_layers=3, head_dim=8)
Layout = tuple[Framework, bool, int]
LAYOUTS: tuple[Layout, ...] = (
    ("nnx", True, 1),
    ("nnx", False, 1),
    ("linen", True, 1),
    ("linen", False, 1),
    ("linen", True, 0),
)


def section(layout: Layout, **changes: Any) -> ModelSection:
    framework, scan, axis = layout
    return ModelSection(
        preset="tiny-llama", framework=framework, scan_layers=scan, param_scan_axis=axis if scan else 1, **changes
    )


def weights() -> dict[str, Any]:
    """Unrolled parameters, norms included, every one of its own."""
    params = init_params(CONFIG, jax.random.key(3), scan_layers=False, param_scan_axis=1, dtype="float32")
    keys = iter(jax.random.split(jax.random.key(4), 100))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), params)


def arranged(layout: Layout) -> dict[str, Any]:
    _, scan, axis = layout
    return stack_layers(weights(), CONFIG.num_layers, axis) if scan else weights()


def write(
    root: Path, layout: Layout, params: dict[str, Any] | None = None, *, step: int = 5, ocdbt: bool = True
) -> Path:
    """A step with parameters and an optimizer's state beside them; returns its folder."""
    framework, scan, axis = layout
    params = arranged(layout) if params is None else params
    moments = {"0": {"mu": jax.tree.map(jnp.ones_like, params), "count": np.int32(step)}, "1": None}
    items = to_disk(params, moments, np.int32(step), framework=framework)
    info = {
        "format": "posttrain-1",
        "step": step,
        "model": CONFIG.model_dump(mode="json"),
        "framework": framework,
        "scan_layers": scan,
        "param_scan_axis": axis,
        "recipe_hash": "",
        "wandb_run_id": None,
        "data_state": None,
        "rng": {"seed": 0, "step": step},
        "extra": {},
    }
    options = store.StoreOptions(ocdbt=ocdbt, zarr3=True, target_file_bytes=1 << 31)
    with CheckpointManager(root, options=options, keep=None) as manager:
        manager.save(step, jax.tree.map(jnp.asarray, items), info, blocking=True)
    return root / str(step)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """A step in each layout."""
    folder = tmp_path_factory.mktemp("loader")
    return {layout: write(folder / str(index) / "checkpoints", layout) for index, layout in enumerate(LAYOUTS)}


def load(path: Path, layout: Layout, *, verify: Any = "full", **changes: Any) -> dict[str, Any]:
    options = section(layout, **changes)
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_params(path, FunctionalModel(CONFIG, options), placement, verify=verify)


def assert_holds(found: dict[str, Any], expected: dict[str, Any]) -> None:
    left, right = dict(flatten(found)), dict(flatten(expected))
    assert left.keys() == right.keys()
    for path, leaf in right.items():
        assert left[path].dtype == leaf.dtype and left[path].shape == leaf.shape, path
        np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(leaf), err_msg="/".join(path))


@pytest.mark.parametrize("to", LAYOUTS, ids=str)
@pytest.mark.parametrize("origin", LAYOUTS, ids=str)
def test_any_layout_loads_into_any_other(stored: dict[Layout, Path], origin: Layout, to: Layout) -> None:
    """Linen and NNX, scanned and unrolled, the layer axis at 0 and 1: the same bits at the place that is expected."""
    assert_holds(load(stored[origin], to, verify="quick"), arranged(to))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_model_computes_with_loaded_parameters_what_it_computed_before(
    stored: dict[Layout, Path], framework: Framework
) -> None:
    ids = jnp.arange(12).reshape(2, 6) % 32
    expected, _ = FunctionalModel(CONFIG, section(("nnx", False, 1)))(weights(), ids)
    layout: Layout = (framework, True, 1)
    found, _ = FunctionalModel(CONFIG, section(layout))(load(stored["linen", False, 1], layout), ids)
    np.testing.assert_allclose(found, expected, atol=1e-6 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=str)
def test_parameters_are_cast_to_the_models_dtype(stored: dict[Layout, Path], layout: Layout) -> None:
    found = load(stored["nnx", True, 1], layout, param_dtype="bfloat16")
    assert_holds(found, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arranged(layout)))


def test_a_narrow_checkpoint_widens_exactly(tmp_path: Path) -> None:
    layout = LAYOUTS[0]
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arranged(layout))
    assert_holds(load(write(tmp_path, layout, narrow), layout), jax.tree.map(lambda x: x.astype(jnp.float32), narrow))


def test_what_was_loaded_is_said(stored: dict[Layout, Path], caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("models.checkpoints.loader")
    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=log.name):
            load(stored[LAYOUTS[0]], LAYOUTS[0])
    finally:
        log.removeHandler(caplog.handler)
    assert f"Loaded params from {stored[LAYOUTS[0]]}" in caplog.messages


def test_the_optimizers_bytes_are_never_read(tmp_path: Path) -> None:
    """Every file of the moments' values holds garbage of the same length, and the parameters load all the same."""
    layout = LAYOUTS[0]
    step = write(tmp_path, layout, ocdbt=False)
    files = [path for path in (step / "items").rglob("*") if path.is_file() and "opt_state" in str(path)]
    files = [path for path in files if path.name != "zarr.json"]
    assert len(files) > 10
    for path in files:
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert_holds(load(step, layout, verify="quick"), arranged(layout))
    with pytest.raises(ValueError, match=r"is damaged and was not loaded.*\n.*opt_state"):
        load(step, layout, verify="full")


def test_a_step_is_found_from_wherever_in_the_run_it_was_pointed_at(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (3, 12, 5):
        write(run / "checkpoints", LAYOUTS[3], step=step)
    newest, older = run / "checkpoints/12", run / "checkpoints/5"
    for path, expected in {
        run: newest,
        run / "checkpoints": newest,
        newest: newest,
        older: older,
        older / "items": older,
    }.items():
        assert find_step_dir(path, where="key") == expected
    (tmp_path / "empty").mkdir()
    for path, state in {tmp_path / "nowhere": "does not exist", tmp_path / "empty": "has no run.json"}.items():
        with pytest.raises(ValueError, match=rf"^some\.key={path}: {state}.*correct the path"):
            find_step_dir(path, where="some.key")


def test_another_architecture_is_refused_field_by_field(stored: dict[Layout, Path]) -> None:
    other = CONFIG.replace(num_layers=2, rope_theta=5e5)
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    with pytest.raises(ValueError) as caught:
        model = FunctionalModel(other, section(LAYOUTS[0]))
        load_params(stored[LAYOUTS[0]], model, placement, verify="quick")
    head, *lines = str(caught.value).splitlines()
    assert "holds another architecture than the recipe's model; use its preset and overrides" in head
    assert lines == ["  num_layers: checkpoint 3, recipe 2", "  rope_theta: checkpoint 10000.0, recipe 500000.0"]


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_missing_and_surplus_leaves_are_named_together(tmp_path: Path, layout: Layout) -> None:
    params = arranged(layout)
    del params["decoder"]["layers"]["mlp"]["wo"]
    params["decoder"]["extra"] = {"kernel": jnp.zeros(2)}
    root, end = ("model", "/value") if layout[0] == "nnx" else ("params/params", "")
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, layout, params), layout)
    said = str(caught.value)
    assert f"{root}/decoder/layers/mlp/wo/kernel{end}: missing: the target wants float32[24, 3, 16]" in said
    assert f"{root}/decoder/extra/kernel{end}: surplus: the checkpoint holds float32[2]" in said


def test_a_leaf_of_another_shape_is_named(tmp_path: Path) -> None:
    layout = LAYOUTS[3]
    params = arranged(layout)
    params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"] = jnp.zeros((16, 24))
    with pytest.raises(ValueError, match=r"layers_1/mlp/wo/kernel: shape: .*float32\[16, 24\], .*float32\[24, 16\]"):
        load(write(tmp_path, layout, params), layout)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4]], ids=str)
def test_a_value_that_is_not_finite_is_refused_by_the_leafs_name_and_layer(
    tmp_path: Path, value: float, layout: Layout
) -> None:
    params = arranged(layout)
    kernel = params["decoder"]["layers"]["self_attention"]["key"]["kernel"]
    # Layer 1, in whichever axis the layers stand.
    index = (3, 1, 0, 2) if layout[2] == 1 else (1, 3, 0, 2)
    params["decoder"]["layers"]["self_attention"]["key"]["kernel"] = kernel.at[index].set(value)
    root, end = ("model", "/value") if layout[0] == "nnx" else ("params/params", "")
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, layout, params), LAYOUTS[1])
    head, *lines = str(caught.value).splitlines()
    assert "1 parameters of the checkpoint don't fit the model" in head
    path = f"{root}/decoder/layers/self_attention/key/kernel{end}"
    assert lines == [f"  {path}: not finite: holds NaN or infinity, in layers [1]; training from it gives NaN"]


def test_missing_surplus_misshapen_and_infinite_leaves_are_one_error(tmp_path: Path) -> None:
    """Whatever is wrong with a tree is said at once, so that a person mends it at once."""
    layout = LAYOUTS[3]
    params = arranged(layout)
    layers = [params["decoder"][f"layers_{i}"] for i in range(3)]
    del layers[0]["mlp"]["wo"]
    layers[1]["mlp"]["wi_0"]["kernel"] = jnp.zeros((16, 25))
    layers[2]["mlp"]["extra"] = {"kernel": jnp.zeros(2)}
    layers[2]["mlp"]["wi_1"]["kernel"] = jnp.zeros((16, 24), jnp.int32)
    params["decoder"]["decoder_norm"]["scale"] = jnp.full(16, jnp.nan)
    with pytest.raises(ValueError) as caught:
        load(write(tmp_path, layout, params), layout)
    head, *lines = str(caught.value).splitlines()
    assert "5 parameters of the checkpoint don't fit the model" in head
    assert [line.strip().split(": ")[:2] for line in lines] == [
        ["params/params/decoder/decoder_norm/scale", "not finite"],
        ["params/params/decoder/layers_0/mlp/wo/kernel", "missing"],
        ["params/params/decoder/layers_1/mlp/wi_0/kernel", "shape"],
        ["params/params/decoder/layers_2/mlp/extra/kernel", "surplus"],
        ["params/params/decoder/layers_2/mlp/wi_1/kernel", "dtype"],
    ]


def test_a_damaged_file_is_refused_by_name(stored: dict[Layout, Path], tmp_path: Path) -> None:
    step = tmp_path / "5"
    shutil.copytree(stored[LAYOUTS[0]], step)
    victim = max((path for path in (step / "items").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match=rf"is damaged and was not loaded; use another step:\n.*{victim.name}"):
        load(step, LAYOUTS[0])


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    step = write(tmp_path, LAYOUTS[0])
    (step / "run.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="was not loaded"):
        load(step, LAYOUTS[0], verify="quick")


def on_eight_devices(root: str) -> None:
    """Runs in a process of its own: every leaf arrives split as the model's rules say, with the same values."""
    mesh = make_mesh(MeshSection(fsdp=4, tensor=2))
    for layout in (LAYOUTS[0], LAYOUTS[3]):
        model = FunctionalModel(CONFIG, section(layout))
        params = load_params(root, model, Placement(mesh, DEFAULT_RULES), verify="quick")
        assert_holds(params, arranged(layout))
        layer = params["decoder"]["layers"] if layout[1] else params["decoder"]["layers_0"]
        kernel = layer["mlp"]["wi_0"]["kernel"]
        assert kernel.sharding.spec == (
            PartitionSpec("fsdp", None, "tensor") if layout[1] else PartitionSpec("fsdp", "tensor")
        )
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size
        print("split")
        narrow = load_params(
            root,
            FunctionalModel(CONFIG, section(layout, param_dtype="bfloat16")),
            Placement(mesh, DEFAULT_RULES),
            verify="quick",
        )
        assert_holds(narrow, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), arranged(layout)))


@pytest.mark.multidevice
def test_parameters_arrive_sharded(stored: dict[Layout, Path], run_on_devices: Any) -> None:
    assert run_on_devices(8, on_eight_devices, str(stored["nnx", True, 1])).count("split") == 2
