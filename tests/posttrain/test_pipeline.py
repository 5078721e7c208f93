"""A pipeline's order, what it repeats and what it refuses, with stages that only leave a trace; then one for real."""

import json
import re
import shutil
from pathlib import Path

import pytest

from models.checkpoints.hf_config import read_config
from posttrain import cli, pipeline
from posttrain.pipeline_state import read_done
from posttrain.report_runs import open_runs
from pretrain.guard import Interrupted, NonFiniteError
from pretrain.session import TrainingSession
from recipes.load import load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import create_run, metrics_path, read_attempts
from tests.pretrain.runs import assert_same_bits, saved

pytestmark = pytest.mark.usefixtures("quick_compiles")

FAKE = """\
kind: pipeline
common: {model: {preset: stories}, tokenizer: {path: "{stages.data}/tokenizer"}}
stages:
  data: {kind: stories}
  pretrain: {base: pretrain_stories, data: {path: "{stages.data}/pretrain.jsonl"}}
  sft:
    base: sft_stories
    data: {path: "{stages.data}/sft.jsonl"}
    train: {steps: 60}
    optimizer: {learning_rate: 0.001}
  grpo: {base: grpo_stories, data: {path: "{stages.data}/problems.jsonl", eval_path: null}}
  eval_sft:
    base: grpo_stories
    kind: eval
    from: sft
    data: {path: "{stages.data}/test.jsonl", eval_path: null}
    eval: {num_samples: 4}
"""
ESTIMATE = {"low": 0.25, "high": 0.75, "num_problems": 40}


