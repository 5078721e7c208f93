"""The conformance matrix of post-training, PT-01 to PT-07 and DPO, through the command line.

PT-06 asks for a functional run on Llama 3.1 8B and GSM8K. Here it runs on a stand-in that a CPU can train: the shipped
recipe llama31_gsm8k with the same architecture made small, fine-tuned first on sums. The 8B run is that recipe as is.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import load_preset
from models.functional import FunctionalModel
from models.tokenizer import load_tokenizer
from posttrain.cli import main
from posttrain.data.build import make_sft_iterator
from posttrain.data.word_problems import GAIN_VERBS, LOSS_VERBS, word_problems
from posttrain.ledger import read_step, recorded_steps
from posttrain.statistics import Estimate, estimate_mean
from recipes.load import load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import metrics_path
from recipes.schema import ModelSection

FRAMEWORKS = ("nnx", "linen")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MODEL = "{preset: tiny-llama, overrides: {vocab_size: 259, max_position: 512, head_dim: 32}, framework: FRAMEWORK}"
SFT = """
kind: sft
model: MODEL
tokenizer: {path: bytes}
data: {path: PATH, sequence_length: 256, shuffle: false, num_workers_threads: 1}
train: {steps: 5, per_device_batch_size: 4}
optimizer: {learning_rate: 1.0e-3}
checkpoint: {enabled: false}
"""
PRETRAIN = """
kind: pretrain
model: MODEL
tokenizer: {path: bytes}
data: {kind: text, path: PATH, sequence_length: 128, num_workers_threads: 1}
train: {steps: 20, per_device_batch_size: 4}
optimizer: {learning_rate: 3.0e-3}
"""
DPO = """
kind: dpo
model: MODEL
tokenizer: {path: bytes}
data: {path: PATH, sequence_length: 64, buckets: [32], num_workers_threads: 1}
train: {steps: 5, per_device_batch_size: 4}
optimizer: {learning_rate: 1.0e-3}
"""
DISTILL = """
kind: distill
model: {preset: gpt3-52k, framework: FRAMEWORK}
teacher: {preset: gpt3-52k, framework: FRAMEWORK}
tokenizer: {path: bytes}
data: {path: PATH, sequence_length: 256, num_workers_threads: 1}
train: {steps: 5, per_device_batch_size: 4}
optimizer: {learning_rate: 1.0e-3}
checkpoint: {enabled: false}
"""
GRPO = """
kind: grpo
model: MODEL
tokenizer: {path: bytes}
data: {path: PATH, template: "{question}", num_problems: 40}
rl: {prompts_per_step: 4, num_generations: 4, max_prompt_length: 160, max_completion_length: 16}
rewards: {functions: {gsm8k_exact: 1.0, length: 0.1}, options: {length: {target: 8}}}
sampler: {engine: native, num_slots: 16}
eval: {at_start: false, at_end: false}
train: {steps: 2, per_device_batch_size: 4}
optimizer: {learning_rate: 1.0e-3}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories in GSM8K's format, text, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    verbs = (*GAIN_VERBS, *LOSS_VERBS)
    stories = word_problems(64, seed=0, split="train", levels=(2,), verbs=verbs, largest=99)
    rows = [{"question": story.question, "answer": story.solution} for story in stories]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows))
    pairs = [{"prompt": f"What is {i}? ", "chosen": f"it is {i}", "rejected": "no idea"} for i in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def write(folder: Path, text: str, *, path: Path, framework: str) -> Path:
    """A recipe's file."""
    recipe = folder / "recipe.yaml"
    text = text.replace("MODEL", MODEL).replace("FRAMEWORK", framework).replace("PATH", str(path))
    recipe.write_text(text)
    return recipe


def run(kind: str, recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Runs the command line in this process; gives the rows of metrics."""
    code = main([kind, str(recipe), f"run.dir={folder}", "logging.console=none", *overrides])
    assert code == 0
    return read_metrics(metrics_path(folder))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pt_01_sft_logs_the_loss_of_the_answers_tokens_each_step(data: Path, tmp_path: Path, framework: str) -> None:
    recipe = write(tmp_path, SFT, path=data / "stories.jsonl", framework=framework)
    rows = run("sft", recipe, tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(row["learning/loss"]) for row in rows)
    assert rows[-1]["learning/loss"] < rows[0]["learning/loss"] - 0.3
    loss, weight, everything = first_loss(recipe)
    assert rows[0]["learning/total_weights"] == weight
    assert rows[0]["learning/loss"] == pytest.approx(loss, rel=1e-5)
    whole = run("sft", recipe, tmp_path / "whole", "data.completion_only=false", "train.steps=1")
    assert whole[0]["learning/total_weights"] == everything > weight


def first_loss(recipe: Path) -> tuple[float, int, int]:
    """The first batch's masked loss, by NumPy in float64; the trained targets, and all targets."""
    loaded: Any = load_recipe(str(recipe), []).recipe
    tokenizer = load_tokenizer(loaded.tokenizer)
    options = {"vocab_size": 259, "add_bos": True, "add_eos": True, "host_index": 0, "host_count": 1}
    batch = next(make_sft_iterator(loaded.data, tokenizer, rows_per_batch=4, **options))
    whole = next(
        make_sft_iterator(
            loaded.data.model_copy(update={"completion_only": False}), tokenizer, rows_per_batch=4, **options
        )
    )
    config = load_preset("tiny-llama").replace(vocab_size=259, max_position=512, head_dim=32)
    model = FunctionalModel(config, ModelSection(preset="tiny-llama"))
    params = model.init(jax.random.fold_in(jax.random.key(0), 0))
    on_device = jax.tree.map(jnp.asarray, batch)
    outputs, _ = model(params, on_device.inputs, on_device.inputs_position, segment_ids=on_device.inputs_segmentation)
    logits = np.asarray(outputs, np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    trained = batch.targets_segmentation != 0
    return losses[trained].mean(), int(trained.sum()), int((whole.targets_segmentation != 0).sum())


def test_pt_01_both_frameworks_have_one_loss_curve(data: Path, tmp_path: Path) -> None:
    curves = []
    for framework in FRAMEWORKS:
        folder = tmp_path / framework
        folder.mkdir()
        recipe = write(folder, SFT, path=data / "stories.jsonl", framework=framework)
        curves.append([row["learning/loss"] for row in run("sft", recipe, folder / "run")])
    np.testing.assert_allclose(*curves, rtol=1e-5)


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained run of each framework."""
    runs = {}
    for framework in FRAMEWORKS:
        folder = tmp_path_factory.mktemp(framework)
        recipe = write(folder, PRETRAIN, path=data / "text.txt", framework=framework)
        run("pretrain", recipe, folder / "run")
        runs[framework] = folder / "run"
    return runs


@pytest.mark.parametrize(
    ("source", "framework"),
    [
        pytest.param("nnx", "nnx", id="PT-02-nnx"),
        pytest.param("linen", "linen", id="PT-02-linen"),
        pytest.param("linen", "nnx", id="PT-03-nnx"),
    ],
)
def test_sft_goes_on_from_a_pretrained_checkpoint(
    data: Path,
    pretrained: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    framework: str,
) -> None:
    recipe = write(tmp_path, SFT, path=data / "stories.jsonl", framework=framework)
    fresh = run("sft", recipe, tmp_path / "fresh", "train.steps=1")
    capsys.readouterr()
    rows = run("sft", recipe, tmp_path / "run", f"model.load_parameters_path={pretrained[source]}")
    assert f"Loaded params from {pretrained[source]}" in capsys.readouterr().out
    assert len(rows) == 5
    assert rows[0]["learning/loss"] < fresh[0]["learning/loss"] - 0.5
    other = "linen" if source == "nnx" else "nnx"
    if source == framework:
        # The weights that the other framework learnt from the same data are the same to rounding, and so is their loss.
        path = f"model.load_parameters_path={pretrained[other]}"
        crossed = run("sft", recipe, tmp_path / "crossed", path, "train.steps=1")
        assert crossed[0]["learning/loss"] == pytest.approx(rows[0]["learning/loss"], rel=1e-4)


def test_dpo_starts_at_ln_2_learns_the_pairs_and_leaves_its_reference_alone(data: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, DPO, path=data / "pairs.jsonl", framework="nnx")
    rows = run("dpo", recipe, tmp_path / "run", "train.steps=20")
    assert rows[0]["learning/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["dpo/accuracy"] == 0.0
    assert rows[-1]["dpo/accuracy"] == 1.0
    assert rows[-1]["dpo/margin"] > 0.1
    cached = run("dpo", recipe, tmp_path / "cached", "train.steps=20", "dpo.reference=cached")
    losses = [[row["learning/loss"] for row in curve] for curve in (rows, cached)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pt_07_distillation_logs_its_train_loss_each_step(data: Path, tmp_path: Path, framework: str) -> None:
    recipe = write(tmp_path, DISTILL, path=data / "stories.jsonl", framework=framework)
    rows = run("distill", recipe, tmp_path / "run")
    assert [row["_train_loss"] for row in rows] == [row["learning/loss"] for row in rows]
    assert len(rows) == 5
    # Student and teacher are drawn from one seed, so the first divergence is exactly 0 and all of the loss is labels'.
    assert rows[0]["distill/soft_loss"] == 0.0
    assert rows[0]["learning/loss"] == pytest.approx(0.5 * rows[0]["distill/hard_loss"], rel=1e-6)
    same = run("distill", recipe, tmp_path / "same", "distill.alpha=1.0", "optimizer.weight_decay=0.0")
    assert all(row["learning/loss"] == 0.0 and row["learning/raw_grad_norm"] == 0.0 for row in same)


@pytest.mark.parametrize(
    "algorithm", [pytest.param("grpo", id="PT-04-nnx"), pytest.param("gspo-token", id="PT-05-nnx")]
)
def test_reinforcement_learning_logs_rewards_of_two_batches(data: Path, tmp_path: Path, algorithm: str) -> None:
    recipe = write(tmp_path, GRPO, path=data / "stories.jsonl", framework="nnx")
    rows = run("grpo", recipe, tmp_path / "run", f"rl.loss_algo={algorithm}")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["rewards/total/mean"]) and math.isfinite(row["policy/loss"])
        # On one device in float32 the sampler is the trainer.
        assert row["sampler/logp_diff_abs"] <= 1e-5
        assert row["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert recorded_steps(tmp_path / "run") == [1, 2]
    ledger = [one for step in (1, 2) for one in read_step(tmp_path / "run", step)]
    assert len(ledger) == 2 * 16
    assert {one["weight_version"] for one in ledger[:16]} == {0} and {one["weight_version"] for one in ledger[16:]} == {
        1
    }
    for one in ledger:
        np.testing.assert_allclose(one["sampler_logps"], one["trainer_logps"], atol=1e-4)
        ratios = np.exp(np.array(one["trainer_logps"]) - np.array(one["sampler_logps"]))
        assert ratios.min() >= 0.999 and ratios.max() <= 1.001


SMALL = """{hf_path: null, preset: llama3.1-8b, remat: none, param_dtype: float32, compute_dtype: float32, overrides:
  {vocab_size: 259, embed_dim: 64, mlp_dim: 128, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 32,
   max_position: 512}}"""
"""Of Llama 3.1 8B the sizes alone are changed: grouped heads, RoPE's scaling, norms and the untied head are its own."""
SUMS_SFT = """
kind: sft
model: SMALL
tokenizer: {path: bytes}
data: {path: SFT_PATH, as_chat: true, sequence_length: 144, num_workers_threads: 1}
train: {steps: 300, per_device_batch_size: 8}
optimizer: {learning_rate: 3.0e-3}
"""
SUMS_GRPO = """
base: RECIPE
kind: grpo
model: SMALL
tokenizer: {path: bytes}
data: {name: null, eval_split: null, path: RL_PATH, template: "{question}"}
rl: {prompts_per_step: 16, max_prompt_length: 32, max_completion_length: 48, row_length: 256}
rewards: {num_workers: 1}
sampler: {engine: native, num_slots: 128, eager: true}
eval: {interval: 0, at_start: false, at_end: false, num_samples: 8}
train: {steps: 12, per_device_batch_size: 32}
optimizer: {learning_rate: 3.0e-4, weight_decay: 0.0}
schedule: {kind: constant, warmup_fraction: 0.0}
checkpoint: {interval: 0}
"""


def sums(folder: Path, *, largest: int, held_out: int) -> None:
    """Sums for fine-tuning, each answered in one example and passed over in another; and those for rewards.

    What rewards can teach is thus to answer, and the fine-tuned model knows the sums that they never ask for.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    said = "<reasoning></reasoning><answer>{}</answer>"
    rows = [{"question": f"{a} + {b} =", "answer": said.format(words)} for a, b in pairs for words in (a + b, "pass")]
    problems = [{"question": f"{a} + {b} =", "answer": f"#### {a + b}"} for a, b in pairs]
    order = np.random.default_rng(0).permutation(len(problems))
    parts = {"sft": rows, "held_out": [problems[i] for i in order[:held_out]]}
    parts["rl"] = [problems[i] for i in order[held_out:]]
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in (("sft", SUMS_SFT), ("grpo", SUMS_GRPO)):
        text = text.replace("SMALL", SMALL).replace("RECIPE", str(RECIPES / "llama31_gsm8k.yaml"))
        text = text.replace("SFT_PATH", str(folder / "sft.jsonl")).replace("RL_PATH", str(folder / "rl.jsonl"))
        (folder / f"{name}.yaml").write_text(text)


def solved(run_dir: Path, *steps: int) -> Estimate:
    """The share of completions with the right answer, with its 95 % interval; prompts are what is resampled."""
    groups: dict[tuple[int, int], list[bool]] = {}
    for step in steps:
        for row in read_step(run_dir, step):
            groups.setdefault((step, row["prompt_id"]), []).append(dict(row["reward_parts"])["numbers"] == 1.0)
    return estimate_mean(np.array([np.mean(group) for group in groups.values()]), seed=0, num_resamples=2000)


def test_pt_06_rewards_rise_on_a_small_llama_31(tmp_path: Path) -> None:
    """Rewards by 0.15 at least, of a range of 1.1, and right answers by more than chance; a stand-in for the 8B run."""
    sums(tmp_path, largest=2, held_out=0)
    run("sft", tmp_path / "sft.yaml", tmp_path / "sft")
    tuned = f"model.load_parameters_path={tmp_path / 'sft'}"
    rows = run("grpo", tmp_path / "grpo.yaml", tmp_path / "run", tuned, "rl.prompts_per_step=8")
    assert [row["step"] for row in rows] == list(range(1, 13))
    rewards = [row["rewards/total/mean"] for row in rows]
    assert np.isfinite(rewards).all() and all(math.isfinite(row["policy/loss"]) for row in rows)
    assert np.mean(rewards[-2:]) > rewards[0] + 0.15
    assert solved(tmp_path / "run", 11, 12).low > solved(tmp_path / "run", 1).high


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["native", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_pt_06_held_out_problems_are_solved_more_often(tmp_path: Path, engine: str) -> None:
    """On sums that rewards never asked for, greedy aside: the share solved of eight samples, with intervals apart."""
    sums(tmp_path, largest=6, held_out=16)
    run("sft", tmp_path / "sft.yaml", tmp_path / "sft", "train.steps=1500")
    tuned = f"model.load_parameters_path={tmp_path / 'sft'}"
    held_out = (f"data.eval_path={tmp_path / 'held_out.jsonl'}", "eval.at_start=true", "eval.at_end=true")
    more = (tuned, *held_out, "train.steps=30", f"sampler.engine={engine}")
    rows = run("grpo", tmp_path / "grpo.yaml", tmp_path / "run", *more)
    before, after = (row for row in rows if "evaluation/avg@8" in row)
    assert after["evaluation/avg@8_low"] > before["evaluation/avg@8_high"]
    trained = [row for row in rows if "policy/loss" in row]
    assert trained[-1]["rewards/total/mean"] > trained[0]["rewards/total/mean"]
    for row in trained:
        assert row["sampler/logp_diff_abs"] <= 1e-5
        assert 0.999 <= row["sampler/ratio_min"] <= row["sampler/ratio_max"] <= 1.001
