"""A recipe's step as shapes: built by the trainer's own functions, lowered and compiled, never run.

It runs in a process of its own (`python -m posttrain.abstract_step RECIPE.yaml`), whose fake CPU devices are as many as
the recipe's mesh has; its answer is the last line of stdout, as JSON.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.checkpoints.hf_config import resolve_config
from models.checkpoints.loader import Placement
from models.config import TransformerConfig, preset_names
from models.functional import FunctionalModel, Params
from models.ops import vocab
from models.sharding import activation_mesh
from posttrain.bundle import AdapterBase, FrozenRole, Role
from posttrain.data.policy_rows import SampledSequence, pack
from posttrain.losses.preference import PREFERENCES
from posttrain.memory_table import (
    ROLLOUT,
    SCORING,
    UPDATE,
    Entry,
    FrozenModel,
    Rows,
    frozen_entries,
    native_engine_entries,
    sharded_bytes,
    state_entries,
    work_entries,
)
from posttrain.process import start_process
from posttrain.samplers.vllm_settings import CUDA_BUILD, check_model
from posttrain.trainers.policy_step import make_scorer, make_update, shares_prompts
from pretrain.batching import field_sharding
from pretrain.data.batch import padding_batch
from pretrain.losses import make_loss_fn
from pretrain.runtime import runtime
from pretrain.session import step_options
from pretrain.setup import ModelSetup, prepare_model
from pretrain.start import param_shardings
from pretrain.step import jit_train_step, make_train_step
from recipes.load import load_recipe
from recipes.schema import (
    DistillRecipe,
    DPORecipe,
    GRPORecipe,
    MeshSection,
    ModelSection,
    PretrainRecipe,
    SamplerSection,
    SFTRecipe,
    TrainingRecipe,
)

_IGNORED_IN_NAMES = re.compile(r"^meta-|-(instruct|it|hf|base|chat|v0\.1)\b|[-_]")


@dataclass(frozen=True)
class Program:
    """A compiled program of the step."""

    phase: str
    lower: Callable[[], Any]
    """Gives what jax.jit(...).lower gives."""


@dataclass(frozen=True)
class AbstractRun:
    """A run as shapes."""

    setup: ModelSetup
    phases: tuple[str, ...]
    entries: list[Entry]
    programs: list[Program]
    assumptions: list[str]
    memory_share: float | None
    """The part of a device's memory that the sampler takes beside all this; None where it is among the entries."""


# --- what is assumed ---


def preset_of(hub_id: str) -> str | None:
    """The shipped preset of a hub id's architecture, by its name: Llama-3.1-8B-Instruct is llama3.1-8b."""

    def bare(name: str) -> str:
        return _IGNORED_IN_NAMES.sub("", name.lower())

    wanted = bare(hub_id.rpartition("/")[2])
    return next((name for name in preset_names() if bare(name) == wanted), None)


def offline_section(section: ModelSection, where: str) -> tuple[ModelSection, list[str]]:
    """The section with an architecture that needs no network, as far as there is one, and what that assumes."""
    if section.hf_path is None or Path(section.hf_path).expanduser().is_dir():
        return section, []
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(section.hf_path, "config.json") if section.hf_path.count("/") < 2 else None
    if isinstance(kept, str):
        note = f"{where}.hf_path={section.hf_path}: its config.json is the one in the hub's cache"
        return section.model_copy(update={"hf_path": str(Path(kept).parent)}), [note]
    preset = preset_of(section.hf_path)
    if preset is None:
        return section, []
    note = f"{where}.hf_path={section.hf_path}: the architecture is that of preset {preset}, by its name"
    return section.model_copy(update={"hf_path": None, "preset": preset}), [note]


def abstract_recipe(recipe: Any) -> tuple[TrainingRecipe, list[str]]:
    """A training recipe for shapes: architectures without the network, one process, slices as a longer data axis."""
    section, notes = offline_section(recipe.model, "model")
    changed: dict[str, Any] = {"model": section, "mesh": one_process(recipe.mesh)}
    if isinstance(recipe, DistillRecipe):
        changed["teacher"], more = offline_section(recipe.teacher, "teacher")
        notes += more
    return recipe.model_copy(update=changed), notes


