"""What the conformance tests do in the process with 8 devices: command lines, watched from inside, and offline checks.

A watched run is the product's own: functions of pretrain.trainer are wrapped, none is replaced, and what passes through
them is written down.
"""

import collections
import contextlib
import faulthandler
import hashlib
import io
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import functional
from models.checkpoints import store
from models.checkpoints.layouts import from_disk
from models.checkpoints.manager import CheckpointManager
from models.config import load_preset
from models.functional import FunctionalModel
from models.parameters import flatten, unflatten
from models.tokenizer import load_tokenizer
from posttrain import cli
from pretrain import trainer
from pretrain.data.build import make_eval_iterator
from recipes.load import load_recipe
from recipes.rundir import checkpoint_dir, resolved_path
from recipes.schema import ModelSection

DEVICES = 8


@dataclass
class Observed:
    """What was seen of one command line."""

    code: int = 0
    """Its exit code."""
    log: str = ""
    """What it printed."""
    frameworks: set[str] = field(default_factory=set)
    """Whose modules were called."""
    row_tokens: list[list[int]] = field(default_factory=list)
    """Targets in each row loaded, a list for each step, counted by numpy."""
    batch_digests: list[str] = field(default_factory=list)
    """A hash of each step's rows."""
    kinds: list[dict[str, list[str]]] = field(default_factory=list)
    """After each step, the memory kinds of parameters and of moments (the optimizer's leaves that have a size)."""
    program: str = ""
    """The training step as StableHLO, before the partitioner."""
    top_scans: list[int] = field(default_factory=list)
    """Trip counts of the step's outermost loops."""
    eval_digests: list[tuple[str, str]] = field(default_factory=list)
    """A hash of the whole state before and after each evaluation."""
    saves: list[str] = field(default_factory=list)
    """What each save had come to when the loop went on: "written", or "writing" in the background."""
    shardy: list[bool] = field(default_factory=list)
    """JAX's partitioner setting before the command, in its steps, and after it."""
    final: dict[str, np.ndarray] = field(default_factory=dict)
    """Parameters and moments at the end, by path."""


def device_flags() -> str:
    """XLA_FLAGS that make 8 devices of a CPU, beside whatever else they say here."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    return " ".join([*flags, f"--xla_force_host_platform_device_count={DEVICES}"])


def start(errors: Path) -> None:
    """Gives this process its devices, before JAX looks for them, and sends what it writes to stderr to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    faulthandler.enable()
    os.environ["XLA_FLAGS"] = device_flags()
    assert jax.device_count() == DEVICES, jax.devices()


def call(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str | None]:
    """A function's result and None, or None and its traceback, since some of JAX's errors cannot leave a process."""
    try:
        return fn(*args), None
    except Exception:  # noqa: BLE001 - whatever it is, it is told in the test that asked.
        return None, traceback.format_exc()


def run(arguments: list[str]) -> Observed:
    """Runs one command line through the entry point and says what was seen of it."""
    seen = Observed(shardy=[jax.config.jax_use_shardy_partitioner])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), watched(seen):
        seen.code = cli.main(arguments)
    seen.shardy.append(jax.config.jax_use_shardy_partitioner)
    seen.log = printed.getvalue()
    return seen


