"""Small post-training runs of every kind, in this process or in one of their own."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pretrain.session import Result
from pretrain.setup import ModelSetup
from pretrain.state import TrainState, init_state
from recipes.load import LoadedRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[3]
MODEL = "{preset: tiny-llama, overrides: {embed_dim: 32, mlp_dim: 64, num_heads: 2, num_kv_heads: 1, vocab_size: 259}"
COMMON = f"""
model: {MODEL}}}
tokenizer: {{path: bytes}}
optimizer: {{learning_rate: 1.0e-2}}
schedule: {{kind: constant, warmup_fraction: 0, steps: 100000}}
logging: {{console: none, peak_flops: 1.0e+11}}
"""
ROWS = "train: {steps: 6, per_device_batch_size: 4, seed: 3}"
RECIPES = {
    "sft": f"""
kind: sft
data: {{path: examples.jsonl, sequence_length: 64, num_workers_threads: 2}}
{ROWS}
""",
    "dpo": f"""
kind: dpo
data: {{path: pairs.jsonl, sequence_length: 64, buckets: [32], num_workers_threads: 2}}
{ROWS}
""",
    "distill": f"""
kind: distill
teacher: {MODEL}}}
data: {{path: examples.jsonl, sequence_length: 64, num_workers_threads: 2}}
{ROWS}
""",
    "grpo": """
kind: grpo
data: {path: examples.jsonl, question_column: prompt, answer_column: completion, answer_mark: null,
       template: "{question}"}
rl: {prompts_per_step: 2, num_generations: 4, max_prompt_length: 64, max_completion_length: 6}
rewards: {functions: {length: 1.0}, options: {length: {target: 4}}}
sampler: {engine: native, num_slots: 8}
train: {steps: 4, per_device_batch_size: 4, seed: 3}
""",
}


def write_data(folder: Path, *, count: int = 60) -> None:
    """Sums as prompts with their answers, 20 to 35 bytes together; the rejected answers are off by one or more."""
    rng = np.random.default_rng(7)
    trees = ["oaks", "elms", "firs", "pines", "yews"]
    examples, pairs = [], []
    for number in range(count):
        a, b = (int(value) for value in rng.integers(1, 99, 2))
        prompt = f"{number}: {a} {rng.choice(trees)} and {b} {rng.choice(trees)}? "
        wrong = a + b + int(rng.integers(1, 9))
        examples.append({"prompt": prompt, "completion": str(a + b)})
        pairs.append({"prompt": prompt, "chosen": f"{a + b}", "rejected": f"{wrong} trees, I think"})
    for name, rows in (("examples", examples), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(kind: str, folder: Path, name: str, *overrides: str) -> LoadedRecipe:
    """The recipe of a kind, on the data in `folder`, which is written if it isn't there; its run is `folder/name`."""
    path = folder / f"{kind}.yaml"
    if not path.is_file():
        path.write_text(RECIPES[kind].replace("path: ", f"path: {folder}/") + COMMON)
    if not (folder / "examples.jsonl").is_file():
        write_data(folder)
    return load_recipe(str(path), [f"run.dir={folder / name}", *overrides])


def train(kind: str, folder: Path, name: str, *overrides: str) -> Result:
    """Runs the recipe in this process."""
    return import_module(f"posttrain.trainers.{kind}").run(load(kind, folder, name, *overrides), ["test"])


def start(kind: str, folder: Path, name: str, *overrides: str, **env: Path) -> "subprocess.Popen[str]":
    """Starts the recipe in a process of its own: by the command line, or with `env` by `trainers/phases.py`."""
    load(kind, folder, name)
    arguments = [str(folder / f"{kind}.yaml"), f"run.dir={folder / name}", *overrides]
    program = ["tests.posttrain.trainers.phases"] if env else ["posttrain", kind]
    return subprocess.Popen(
        [sys.executable, "-m", *program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **{key: str(env[key]) for key in env}},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def initial(recipe: Any, setup: ModelSetup) -> TrainState:
    """The state before the first step."""
    return init_state(setup.model, setup.tx, setup.shardings, None, seed=recipe.train.seed)


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf is as near as `tolerance` times the largest magnitude of what is expected there."""
    left, right = (jax.tree_util.tree_flatten_with_path(tree) for tree in (found, expected))
    assert left[1] == right[1]
    for (path, a), (_, b) in zip(left[0], right[0], strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)
