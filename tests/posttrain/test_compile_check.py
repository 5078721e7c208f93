"""The memory of a device against JAX's own bytes and XLA's; what the command says, assumes and refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models.config import load_preset
from models.functional import FunctionalModel
from models.inference.engine import Engine
from posttrain import cli, compile_check
from posttrain.abstract_step import abstract_recipe, abstract_run, compiled_memory, preset_of
from posttrain.memory_table import Entry, Widths, layer_numbers, native_engine_entries
from pretrain.runtime import runtime
from pretrain.setup import prepare_model
from pretrain.state import init_state
from recipes.load import load_recipe
from recipes.schema import GRPORecipe, ModelSection
from tests.posttrain.trainers.runs import load

SCALARS = 4 + 1
"""Bytes of a step's arguments beside state and batch: the number of completed steps, and whether to go on. Without
dropout the key is not read, and jit drops what is not read."""
UNREAD = {"sft": 1 / 6, "grpo": 0.0}
"""The part of the batch that the step does not read: of a TokenBatch's six fields the targets' positions."""
ON_MESH = ("mesh.tensor=2", "mesh.fsdp=2", "mesh.data=2")
CASES = {
    "sft": ("train.gradient_accumulation_steps=2",),
    "sft with adapters": ("lora.rank=4",),
    "sft, sharded over data": ("optimizer.shard_over_data=true", "optimizer.name=muon"),
    "grpo": ("rl.beta=0.1", "rl.num_iterations=2"),
}
IN_STATE = ("policy: parameters", "policy: optimizer")


def held(tree: Any) -> int:
    """Bytes that the first device really holds of a tree of arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def sizes(entries: list[Entry], phase: str) -> dict[str, int]:
    return {entry.what: entry.sizes[phase] for entry in entries if phase in entry.sizes}


def compare_on_devices(folder: str) -> None:
    """In a process of 8 devices: the table's bytes, those of real arrays, and XLA's of the same step."""
    for case, overrides in CASES.items():
        loaded = load(case.partition(" ")[0].rstrip(","), Path(folder), "run", *ON_MESH, *overrides)
        recipe, notes = abstract_recipe(loaded.recipe)
        with runtime(recipe.train, recipe.mesh):
            run = abstract_run(recipe, notes)
            setup, table = run.setup, sizes(run.entries, "update")
            state = init_state(setup.model, setup.tx, setup.shardings, None, seed=0)
            assert table["policy: parameters"] == held(state.params), case
            assert table["policy: optimizer"] == held(state.opt_state), case
            # One program is enough where the step's kinds are the same: compiling is what takes the time.
            if case in UNREAD:
                update = compiled_memory(run.programs[-1])
                read = table["batch"] * (1 - UNREAD[case])
                arguments = sum(table[name] for name in IN_STATE) + read + SCALARS
                assert update["argument"] == arguments, (case, update, table)
                assert update["alias"] == sum(table[name] for name in IN_STATE) + 4, case
    print("compared")


@pytest.mark.multidevice
def test_the_tables_arguments_are_jaxs_bytes_and_xlas_to_the_byte(run_on_devices, tmp_path) -> None:
    assert "compared" in run_on_devices(8, compare_on_devices, str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "overrides", "scoring"),
    [
        ("dpo", [], ["reference: parameters"]),
        ("dpo", ["dpo.reference=cached", "model.framework=linen"], ["reference: parameters"]),
        ("dpo", ["lora.rank=4"], []),
        ("dpo", ["dpo.loss=orpo"], None),
        ("distill", [], ["teacher: parameters"]),
        ("distill", ["distill.transfer=top_k", "distill.top_k=4"], ["teacher: parameters"]),
        ("grpo", ["rl.num_iterations=2"], []),
    ],
)
def test_the_programs_of_every_kind_lower_and_frozen_models_are_counted_where_they_hold_arrays(
    kind: str, overrides: list[str], scoring: list[str] | None, tmp_path
) -> None:
    recipe, notes = abstract_recipe(load(kind, tmp_path, "run", *overrides).recipe)
    run = abstract_run(recipe, notes)
    assert [program.phase for program in run.programs] == ([] if scoring is None else ["scoring"]) + ["update"]
    for program in run.programs:
        assert program.lower() is not None
    frozen = [name for name in sizes(run.entries, "scoring") if name.startswith(("reference", "teacher"))]
    assert frozen == (scoring or [])
    # What is scored before the first step and let go takes no memory in the update.
    gone = "dpo.reference=cached" in overrides
    assert not gone or "reference: parameters" not in sizes(run.entries, "update")