def one_process(mesh: MeshSection) -> MeshSection:
    """The same mesh in one process."""
    data = mesh.data if mesh.data == -1 else mesh.data * mesh.dcn_data
    alone = {"num_processes": 1, "process_id": None, "coordinator_address": None}
    return mesh.model_copy(update={**alone, "data": data, "dcn_data": 1})


def accelerator_chunk(recipe: TrainingRecipe, setup: ModelSetup, length: int) -> int:
    """Tokens whose logits exist at a time where the backend is no CPU, over all devices."""
    if recipe.train.loss_chunk_size is not None:
        return recipe.train.loss_chunk_size
    # The rule of `default_chunk_size`, which asks for the backend in use, with an accelerator's budget.
    columns = setup.config.vocab_size
    affordable = max(vocab._ACCELERATOR_CHUNK_BYTES // (4 * columns), vocab._MIN_CHUNK_TOKENS)
    tokens = max(1, setup.plan.rows_per_microbatch * length // setup.mesh.size)
    return min(tokens, 2 ** int(math.log2(affordable))) * setup.mesh.size


# --- the step of each kind ---


def abstract_setup(recipe: TrainingRecipe, length: int, **options: Any) -> ModelSetup:
    """The trainer's own preparation, with an accelerator's chunk of logits."""
    setup = prepare_model(recipe, sequence_length=length, **options)
    return replace(setup, chunk_size=accelerator_chunk(recipe, setup, length))


def abstract_run(recipe: TrainingRecipe, notes: list[str]) -> AbstractRun:
    """Shapes, table and programs of a run.

    Raises:
        ValueError: the recipe does not fit its model or its mesh.
    """
    if isinstance(recipe, GRPORecipe):
        return _grpo(recipe, notes)
    if isinstance(recipe, DPORecipe):
        return _dpo(recipe, notes)
    if isinstance(recipe, DistillRecipe):
        return _distill(recipe, notes)
    assert isinstance(recipe, PretrainRecipe | SFTRecipe), recipe.kind
    return _tokens(recipe, notes)


def _tokens(recipe: PretrainRecipe | SFTRecipe, notes: list[str]) -> AbstractRun:
    length = recipe.data.sequence_length
    setup = abstract_setup(recipe, length, lora=recipe.lora if isinstance(recipe, SFTRecipe) else None)
    loss_fn = make_loss_fn(
        setup.model, z_loss=recipe.train.z_loss, chunk_size=setup.chunk_size, trainable=setup.trainable
    )
    step = make_train_step(loss_fn, setup.tx, setup.schedule, setup.shardings, step_options(recipe, setup.plan))
    batch = on_mesh(padding_batch(setup.plan.rows_loaded, length), setup)
    jitted: Any = jit_train_step(step, setup.shardings, setup.batch_sharding)
    update = Program(UPDATE, lambda: jitted.lower(*step_arguments(setup, batch)))
    rows = Rows(setup.plan.rows_per_microbatch, setup.plan.microbatches, 0, length)
    notes = [*notes, f"rows are full: data.sequence_length={length} tokens each"]
    return _run(recipe, setup, rows, batch, [], [update], notes)


def _grpo(recipe: GRPORecipe, notes: list[str]) -> AbstractRun:
    rl = recipe.rl
    length = rl.tokens_per_row
    setup = abstract_setup(recipe, length, lora=recipe.lora, updates_per_step=rl.num_iterations)
    tokens, logps = np.zeros(rl.max_completion_length, np.int32), np.zeros(rl.max_completion_length, np.float32)
    sequence = SampledSequence(range(rl.max_prompt_length), tokens, logps, 0.0, True)
    packing = pack(
        [sequence] * (rl.prompts_per_step * rl.num_generations),
        row_length=length,
        rows_multiple=setup.mesh.size,
        microbatch_rows=setup.plan.rows_per_microbatch,
        # What `auto` takes on a CPU shares prompts; the fused kernels of accelerators do not.
        share_prompts=recipe.model.attention != "auto" and shares_prompts(setup.model),
    )
    bare = on_mesh(packing.batch, setup)
    reference, several = rl.beta > 0.0, rl.num_iterations > 1
    scored = bare.sampler_logps
    batch = replace(bare, ref_logps=scored if reference else None, old_logps=scored if several else None)
    # One of several updates: each is a program of its own.
    once = rl.model_copy(update={"num_iterations": 1})
    temperature, num_rows = recipe.sampler.temperature, batch.inputs.shape[0]
    options = step_options(recipe, setup.plan)
    update_for = make_update(once, setup, options, temperature=temperature)
    step = jax.jit(
        update_for(num_rows, packing.max_segments), donate_argnums=0, out_shardings=(setup.shardings.state, None)
    )
    programs = [Program(UPDATE, lambda: step.lower(*step_arguments(setup, batch)))]
    shared = AdapterBase("reference", setup.model) if setup.model.adapters is not None else None
    roles = [frozen("reference", setup, setup.model, (ROLLOUT, SCORING, UPDATE))] if reference and not shared else []
    if reference or several:
        score: Any = make_scorer(setup, temperature=temperature, role=shared)
        params = roles[0].params if roles else abstract_params(setup)
        programs.insert(0, Program(SCORING, lambda: score.lower(params, bare)))
    microbatch = min(num_rows, setup.plan.rows_per_microbatch)
    rows = Rows(microbatch, num_rows // microbatch, microbatch if reference or several else 0, length)
    notes = [
        *notes,
        f"all prompts have {rl.max_prompt_length} tokens (rl.max_prompt_length) and all completions "
        f"{rl.max_completion_length} (rl.max_completion_length): {num_rows} rows of {length} tokens a step, in "
        f"micro-batches of {microbatch}",
    ]
    return _run(
        recipe, setup, rows, batch, roles, programs, notes, sampler=recipe.sampler, max_length=rl.longest_sequence
    )


def _dpo(recipe: DPORecipe, notes: list[str]) -> AbstractRun:
    from posttrain.trainers.dpo import empty_pairs
    from posttrain.trainers.dpo import make_loss_fn as make_pair_loss
    from posttrain.trainers.pair_scores import ScoredPairs, Scores

    length = recipe.data.sequence_length
    setup = abstract_setup(recipe, length, lora=recipe.lora)
    pairs = on_mesh(empty_pairs(setup.plan.rows_loaded, length), setup)
    needs, cached = PREFERENCES[recipe.dpo.loss].needs_reference, recipe.dpo.reference == "cached"
    sums = pairs.weights if needs else None
    batch = ScoredPairs(pairs, sums, sums)
    loss_fn = make_pair_loss(setup.model, recipe.dpo, chunk_size=setup.chunk_size, trainable=setup.trainable)
    step = make_train_step(loss_fn, setup.tx, setup.schedule, setup.shardings, step_options(recipe, setup.plan))
    jitted: Any = jit_train_step(step, setup.shardings, None)
    programs = [Program(UPDATE, lambda: jitted.lower(*step_arguments(setup, batch)))]
    role = _pair_reference(recipe, setup)

    def score(params: Params, pairs: Any) -> tuple[Any, Any]:
        reference: Role = AdapterBase("reference", setup.model)
        if role.phases:
            reference = FrozenRole("reference", role.model, params, 0)
        scored = Scores.of(setup, reference).train(pairs, params)
        return scored.ref_chosen, scored.ref_rejected

    if needs:
        programs.insert(0, Program(SCORING, lambda: jax.jit(score).lower(role.params, pairs)))
    roles = [role] if needs else []
    # Both answers of a pair are rows.
    scored = 2 * setup.plan.rows_loaded if needs else 0
    rows = Rows(2 * setup.plan.rows_per_microbatch, setup.plan.microbatches, scored, length)
    notes = [*notes, f"all answers are in the longest bucket, of data.sequence_length={length} tokens"]
    if needs and cached:
        notes.append("dpo.reference=cached: the reference scores all pairs before the first step, and is let go")
    return _run(recipe, setup, rows, batch, roles, programs, notes)


def _pair_reference(recipe: DPORecipe, setup: ModelSetup) -> FrozenModel:
    """The reference of pairs; in no phase does it hold arrays where it is the base under the policy's adapters."""
    dpo = recipe.dpo
    if setup.model.adapters is not None:
        phases: tuple[str, ...] = (SCORING,) if dpo.reference == "cached" else ()
        return FrozenModel("reference", setup.model, abstract_params(setup), phases)
    section = setup.model.options
    if dpo.reference_dtype is not None:
        section = section.model_copy(update={"param_dtype": dpo.reference_dtype})
    comes_and_goes = dpo.reference == "cached" or dpo.reference_memory != "device"
    phases = (SCORING,) if comes_and_goes else (SCORING, UPDATE)
    return frozen("reference", setup, FunctionalModel(setup.config, section), phases)


def _distill(recipe: DistillRecipe, notes: list[str]) -> AbstractRun:
    from posttrain.trainers.distill import make_loss_fn as make_taught_loss
    from posttrain.trainers.distill import make_teach

    length = recipe.data.sequence_length
    setup: Any = abstract_setup(recipe, length, lora=recipe.lora)
    config = teacher_config(recipe, setup.config)
    on_policy = recipe.distill.mode == "on_policy"
    phases: tuple[str, ...] = (ROLLOUT, SCORING, UPDATE) if on_policy else (SCORING, UPDATE)
    if recipe.teacher.memory != "device" or recipe.distill.teacher_outputs == "cached":
        phases = (SCORING,)
    role = frozen("teacher", setup, FunctionalModel(config, recipe.teacher), phases)
    batch = on_mesh(padding_batch(setup.plan.rows_loaded, length), setup)

    def teach(params: Params, rows: Any) -> Any:
        return make_teach(recipe.distill, FrozenRole("teacher", role.model, params, 0), setup.chunk_size)(rows)

    # Of the teacher the step reads the head alone, and jit drops what is not read.
    def step(state: Any, batch: Any, key: jax.Array, proceed: jax.Array, taught_by: Params) -> Any:
        head = role.model.head(taught_by)
        loss_fn = make_taught_loss(recipe.distill, setup, FrozenRole("teacher", role.model, {}, 0), head)
        options = step_options(recipe, setup.plan)
        return make_train_step(loss_fn, setup.tx, setup.schedule, setup.shardings, options)(state, batch, key, proceed)

    jitted = jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings.state, setup.shardings.state.step))
    shapes = jax.eval_shape(teach, role.params, batch)
    # What crosses is divided as its rows are.
    taught = on_mesh(shapes, setup, time_axis=1)
    programs = [
        Program(SCORING, lambda: jax.jit(teach).lower(role.params, batch)),
        Program(UPDATE, lambda: jitted.lower(*step_arguments(setup, taught), role.params)),
    ]
    rows = Rows(setup.plan.rows_per_microbatch, setup.plan.microbatches, setup.plan.rows_loaded, length)
    notes = [*notes, f"rows are full: data.sequence_length={length} tokens each"]
    sampler = recipe.sampler if on_policy else None
    return _run(recipe, setup, rows, taught, [role], programs, notes, sampler=sampler, max_length=length + 1, heads=2)


def teacher_config(recipe: DistillRecipe, student: TransformerConfig) -> TransformerConfig:
    """The teacher's architecture, once it is known to have the student's vocabulary.

    Raises:
        ValueError: it has another.
    """
    config = resolve_config(recipe.teacher)
    if config.vocab_size != student.vocab_size:
        raise ValueError(
            f"teacher: vocab_size={config.vocab_size}, the student's is {student.vocab_size}: a distribution over one "
            "vocabulary says nothing of another; choose models of one tokenizer"
        )
    return config


def _run(
    recipe: TrainingRecipe,
    setup: ModelSetup,
    rows: Rows,
    batch: Any,
    roles: list[FrozenModel],
    programs: list[Program],
    notes: list[str],
    *,
    sampler: SamplerSection | None = None,
    max_length: int = 0,
    heads: int = 1,
) -> AbstractRun:
    """The parts of a run with its table."""
    used = [program.phase for program in programs]
    phases = (ROLLOUT, *used) if sampler is not None else tuple(used)
    on_host = recipe.optimizer.memory == "pinned_host"
    entries = state_entries(setup, phases, microbatches=rows.microbatches, on_host=on_host) + frozen_entries(roles)
    share = None
    if sampler is not None:
        engine, more = sampler_engine(sampler, setup.config)
        notes = [*notes, *more]
        if engine == "vllm":
            share = sampler.memory_share
        else:
            entries += native_engine_entries(setup, sampler, max_length=max_length, phases=phases)
    entries.append(Entry("batch", dict.fromkeys(used, sharded_bytes(batch)), True))
    entries += work_entries(setup, rows, roles, logit_copies=2 * heads)
    if recipe.train.loss_chunk_size is None:
        notes = [
            *notes,
            f"the logits of {setup.chunk_size // setup.mesh.size} tokens a device exist at a time, as on "
            "an accelerator (train.loss_chunk_size)",
        ]
    if on_host:
        notes = [*notes, "optimizer.memory=pinned_host: its state is on the device during the update alone"]
    return AbstractRun(setup, phases, entries, programs, notes, share)


def sampler_engine(section: SamplerSection, config: TransformerConfig) -> tuple[str, list[str]]:
    """The engine on an accelerator, and what that assumes."""
    engine, notes = section.engine, []
    if engine == "auto":
        engine = "vllm"
        try:
            check_model(config, CUDA_BUILD)
        except ValueError:
            engine = "native"
        notes = [f"sampler.engine=auto: {engine}"]
    return engine, notes


# --- shapes ---


def on_mesh(tree: Any, setup: ModelSetup, *, time_axis: int = -1) -> Any:
    """Shapes of a batch, with the shardings of its rows; `time_axis` is that of fields with more than two axes."""

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = field_sharding(setup.batch_sharding, leaf.ndim)
        if leaf.ndim > 2 and time_axis == 1:
            sharding = setup.batch_sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, tree)