class Fakes:
    """Stands in for every kind's runner: makes the stage's run directory, and notes that it was asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.ran, self.stop_at = folder, [], None
        self.error: Exception = Interrupted("SIGTERM: stopped after 3 steps and saved; go on with x")
        monkeypatch.setattr(pipeline, "RUNNERS", dict.fromkeys(pipeline.RUNNERS, self.run))
        self.recipe = folder / "p.yaml"
        self.recipe.write_text(FAKE)

    def run(self, loaded, argv, reward_file):
        name = Path(loaded.recipe.run.dir).name
        self.ran.append(name)
        with create_run(loaded.recipe, argv, True):
            if name == self.stop_at:
                raise self.error
        if loaded.recipe.kind != "eval":
            return {}
        return {"estimates": {"greedy": {"value": 0.5, **ESTIMATE}, "avg@4": {"value": 0.475, **ESTIMATE}}}

    def __call__(self, *overrides: str, reward_file: Path | None = None) -> pipeline.Outcome:
        self.ran.clear()
        loaded = load_recipe(str(self.recipe), [f"run.dir={self.folder / 'run'}", *overrides])
        return pipeline.run(loaded, ["posttrain"], reward_file=reward_file)

    def refused(self, *overrides: str, reward_file: Path | None = None) -> list[str]:
        with pytest.raises(ValueError) as caught:
            self(*overrides, reward_file=reward_file)
        assert self.ran == []
        return str(caught.value).splitlines()


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


def test_stages_run_in_their_order_and_are_not_repeated(fakes):
    fakes()
    assert fakes.ran == ["data", "pretrain", "sft", "grpo", "eval_sft"]
    fakes()
    assert fakes.ran == []
    assert len(read_attempts(fakes.folder / "run")) == 2 and len(read_attempts(fakes.folder / "run" / "sft")) == 1


def test_a_pipeline_goes_on_with_the_stage_that_was_interrupted(fakes):
    fakes.stop_at = "sft"
    with pytest.raises(Interrupted, match=r"stage sft: SIGTERM: stopped after 3 steps and saved; go on with the same"):
        fakes()
    assert fakes.ran == ["data", "pretrain", "sft"]
    fakes.stop_at = None
    fakes()
    assert fakes.ran == ["sft", "grpo", "eval_sft"]
    assert len(read_attempts(fakes.folder / "run" / "sft")) == 2


def test_a_folder_may_be_moved_once_its_stages_are_done(fakes):
    fakes()
    fakes.folder.joinpath("run").rename(fakes.folder / "moved")
    assert fakes(f"run.dir={fakes.folder / 'moved'}").stages[0].name == "data" and fakes.ran == []


def test_a_changed_recipe_of_a_done_stage_is_refused_before_anything_runs(fakes):
    fakes("stages.grpo=null", "stages.eval_sft=null")
    (line,) = fakes.refused("stages.sft.optimizer.learning_rate=0.5")
    assert "run/sft: stage sft is done, and its recipe changes optimizer.learning_rate (0.001 -> 0.5); remove" in line
    # More steps would be a resumed run for a verb; here they would be another model than the one that was used.
    (line,) = fakes.refused("stages.sft.train.steps=61")
    assert "train.steps (60 -> 61)" in line
    # What is only watched or stored may change, and of an evaluation what only training reads.
    fakes("stages.sft.logging.console=none", "stages.sft.checkpoint.keep=1")
    assert fakes.ran == ["grpo", "eval_sft"]
    fakes("stages.eval_sft.optimizer.learning_rate=0.5", "stages.eval_sft.train.steps=3")
    assert fakes.ran == []
    (line,) = fakes.refused("stages.eval_sft.eval.num_samples=8")
    assert "stage eval_sft is done, and its recipe changes eval.num_samples (4 -> 8)" in line


def test_a_changed_recipe_of_a_begun_stage_is_refused_before_anything_runs(fakes):
    fakes.stop_at = "sft"
    with pytest.raises(Interrupted):
        fakes()
    (line,) = fakes.refused("stages.sft.optimizer.learning_rate=0.5")
    assert "stage sft was begun, and its recipe changes optimizer.learning_rate" in line
    fakes.stop_at = None
    fakes("stages.grpo.train.seed=3")
    assert fakes.ran == ["sft", "grpo", "eval_sft"]


def test_a_stage_made_from_what_is_no_longer_there_is_refused_by_name(fakes):
    fakes()
    shutil.rmtree(fakes.folder / "run" / "sft")
    lines = fakes.refused()
    assert [re.search(r"stage (\w+) is done, and was made from another sft", line)[1] for line in lines] == [
        "grpo",
        "eval_sft",
    ]
    for name in ("grpo", "eval_sft"):
        shutil.rmtree(fakes.folder / "run" / name)
    fakes()
    assert fakes.ran == ["sft", "grpo", "eval_sft"]


def test_another_reward_file_is_refused_for_the_stages_that_judge(fakes):
    file = fakes.folder / "mine.py"
    file.write_text("def reward_short(completion, **columns):\n    return 1.0\n")
    fakes(reward_file=file)
    assert read_done(fakes.folder / "run", "sft").reward_hash is None
    assert fakes(reward_file=file) and fakes.ran == []
    lines = fakes.refused()
    assert [line.split(": stage ")[1].split()[0] for line in lines] == ["grpo", "eval_sft"]
    assert "and now there is no --reward-file" in lines[0]
    file.write_text(file.read_text() + "\n")
    assert len(fakes.refused(reward_file=file)) == 2


def test_two_processes_do_not_run_one_pipeline(fakes):
    loaded = load_recipe(str(fakes.recipe), [f"run.dir={fakes.folder / 'run'}"])
    with create_run(loaded.recipe, [], True):
        assert "is writing this run" in fakes.refused()[0]


def test_the_table_has_accuracies_with_intervals_and_seconds(fakes):
    lines = fakes().table().splitlines()
    assert lines[0].split() == ["stage", "of", "greedy", "sampled", "problems", "seconds"]
    row = next(line for line in lines if line.startswith("eval_sft"))
    assert re.split(r"  +", row)[:5] == ["eval_sft", "sft", "50.0 % [25.0, 75.0]", "47.5 % [25.0, 75.0]", "40"]
    summary = json.loads((fakes.folder / "run" / pipeline.SUMMARY_NAME).read_text())
    assert [one["name"] for one in summary] == ["data", "pretrain", "sft", "grpo", "eval_sft"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (Interrupted("SIGTERM: stopped"), 75), (NonFiniteError("nan"), 3), (OSError("full"), 1)],
)
def test_exit_codes_are_those_of_training(fakes, error, code, capsys):
    if error is not None:
        fakes.stop_at, fakes.error = "sft", error
    assert cli.main(["pipeline", str(fakes.recipe), f"run.dir={fakes.folder / 'run'}"]) == code
    captured = capsys.readouterr()
    assert ("eval_sft" in captured.out) is (code == 0) and bool(captured.err) is (code != 0)


def test_a_recipe_of_another_kind_is_refused(capsys):
    assert cli.main(["pipeline", "sft_stories"]) == 2
    assert "`posttrain pipeline` runs recipes of kind pipeline; use `posttrain sft`" in capsys.readouterr().err


TINY = """\
kind: pipeline
common:
  model: {preset: stories, overrides: {num_layers: 1, embed_dim: 32, mlp_dim: 64, num_heads: 1, num_kv_heads: 1}}
  tokenizer: {path: "{stages.data}/tokenizer"}
  sampler: {engine: native, num_slots: 8}
  train: {steps: 2, per_device_batch_size: 2}
  checkpoint: {interval: 1}