@pytest.mark.parametrize("remat", ["none", "minimal", "save_qkv", "full"])
@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-gemma2", "tiny-qwen3", "gpt3-52k"])
def test_what_a_layer_keeps_is_what_autodiff_keeps(preset: str, remat: str) -> None:
    """Exact but for attention's normaliser (one number a head) and a layer norm's (two), which the table leaves out."""
    config = load_preset(preset)
    section = ModelSection(preset=preset, remat=remat, attention="blocked")  # type: ignore[arg-type]
    model, batch, length = FunctionalModel(config, section), 3, 48
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    kept = jax.eval_shape(lambda p, t: jax.vjp(lambda p: model.hidden_states(p, t)[0], p)[1], params, tokens)
    per_layer = [leaf for leaf in jax.tree.leaves(kept) if leaf.shape[:1] == (config.num_layers,)]
    of_tokens = [leaf for leaf in per_layer if leaf.shape[1:3] == (batch, length)]
    found = sum(leaf.size for leaf in of_tokens) / (config.num_layers * batch * length)
    width = Widths(
        config.embed_dim, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.mlp_dim
    )
    expected = layer_numbers(config, width, remat)
    assert expected <= found <= expected + 4, [leaf.shape for leaf in of_tokens]


def test_the_native_engine_holds_what_the_table_says(tmp_path) -> None:
    recipe: Any = load("grpo", tmp_path, "run", "model.compute_dtype=bfloat16").recipe
    assert isinstance(recipe, GRPORecipe)
    setup = prepare_model(recipe, sequence_length=70)
    entries = native_engine_entries(setup, recipe.sampler, max_length=70, phases=("update",))
    engine = Engine(setup.model, num_slots=recipe.sampler.num_slots, max_length=70, steps_per_call=1)
    engine.load(jax.jit(setup.model.init)(jax.random.key(0)))
    table = sizes(entries, "update")
    assert table["sampler: weights"] == held(engine.params)
    assert table["sampler: keys and values"] == held(engine._slots)


@pytest.mark.parametrize(
    ("hub_id", "preset"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("meta-llama/Llama-2-7b-hf", "llama2-7b"),
        ("Qwen/Qwen3-0.6B-Base", "qwen3-0.6b"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
        ("google/gemma-2-2b-it", "gemma2-2b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", None),
        ("Qwen/Qwen3-30B-A3B", None),
    ],
)
def test_a_hub_id_is_known_by_its_name(hub_id: str, preset: str | None) -> None:
    assert preset_of(hub_id) == preset


def test_every_shipped_recipe_that_trains_has_an_architecture_without_the_network() -> None:
    for name in ("llama31_gsm8k", "qwen3_0p6b_gsm8k", "sft_qwen3_0p6b", "dpo_qwen3_0p6b", "distill_llama31"):
        recipe, notes = abstract_recipe(load_recipe(name, []).recipe)
        assert recipe.model.preset is not None and any("by its name" in note for note in notes), name


@pytest.mark.parametrize(
    ("overrides", "asked", "count"),
    [
        ([], None, 8),
        ([], 3, 3),
        (["mesh.tensor=3"], None, 9),
        (["mesh.fsdp=2", "mesh.tensor=2"], None, 4),
        (["mesh.fsdp=2", "mesh.dcn_data=3"], None, 6),
        (["mesh.num_devices=5"], None, 5),
        (["mesh.num_devices=5"], 5, 5),
    ],
)
def test_devices_are_the_meshs_or_assumed_and_said(overrides: list[str], asked: int | None, count: int) -> None:
    mesh = load_recipe("pretrain_tiny", overrides).recipe.mesh  # type: ignore[attr-defined]
    found, notes = compile_check.mesh_devices(mesh, asked)
    assert found == count
    assert bool(notes) == (asked is None and not any("fsdp" in one or "num_devices" in one for one in overrides))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["check", "--compile", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--devices", "4", "mesh.num_devices=2"], "--devices=4: mesh.num_devices is 2; remove --devices"),
        (["--timeout", "0"], "--timeout=0: an amount above 0"),
        (["--device-memory-gib", "-1"], "--device-memory-gib=-1: an amount above 0"),
        (["--prompts", "4"], "--prompts=4: it has no effect with --compile, which samples nothing; remove it"),
        (["--timeout", "0.01"], "pretrain_tiny.yaml: --timeout=0.01: lowering and compiling for 8 devices took longer"),
    ],
)
def test_mistakes_and_a_process_that_takes_too_long_are_told(capsys, arguments: list[str], line: str) -> None:
    code, out, err = run(capsys, "pretrain_tiny", *arguments)
    assert code == 2 and not out and line in err, err


