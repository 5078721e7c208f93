"""Training states to disk and back: over meshes and memories, and what a resumption refuses by name."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.run_info import parse_run_info
from models.config import load_preset
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, param_specs
from models.sharding import DEFAULT_RULES
from pretrain.checkpointing import (
    Identity,
    abstract_items,
    find_resume_step,
    gather_data_state,
    open_manager,
    own_data_state,
    restore_state,
    state_from_items,
    state_items,
)
from pretrain.optimizers import make_optimizer
from pretrain.state import StateShardings, TrainState, abstract_state, init_state, state_shardings
from recipes.schema import CheckpointSection, MeshSection, ModelSection, OptimizerSection
from tests.pretrain.runs import assert_same_bits

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = load_preset("tiny-llama").replace(vocab_size=32, embed_dim=16, mlp_dim=24, head_dim=8)


def parts(mesh: Any = None, optimizer: Any = None, **model: Any) -> tuple[TrainState, StateShardings, TrainState]:
    """Abstract state, shardings and a first state of a run."""
    options = ModelSection(preset="tiny-llama", **model)
    functional = FunctionalModel(CONFIG, options)
    section = OptimizerSection(**(optimizer or {}))
    listed = flatten(param_specs(CONFIG, scan_layers=options.scan_layers, param_scan_axis=options.param_scan_axis))
    tx = make_optimizer(section, lambda count: 1e-3, {"/".join(path): spec.axes for path, spec in listed})
    abstract = abstract_state(functional, tx)
    mesh = make_mesh(MeshSection(num_devices=1)) if mesh is None else mesh
    shardings = state_shardings(functional, tx, abstract, mesh, DEFAULT_RULES, section)
    return abstract, shardings, init_state(functional, tx, shardings, None, seed=1)


def advanced(state: TrainState, step: int) -> TrainState:
    """The state with every leaf away from zero and of its own, at a step."""
    leaves, structure = jax.tree.flatten(state)
    moved = [jax.device_put(leaf + index + step, leaf.sharding) for index, leaf in enumerate(leaves)]
    found = jax.tree.unflatten(structure, moved)
    return TrainState(jax.device_put(jnp.asarray(step, jnp.int32), state.step.sharding), found.params, found.opt_state)


def identity(rows: int = 8, **model: Any) -> Identity:
    return Identity(CONFIG, ModelSection(preset="tiny-llama", **model), "hash", 7, rows)


def save(root: Path, state: TrainState, who: Identity, *steps: int) -> None:
    manager = open_manager(root, CheckpointSection())
    for step in steps:
        info = who.run_info(step, {"hosts": [{"at": step}]}, None, extra={"skipped_steps": 2})
        manager.save(step, state_items(advanced(state, step), who.options.framework), info, blocking=True)
    manager.close()


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_a_state_comes_back_to_the_bit(tmp_path: Path, framework: Any, scan: bool) -> None:
    model = {"framework": framework, "scan_layers": scan}
    abstract, shardings, first = parts(**model)
    save(tmp_path, first, identity(**model), 3)
    state, info = restore_state(tmp_path / "3", abstract, shardings.state, identity(**model), verify="full")
    assert_same_bits(state, advanced(first, 3))
    assert info.data_state == {"hosts": [{"at": 3}]} and info.extra == {"rows_per_step": 8, "skipped_steps": 2}
    assert (info.rng.seed, info.rng.step, info.step) == (7, 3, 3)


def test_items_and_their_abstract_twins_have_one_structure() -> None:
    abstract, shardings, state = parts()
    items, target = state_items(state, "nnx"), abstract_items(abstract, shardings.state, "nnx")
    assert jax.tree.structure(items) == jax.tree.structure(target)
    for leaf, struct in zip(jax.tree.leaves(items), jax.tree.leaves(target), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (struct.shape, struct.dtype, struct.sharding)
    assert_same_bits(state_from_items(items, abstract), state)


def test_what_a_checkpoint_says_of_its_run_is_valid_and_follows_from_the_run_alone() -> None:
    info = identity().run_info(5, None, "id", extra={"skipped_steps": 0})
    assert parse_run_info(info, where="here").step == 5
    assert info == identity().run_info(5, None, "id", extra={"skipped_steps": 0})


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        (identity(rows=16), ["rows a step: checkpoint 8, recipe 16 (devices x train.per_device_batch_size x "]),
        (identity(framework="linen"), ["model.framework: checkpoint 'nnx', recipe 'linen'"]),
        (identity(scan_layers=False), ["model.scan_layers: checkpoint True, recipe False"]),
        (
            Identity(
                CONFIG.replace(num_layers=3, rope_theta=5e5),
                ModelSection(preset="tiny-llama", param_scan_axis=0),
                "",
                7,
                9,
            ),
            [
                "num_layers: checkpoint 2, recipe 3",
                "rope_theta: checkpoint 10000.0, recipe 500000.0",
                "model.param_scan_axis: checkpoint 1, recipe 0",
                "rows a step: checkpoint 8, recipe 9 (",
            ],
        ),
    ],
    ids=["rows", "framework", "scan", "everything"],
)
def test_a_resumption_by_another_run_is_refused_key_by_key_and_loses_nothing(
    tmp_path: Path, other: Identity, lines: list[str]
) -> None:
    abstract, shardings, first = parts()
    save(tmp_path, first, identity(), 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as caught:
        restore_state(tmp_path / "3", abstract, shardings.state, other, verify="full")
    head, *said = str(caught.value).splitlines()
    assert head.startswith(f"{tmp_path / '3'}: holds another run than the recipe's; resume with the run's own recipe")
    assert "model.load_parameters_path" in head
    assert len(said) == len(lines)
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith(f"  {expected}"), line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_state_of_another_optimizer_is_refused_leaf_by_leaf(tmp_path: Path) -> None:
    _, _, first = parts()
    save(tmp_path, first, identity(), 3)
    abstract, shardings, _ = parts(optimizer={"name": "sgd", "momentum": 0.9})
    with pytest.raises(ValueError) as caught:
        restore_state(tmp_path / "3", abstract, shardings.state, identity(), verify="full")
    said = str(caught.value)
    assert "optimizer/opt_state/0/trace/decoder/layers/mlp/wo/kernel: missing" in said
    assert "optimizer/opt_state/0/mu/decoder/layers/mlp/wo/kernel: surplus" in said


def flip_a_bit(step_dir: Path) -> None:
    victim = max((path for path in (step_dir / "items").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def test_a_state_is_read_only_after_the_verification_that_was_asked_for(tmp_path: Path) -> None:
    abstract, shardings, first = parts()
    save(tmp_path, first, identity(), 3)
    flip_a_bit(tmp_path / "3")
    with pytest.raises(ValueError, match="is damaged and was not loaded"):
        restore_state(tmp_path / "3", abstract, shardings.state, identity(), verify="full")


def test_the_newest_sound_step_is_resumed(tmp_path: Path) -> None:
    assert find_resume_step(tmp_path / "nowhere", "full") is None
    _, _, first = parts()
    save(tmp_path, first, identity(), 3, 6, 9)
    assert find_resume_step(tmp_path, "full") == 9
    flip_a_bit(tmp_path / "9")
    assert find_resume_step(tmp_path, "full") == 6
    for step in (3, 6):
        flip_a_bit(tmp_path / str(step))
    with pytest.raises(ValueError) as caught:
        find_resume_step(tmp_path, "full")
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(
        f"{tmp_path}: all 3 checkpoints are damaged: nothing can be resumed; restore one of them, or"
    )
    assert [line.split(": ")[0] for line in lines] == [f"  {tmp_path / str(step)}" for step in (9, 6, 3)]


def test_a_data_position_belongs_to_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather_data_state({"at": 5}) == {"hosts": [{"at": 5}]}
    stored = {"hosts": [{"at": 0}, {"at": 1}]}
    with pytest.raises(ValueError, match=r"written by 2 hosts, resumed by 1: .* resume with the same number of hosts"):
        own_data_state(stored, tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert own_data_state(stored, tmp_path) == {"at": 1}


def on_eight_devices(folder: str) -> None:
    """Runs in a process of its own: saved on one mesh, restored on others, moments on the host or off it; exactly."""
    settings: list[tuple[dict[str, int], dict[str, Any]]] = [
        ({"fsdp": 8}, {}),
        ({"fsdp": 4, "tensor": 2}, {}),
        ({"data": 8, "fsdp": 1}, {"shard_over_data": True}),
        ({"fsdp": 8}, {"memory": "pinned_host"}),
    ]
    made = [parts(make_mesh(MeshSection(**axes)), optimizer) for axes, optimizer in settings]
    for number in (0, 3):
        first, root = made[number][2], Path(folder) / str(number)
        save(root, first, identity(), 3)
        for abstract, shardings, _ in made:
            state, _ = restore_state(root / "3", abstract, shardings.state, identity(), verify="quick")
            for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(shardings.state), strict=True):
                assert leaf.sharding == expected, (leaf.sharding, expected)
            assert_same_bits(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, advanced(first, 3)))
            print("exact")


@pytest.mark.multidevice
def test_a_state_saved_on_one_mesh_is_restored_on_another_exactly(tmp_path: Path, run_on_devices: Any) -> None:
    assert run_on_devices(8, on_eight_devices, str(tmp_path)).count("exact") == 8