logging: {console: none, peak_flops: 1.0e+9}
stages:
  data: {kind: stories, stories: {documents: 40, examples: 20, held_out: 6}}
  pretrain:
    base: pretrain_stories
    model: {framework: linen}
    data: {path: "{stages.data}/pretrain.jsonl"}
  sft: {base: sft_stories, data: {path: "{stages.data}/sft.jsonl"}}
  eval_sft:
    base: grpo_stories
    kind: eval
    rl: {max_completion_length: 8}
    data: {path: "{stages.data}/test.jsonl", eval_path: null}
    eval: {num_samples: 2}
  export:
    kind: export
    data: {path: "{stages.data}/test.jsonl", template: "{question}"}
    export: {max_completion_length: 8}
"""


def test_from_random_weights_to_answers_of_the_exported_model(tmp_path, monkeypatch, capsys):
    """Linen to NNX to Hugging Face; stopped amid SFT and moved, it goes on to the bits of a straight run."""
    file = tmp_path / "p.yaml"
    file.write_text(TINY)
    monkeypatch.chdir(tmp_path)
    short = ["stages.eval_sft=null", "stages.export=null"]
    step = TrainingSession.step

    def stopped(session, batch):
        if session.run_dir.name == "sft" and session.done == 1:
            session.flush()
            raise KeyboardInterrupt
        return step(session, batch)

    monkeypatch.setattr(TrainingSession, "step", stopped)
    assert cli.main(["pipeline", str(file), "run.dir=stopped", *short]) == 130
    monkeypatch.setattr(TrainingSession, "step", step)
    shutil.copytree("stopped", "straight", ignore=shutil.ignore_patterns("sft"))
    Path("stopped").rename("moved")
    assert cli.main(["pipeline", str(file), "run.dir=moved", *short]) == 0
    out = capsys.readouterr().out
    assert "pretrain (pretrain): done already" in out and "continues at step 1" in out

    # A reward of the user's that every answer earns, and by which the evaluation judges.
    rewards = tmp_path / "mine.py"
    rewards.write_text("RANGES = {'always': (0, 1)}\n\ndef reward_always(completion, **columns):\n    return 1\n")
    judged = ["stages.eval_sft.eval.correct=always", "--reward-file", str(rewards)]
    assert cli.main(["pipeline", str(file), "run.dir=straight", *judged]) == 0
    out = capsys.readouterr().out
    assert re.search(r"eval_sft +sft +100.0 % .* 100.0 % .* 6 ", out), out
    assert "Loaded params from straight/pretrain" in out and "straight/sft: starts (attempt 1)" in out
    assert out.count("  Q: ") == 3 and "native opened straight/export/model" in out
    assert (tmp_path / "straight" / "report" / "index.html").is_file()
    # `posttrain report` takes the pipeline's folder, too.
    assert [run.name for run in open_runs([tmp_path / "straight"])] == ["pretrain", "sft", "eval_sft"]
    assert read_config(tmp_path / "straight" / "export" / "model").embed_dim == 32
    runs = [tmp_path / name / "sft" for name in ("straight", "moved")]
    losses = [[row["learning/loss"] for row in read_metrics(metrics_path(run))] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert_same_bits(*(saved(run, 2) for run in runs))