@pytest.mark.parametrize(
    ("ended", "line"),
    [
        (subprocess.CompletedProcess([], 0, 'log\n{"error": "mesh: no\\nrl: no"}', ""), "mesh: no\nrecipes/pretrain"),
        (
            subprocess.CompletedProcess([], -9, "", "out of memory"),
            "the process that lowers and compiles ended by signal 9",
        ),
    ],
)
def test_a_process_that_refuses_or_dies_is_told(capsys, monkeypatch, ended: Any, line: str) -> None:
    monkeypatch.setattr(compile_check.subprocess, "run", lambda *_, **__: ended)
    code, _, err = run(capsys, "pretrain_tiny")
    assert code == 2 and line in err and ended.stderr in err


def found(**changes: Any) -> dict[str, Any]:
    """An answer of the process: 3 GiB in the update, 1 in the rollout, and half of the device for vLLM."""
    entry = {"what": "policy: parameters", "sizes": {"rollout": 2**30, "update": 3 * 2**30}, "exact": True}
    program = dict.fromkeys(("argument", "output", "alias", "temp", "host_argument", "host_temp"), 2**30)
    return {
        "parameters": 1,
        "mesh": {"fsdp": 8},
        "num_devices": 8,
        "phases": ["rollout", "update"],
        "entries": [entry],
        "programs": [{"phase": "update", "seconds": 1.0, **program}],
        "assumptions": ["a thing"],
        "memory_share": 0.5,
        "bfloat16": False,
        **changes,
    }


@pytest.mark.parametrize(
    ("memory", "fits", "says"),
    # 3 GiB and half of 6 are 6; of 5.9 the half is too little.
    [(None, True, "the most is 3.00 GiB"), (6.0, True, "fits: 6.00 GiB"), (5.9, False, "does not fit: 5.95 GiB")],
)
def test_the_largest_phase_with_the_samplers_share_is_compared_with_the_memory(
    capsys, monkeypatch, memory: float | None, fits: bool, says: str
) -> None:
    monkeypatch.setattr(compile_check, "ask", lambda *_: found())
    options = [] if memory is None else ["--device-memory-gib", str(memory)]
    code, out, _ = run(capsys, "pretrain_tiny", *options)
    assert code == (0 if fits else 1) and says in out
    assert ("beside it vLLM takes 50 %" in out) == (memory is None)
    assert "lowered for CPU" in out and "- a thing" in out
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.slow
def test_the_command_prints_phases_beside_xlas_figures_of_a_real_step(capsys, tmp_path) -> None:
    """Twice, so that the second answer comes from the cache of compiled programs; figures are the same."""
    load("grpo", tmp_path, "run")
    answers = [run(capsys, str(tmp_path / "grpo.yaml"), "--devices", "2", "rl.beta=0.1") for _ in range(2)]
    code, out, err = answers[0]
    assert code == 0 and not err
    header = next(line for line in out.splitlines() if line.startswith("MiB of a device"))
    assert header.split()[-3:] == ["rollout", "scoring", "update"]
    for what in ("policy: optimizer", "reference: parameters", "sampler: keys and values", "logits of a chunk *"):
        assert any(line.startswith(what) for line in out.splitlines()), what
    temporaries = next(line for line in out.splitlines() if line.startswith("temporaries")).split()[1:]
    assert temporaries[0] == "-" and all(float(value) > 0 for value in temporaries[1:])
    assert not (tmp_path / "run").exists()
    same = [[line for line in answer[1].splitlines() if not line.startswith("lowered")] for answer in answers]
    assert same[0] == same[1]


@pytest.mark.slow
def test_llama_31_8b_answers_offline_within_a_minute(tmp_path) -> None:
    command = [sys.executable, "-m", "posttrain", "check", "--compile", "llama31_gsm8k", "--device-memory-gib", "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "8,030,261,248 parameters on 8 devices (fsdp=8)" in done.stdout and "verdict: fits" in done.stdout
