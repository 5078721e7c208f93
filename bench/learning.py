"""Does post-training teach small models what it should? Held-out losses, with the figures of LOG.md.

    python -m bench.learning sft --pretrained RUN     RUN: what `posttrain pretrain pretrain_text` left behind
    python -m bench.learning distill [--seeds 3]

sft       The recipe sft_gsm8k on real GSM8K, beginning at a checkpoint of pretrain_text; the loss is of the answers of
          100 problems of the test split, before and after.
distill   Students of one layer, as many steps and the same rows each, once on labels alone and once on a teacher of
          two layers besides; the text is tinyshakespeare by bytes, its last twentieth held out. Both sides take the
          best learning rate of RATES, chosen at a seed that is not compared.

Without --runs the runs lie in a folder that is removed. The data is read from ../shared/data.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import yaml

from models.sharding import activation_mesh
from posttrain.trainers import distill, sft
from posttrain.trainers.sft import prepare_rows
from pretrain.session import Result
from pretrain.start import first_params
from pretrain.state import init_state
from pretrain.trainer import token_work
from recipes.load import LoadedRecipe, load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import metrics_path

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT.parent / "shared" / "data" / "text" / "tinyshakespeare.txt"
PASSAGE = 256
"""Characters of a record."""
HELD_OUT = 0.05
LENGTH, ROWS = 64, 16
TEACHER_STEPS, STUDENT_STEPS = 1500, 300
TEACHER_RATE = 1e-2
RATES = (4e-3, 1e-2, 2e-2, 4e-2)
TUNING_SEED = 100
EVAL_BATCHES = 30
"""About 30,000 held-out bytes."""
TAUGHT: dict[str, Any] = {"alpha": 0.8, "temperature": 1.0}
WIDTHS = {"vocab_size": 259, "embed_dim": 64, "mlp_dim": 172, "num_heads": 2, "num_kv_heads": 1, "max_position": 64}


def held_out(run_dir: Path) -> float:
    """A run's last held-out loss."""
    return [row["evaluation/loss"] for row in read_metrics(metrics_path(run_dir)) if "evaluation/loss" in row][-1]


# --- fine-tuning ---


def first_held_out(loaded: LoadedRecipe) -> float:
    """The held-out loss before the first step."""
    recipe: Any = loaded.recipe
    setup = prepare_rows(recipe)
    with activation_mesh(setup.mesh, setup.rules):
        state = init_state(setup.model, setup.tx, setup.shardings, first_params(recipe, setup), seed=recipe.train.seed)
        row = token_work(recipe, setup, sequence_length=recipe.data.sequence_length).evaluate(state)
    setup.close()
    return row["evaluation/loss"]


def compare_sft(folder: Path, pretrained: Path) -> None:
    """Fine-tunes and prints the held-out loss before and after."""
    loaded = load_recipe("sft_gsm8k", [f"model.load_parameters_path={pretrained}", f"run.dir={folder / 'sft'}"])
    before = first_held_out(loaded)
    start = time.perf_counter()
    after = held_out(sft.run(loaded, ["bench.learning"]).run_dir)
    print(f"held-out loss, nats a byte: {before:.4f} before, {after:.4f} after ({time.perf_counter() - start:.0f} s)")
    print("met" if after < before else "MISSED")


# --- distillation ---


def write_passages(folder: Path) -> None:
    """The text as records, the last of them held out."""
    text = TEXT.read_text(encoding="utf-8")
    passages = [text[start : start + PASSAGE] for start in range(0, len(text), PASSAGE)]
    border = round(len(passages) * (1 - HELD_OUT))
    for name, part in (("train", passages[:border]), ("held_out", passages[border:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n" for passage in part))


def recipe_file(folder: Path, kind: str, num_layers: int, *, steps: int, rate: float, seed: int, **more: Any) -> Path:
    """A recipe of rows of text."""
    values = {
        "kind": kind,
        "model": model_of(num_layers),
        "tokenizer": {"path": "bytes"},
        "data": {
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "held_out.jsonl"),
            "sequence_length": LENGTH,
            "shuffle_seed": seed,
            "num_workers_threads": 2,
        },
        "train": {"steps": steps, "per_device_batch_size": ROWS, "seed": seed},
        "optimizer": {"learning_rate": rate},
        "eval": {"interval": steps, "steps": EVAL_BATCHES},
        "mesh": {"num_devices": 1},
        "logging": {"console": "none", "interval": 50},
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def model_of(num_layers: int) -> dict[str, Any]:
    """A model of the comparison, but for its depth."""
    return {"preset": "bench-r", "overrides": {**WIDTHS, "num_layers": num_layers}}


def run_once(run: Callable[..., Result], path: Path, run_dir: Path) -> float:
    """A run to its end, or the one that has ended already; its held-out loss."""
    result = run(load_recipe(str(path), [f"run.dir={run_dir}"]), ["bench.learning"])
    return held_out(result.run_dir)


def make_teacher(folder: Path) -> Path:
    """Trains the teacher."""
    path = recipe_file(folder, "sft", 2, steps=TEACHER_STEPS, rate=TEACHER_RATE, seed=0)
    start = time.perf_counter()
    loss = run_once(sft.run, path, folder / "teacher")
    print(f"teacher: {loss:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return folder / "teacher"


def student(folder: Path, teacher: Path | None, rate: float, seed: int) -> float:
    """The held-out loss of a student of labels, or of a teacher besides."""
    settings: dict[str, Any] = {"steps": STUDENT_STEPS, "rate": rate, "seed": seed, "checkpoint": {"enabled": False}}
    if teacher is None:
        return run_once(sft.run, recipe_file(folder, "sft", 1, **settings), folder / f"labels-{rate:g}-{seed}")
    settings |= {"teacher": {**model_of(2), "load_parameters_path": str(teacher)}, "distill": TAUGHT}
    path = recipe_file(folder, "distill", 1, **settings)
    return run_once(distill.run, path, folder / f"taught-{rate:g}-{seed}")


def compare_distillation(folder: Path, seeds: int) -> None:
    """Prints the held-out losses of both kinds of student, seed by seed."""
    write_passages(folder)
    sides = {"labels": None, "taught": make_teacher(folder)}
    best = {}
    for name, teacher in sides.items():
        losses = {rate: student(folder, teacher, rate, TUNING_SEED) for rate in RATES}
        best[name] = min(losses, key=losses.__getitem__)
        print(f"{name}: {', '.join(f'{rate:g} {loss:.4f}' for rate, loss in losses.items())}", flush=True)
    gains = []
    for seed in range(1, seeds + 1):
        found = {name: student(folder, teacher, best[name], seed) for name, teacher in sides.items()}
        gains.append(found["labels"] - found["taught"])
        print(f"seed {seed}: labels {found['labels']:.4f}, taught {found['taught']:.4f}", flush=True)
    print(f"gain {mean(gains):.4f} nats a byte ({min(gains):.4f} to {max(gains):.4f})")
    print("met" if min(gains) > 0 else "MISSED")


def main() -> None:
    """Runs one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=("sft", "distill"))
    parser.add_argument("--pretrained", type=Path, help="the run that sft begins at")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="a folder to keep the runs in")
    args = parser.parse_args()
    if args.comparison == "sft" and args.pretrained is None:
        parser.error("sft: --pretrained: name the run of `posttrain pretrain pretrain_text`")
    with tempfile.TemporaryDirectory() as name:
        folder = args.runs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
        if args.comparison == "sft":
            compare_sft(folder, args.pretrained)
        else:
            compare_distillation(folder, args.seeds)


if __name__ == "__main__":
    main()