def step_arguments(setup: ModelSetup, batch: Any) -> tuple[Any, ...]:
    """The arguments of a training step, as shapes."""
    whole = setup.shardings.state.step
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        setup.abstract,
        setup.shardings.state,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    return state, batch, key, jax.ShapeDtypeStruct((), bool, sharding=whole)


def abstract_params(setup: ModelSetup) -> Params:
    """The policy's parameters as shapes."""
    return step_arguments(setup, None)[0].params


def frozen(name: str, setup: ModelSetup, model: FunctionalModel, phases: tuple[str, ...]) -> FrozenModel:
    """A model that is not trained, as shapes."""
    plain = FunctionalModel(model.config, model.options)
    shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0)))
    placed = param_shardings(plain, Placement(setup.mesh, setup.rules))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )
    return FrozenModel(name, plain, params, phases)


# --- the process ---

XLA_FIELDS = ("argument", "output", "alias", "temp", "host_argument", "host_temp")


def compiled_memory(program: Program) -> dict[str, Any]:
    """XLA's figures of a program, in bytes of one device, and the seconds that it took."""
    start = time.perf_counter()
    analysis = program.lower().compile().memory_analysis()
    sizes = {name: int(getattr(analysis, f"{name}_size_in_bytes")) for name in XLA_FIELDS}
    return {"phase": program.phase, "seconds": time.perf_counter() - start, **sizes}


def answer(path: str) -> dict[str, Any]:
    """All that is known of a recipe's step, as JSON holds it."""
    recipe, notes = abstract_recipe(load_recipe(path, []).recipe)
    with runtime(recipe.train, recipe.mesh):
        run = abstract_run(recipe, notes)
        with activation_mesh(run.setup.mesh, run.setup.rules):
            programs = [compiled_memory(program) for program in run.programs]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.setup.abstract.params)),
        "mesh": {axis: size for axis, size in run.setup.mesh.shape.items() if size > 1},
        "num_devices": run.setup.mesh.size,
        "phases": run.phases,
        "entries": [asdict(entry) for entry in run.entries],
        "programs": programs,
        "assumptions": run.assumptions,
        "memory_share": run.memory_share,
        "bfloat16": "bfloat16" in (recipe.model.compute_dtype, recipe.model.param_dtype),
    }


def main() -> None:
    """Answers for the recipe that is named; a user's mistake is an answer too."""
    start_process()
    try:
        found = answer(sys.argv[1])
    except ValueError as error:
        found = {"error": str(error)}
    # Log lines may stand before it.
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