@contextlib.contextmanager
def watched(seen: Observed) -> Iterator[None]:
    """Wraps the trainer's parts so that `seen` fills while a run goes on."""
    real_run, real_jit, real_evaluate = trainer.run, trainer.jit_train_step, trainer.evaluate
    real_save = CheckpointManager.save
    real_apply, real_merge = functional.LinenTransformer.apply, functional.nnx_from_params
    latest: list[Any] = []

    def whole_run(*args: Any) -> Any:
        result = real_run(*args)
        seen.final = named_leaves(result.state)
        return result

    def jit_step(*args: Any) -> Callable[..., Any]:
        jitted = real_jit(*args)

        def step(before: Any, batch: Any, *rest: Any) -> Any:
            if not seen.program:
                traced = jitted.trace(before, batch, *rest)
                seen.top_scans = [eqn.params["length"] for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan"]
                seen.program = traced.lower().as_text()
                seen.shardy.append(jax.config.jax_use_shardy_partitioner)
            rows = jax.device_get(batch)
            seen.row_tokens.append(np.count_nonzero(rows.targets_segmentation, axis=1).tolist())
            seen.batch_digests.append(digest(rows))
            after, metrics = jitted(before, batch, *rest)
            seen.kinds.append({"params": memory_kinds(after.params), "moments": memory_kinds(after.opt_state)})
            latest[:] = [after]
            return after, metrics

        return step

    def evaluate(*args: Any, **named: Any) -> Any:
        before = digest(latest)
        row = real_evaluate(*args, **named)
        seen.eval_digests.append((before, digest(latest)))
        return row

    def apply(*args: Any, **named: Any) -> Any:
        seen.frameworks.add("linen")
        return real_apply(*args, **named)

    def merge(*args: Any) -> Any:
        seen.frameworks.add("nnx")
        return real_merge(*args)

    def save(*args: Any, **named: Any) -> str:
        outcome = real_save(*args, **named)
        seen.saves.append(outcome)
        return outcome

    with (
        mock.patch.object(functional.LinenTransformer, "apply", apply),
        mock.patch.object(functional, "nnx_from_params", merge),
        mock.patch.object(CheckpointManager, "save", save),
        mock.patch.object(trainer, "run", whole_run),
        mock.patch.object(trainer, "jit_train_step", jit_step),
        mock.patch.object(trainer, "evaluate", evaluate),
    ):
        yield


def memory_kinds(tree: Any) -> list[str]:
    """The distinct memory kinds of the arrays that have a size."""
    return sorted({leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim})


def digest(tree: Any) -> str:
    """A hash of every byte of a tree's leaves."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def named_leaves(state: Any) -> dict[str, np.ndarray]:
    """Parameters as params/..., first and second moments as mu/... and nu/..., on the host."""
    trees = {"params": state.params}
    for name in ("mu", "nu"):
        found = optax.tree.get(state.opt_state, name)
        trees |= {} if found is None else {name: found}
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(jax.device_get(trees))}


def stored_digests(run_dir: Path, step: int) -> dict[str, str]:
    """A hash of each array of a checkpoint, by its path on disk, whatever the storage format."""
    items = store.read_host(checkpoint_dir(run_dir, step) / "items", only=None)
    arrays = {"/".join(path): leaf for path, leaf in store.flatten(items).items() if hasattr(leaf, "tobytes")}
    return {
        name: f"{array.dtype}{array.shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
        for name, array in arrays.items()
    }


def offline_eval_loss(run_dir: Path, step: int) -> tuple[float, int]:
    """Mean loss and number of targets of a run's held-out split at a checkpoint, summed by numpy in float64.

    Rows come in batches of 3, attention is the plain reference, dropout is off, and logits are whole: of the run's own
    evaluation only the reading of documents and the layers' mathematics are shared.
    """
    recipe: Any = load_recipe(str(resolved_path(run_dir)), []).recipe
    config = load_preset(recipe.model.preset)
    model = FunctionalModel(config, recipe.model.model_copy(update={"attention": "dot_product", "dropout_rate": 0.0}))
    stored, _, _ = from_disk(store.read_host(checkpoint_dir(run_dir, step) / "items", only=None))
    params = jax.tree.map(jnp.asarray, stored)
    rows = make_eval_iterator(
        recipe.data,
        load_tokenizer(recipe.tokenizer),
        vocab_size=config.vocab_size,
        rows_per_batch=3,
        add_bos=recipe.tokenizer.add_bos,
        add_eos=recipe.tokenizer.add_eos,
        host_index=0,
        host_count=1,
    )
    logits_of = jax.jit(lambda batch: model(params, batch.inputs, segment_ids=batch.inputs_segmentation)[0])
    loss_sum, count = 0.0, 0
    for batch in rows:
        # Rotary attention sees differences of positions alone, so positions that do not restart give the same logits.
        logits = np.asarray(logits_of(batch), np.float64)
        peak = logits.max(-1)
        normaliser = peak + np.log(np.exp(logits - peak[..., None]).sum(-1))
        chosen = np.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        counted = batch.targets_segmentation != 0
        loss_sum += float((normaliser - chosen)[counted].sum())
        count += int(counted.sum())
    return loss_sum / count, count


def dead_channels(framework: str, rate: float, num_layers: int) -> dict[str, Any]:
    """Which channels a stack of layers drops, for layers that do nothing but drop.

    With the kernels that end both branches at zero a layer is its output's dropout alone, whose mask is one for all
    tokens of a row. A channel that is zero at every token was dropped by a layer: the masks before and after the
    stack, drawn for each token, leave some token of 32 nearly surely.

    Returns:
        The share of dead channels under one key, the share whose fate differs under another key, whether the same key
        gives the same bits again, and whether a key changes nothing at rate 0.
    """
    config = load_preset("tiny-llama").replace(num_layers=num_layers)

    def hidden(rate: float, key: jax.Array | None) -> np.ndarray:
        options = ModelSection(preset="tiny-llama", framework=framework, dropout_rate=rate)
        model = FunctionalModel(config, options)
        ends = {("self_attention", "out"), ("mlp", "wo")}
        params = unflatten(
            {
                path: jnp.zeros_like(leaf) if path[-3:-1] in ends else leaf
                for path, leaf in flatten(model.init(jax.random.key(1)))
            }
        )
        tokens = jax.random.randint(jax.random.key(2), (32, 32), 0, config.vocab_size)
        return np.asarray(jax.jit(lambda: model.hidden_states(params, tokens, noise_key=key)[0])())

    one, other = (hidden(rate, jax.random.fold_in(jax.random.key(0), step)) for step in (3, 4))
    dead = [(states == 0.0).all(axis=1) for states in (one, other)]
    return {
        "share": float(dead[0].mean()),
        "differing": float((dead[0] != dead[1]).mean()),
        "replays": np.array_equal(one, hidden(rate, jax.random.fold_in(jax.random.key(0), 3))),
        "rate 0 is off": np.array_equal(hidden(0.0, jax.random.key(0)), hidden(rate, None)),
        "draws": int(np.prod(dead[0].shape)),
    }


def dots(program: str) -> collections.Counter[tuple[str, str, str]]:
    """Counts the matrix products of a StableHLO text by the element types of left, right and result."""
    counted: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for line in program.splitlines():
        if "stablehlo.dot_general" in line:
            left, right, out = (
                part.split("x")[-1].split(">")[0] for part in line.rsplit(" : ", 1)[1].split("tensor<")[1:4]
            )
            counted[left, right, out] += 1
    return counted
