"""The stages of a pipeline: what each inherits, where its parameters come from, and that mistakes are told first."""

from pathlib import Path

import pytest

from recipes.load import dump_recipe, load_recipe
from recipes.present import shown_lines
from recipes.schema import RECIPE_KINDS, EvalRecipe
from recipes.stages import STAGE_KINDS, place_stage

PIPELINE = """\
kind: pipeline
run: {dir: there}
logging: {console: plain}
common:
  model: {preset: stories, overrides: {num_layers: 1}}
  tokenizer: {path: "{stages.data}/tokenizer"}
  rewards: {functions: {gsm8k_exact: 2.0}}
stages:
  data: {kind: stories}
  pretrain:
    base: pretrain_stories
    model: {framework: linen}
    data: {path: "{stages.data}/pretrain.jsonl"}
    train: {steps: 3}
  sft:
    base: sft_stories
    data: {path: "{stages.data}/sft.jsonl"}
  grpo:
    base: grpo_stories
    data: {path: "{stages.data}/problems.jsonl", eval_path: null}
  eval_sft:
    kind: eval
    base: grpo_stories
    from: sft
    data: {path: "{stages.data}/test.jsonl", eval_path: null}
  export:
    kind: export
    data: {path: "{stages.data}/test.jsonl"}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "p.yaml"
    file.write_text(PIPELINE)
    return file


def stages(path: Path, *overrides: str) -> dict:
    """The stages by name."""
    return {stage.name: stage for stage in load_recipe(str(path), overrides).stages}


def refused(path: Path, *overrides: str) -> list[str]:
    """The lines of the error."""
    with pytest.raises(ValueError) as caught:
        load_recipe(str(path), overrides)
    return str(caught.value).splitlines()


def test_a_stage_begins_with_the_training_stage_before_it_unless_it_says_otherwise(path):
    found = stages(path)
    assert {name: stage.start for name, stage in found.items()} == {
        "data": None, "pretrain": None, "sft": "pretrain", "grpo": "sft", "eval_sft": "sft", "export": "grpo",
    }  # fmt: skip
    assert found["sft"].loaded.recipe.model.load_parameters_path == "{stages.pretrain}"
    assert found["grpo"].needs == ("sft", "data")
    assert stages(path, "stages.grpo.from=pretrain")["grpo"].start == "pretrain"
    alone = stages(path, "stages.grpo.from=null")["grpo"]
    assert alone.start is None and alone.loaded.recipe.model.load_parameters_path is None
    named = stages(path, "stages.grpo.model.load_parameters_path=elsewhere")["grpo"]
    assert named.start is None and named.loaded.recipe.model.load_parameters_path == "elsewhere"


def test_a_dropped_stage_is_passed_over(path):
    found = stages(path, "stages.sft=null", "stages.eval_sft=null")
    assert list(found) == ["data", "pretrain", "grpo", "export"] and found["grpo"].start == "pretrain"


def test_layers_go_over_each_other_in_their_order(path):
    found = stages(path, "stages.sft.train.seed=7", "common.train.seed=5")
    # Schema < base < common < stage < override.
    assert found["sft"].loaded.recipe.schedule.kind == "cosine"
    assert found["sft"].loaded.recipe.data.sequence_length == 128
    assert found["grpo"].loaded.recipe.rewards.functions == {"gsm8k_exact": 2.0}
    assert found["pretrain"].loaded.recipe.train.steps == 3
    assert found["sft"].loaded.recipe.train.seed == 7 and found["pretrain"].loaded.recipe.train.seed == 5
    assert found["pretrain"].loaded.recipe.model.framework == "linen"
    assert found["sft"].loaded.recipe.model.framework == "nnx"
    assert found["grpo"].loaded.recipe.model.overrides == {"num_layers": 1}
    assert found["sft"].loaded.recipe.logging.console == "plain"


def test_origins_name_the_line_of_each_layer(path):
    origins = stages(path, "stages.sft.train.steps=9")["sft"].loaded.origins
    assert origins["model.preset"] == f"{path}:5"
    assert origins["data.path"] == f"{path}:17"
    assert origins["train.steps"] == "override"
    assert origins["optimizer.learning_rate"].startswith("recipes/sft_stories.yaml:")


def test_a_grpo_recipe_may_be_the_base_of_an_evaluation(path):
    recipe = stages(path)["eval_sft"].loaded.recipe
    assert isinstance(recipe, EvalRecipe) and recipe.rl.max_completion_length == 40


def test_a_stage_sets_aside_what_its_mode_ignores_of_its_base(path):
    (path.parent / "muon.yaml").write_text("base: dpo_stories\noptimizer: {name: muon, muon_beta: 0.5}\n")
    path.write_text(path.read_text() + "  dpo:\n    base: muon.yaml\n    optimizer: {name: adamw}\n")
    dpo = stages(path)["dpo"].loaded
    assert dpo.recipe.optimizer.name == "adamw" and "muon_beta=0.5 is set aside" in dpo.notes[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stages.sft.train.stesp=3"], "command line: stage sft: train.stesp: unknown key; did you mean train.steps?"),
        (["stages.sft.train.steps=0"], "command line: stage sft: train.steps=0: must be >= 1"),
        (["stages.sft.from=stf"], "command line: stage sft: from=stf: there is no such stage; name one of pretrain"),
        (["stages.sft.from=grpo"], "command line: stage sft: from=grpo: is no training stage before this one"),
        (["stages.data.from=sft"], "command line: stage data: from=sft: a stage of kind stories has no model"),
        (["stages.sft.kind=sftt"], "command line: stage sft: kind=sftt: no such kind of stage; did you mean sft?"),
        (["stages.sft.kind=pipeline"], "command line: stage sft: kind=pipeline: no such kind of stage"),
        (["stages.more.train.steps=1"], "command line: stage more: kind: missing"),
        (["stages.More.kind=sft"], "command line: stage More: a stage's folder has its name"),
        (["stages.sft=3"], "command line: stage sft: 3: a stage has keys of its own"),
        (["stages.sft.base=sft_storys"], "command line: stage sft: base: sft_storys: no recipe of this name"),
        (["stages.sft.run.dir=x"], "command line: stage sft: run: a stage's folder is that of its name"),
        (["stages.sft.data.path='{stages.grpo}/a'"], "command line: stage sft: {stages.grpo}: comes later"),
        (["stages.sft.data.path='{stages.gone}/a'"], "command line: stage sft: {stages.gone}: there is no such stage"),
        (["common.modle.preset=x"], "command line: common.modle: is not shared by stages; did you mean common.model?"),
        (["common.data.path=x"], "command line: common.data: is not shared by stages; stages may share model"),
        (["stages={}"], "p.yaml: stages={}: a pipeline has stages"),
        (["run.resume=must"], "command line: run.resume=must: a pipeline goes on with whatever its folder holds"),
        (["stages.sft.checkpoint.enabled=false"], "stage grpo: begins with stage sft, which does not save"),
        (["stages.sft.lora.rank=4"], "stage grpo: begins with stage sft, which leaves adapters and no whole model"),
        (
            ["stages.sft.model.overrides.num_layers=2"],
            "stage sft: begins with stage pretrain, which trains another model (model.overrides={num_layers: 1}, here",
        ),
        (
            ["common.mesh={num_processes: 2, process_id: 0, coordinator_address: 'a:1'}"],
            "command line: stage sft: mesh.num_processes=2: a pipeline is one process; run the stages by their own",
        ),
        (["train.steps=3"], "command line: train: unknown key"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place_and_stage(path, overrides, said):
    assert any(said in line for line in refused(path, *overrides)), refused(path, *overrides)


def test_the_place_in_a_file_is_file_and_line(path):
    path.write_text(path.read_text().replace("{steps: 3}", "{stesp: 3}"))
    assert refused(path)[0].startswith(f"{path}:14: stage pretrain: train.stesp: unknown key")


def test_mistakes_of_all_stages_are_told_at_once(path):
    lines = refused(path, "stages.sft.train.steps=0", "stages.grpo.rl.num_generations=1")
    assert len(lines) == 2 and "stage sft" in lines[0] and "stage grpo" in lines[1]


def test_a_placed_stage_has_real_folders(path):
    found = stages(path)
    placed = place_stage(found["sft"], Path("runs/x")).recipe
    assert placed.run.dir == "runs/x/sft" and placed.data.path == "runs/x/data/sft.jsonl"
    assert placed.model.load_parameters_path == "runs/x/pretrain" and placed.tokenizer.path == "runs/x/data/tokenizer"
    # What only looks like a reference is a template, and stays.
    assert placed.data.prompt_template == "{question}"


def test_a_dumped_pipeline_loads_to_the_same_stages(path, tmp_path):
    loaded = load_recipe(str(path), ["stages.sft.train.steps=9"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(loaded.recipe))
    assert [one.loaded.recipe for one in load_recipe(str(again), []).stages] == [
        one.loaded.recipe for one in loaded.stages
    ]


def test_every_kind_but_a_pipeline_may_be_a_stage():
    assert {*STAGE_KINDS, "pipeline"} == set(RECIPE_KINDS)


def test_the_quickstart_evaluates_every_stage_on_one_test_set():
    found = {stage.name: stage for stage in load_recipe("quickstart", []).stages}
    evaluations = [stage for stage in found.values() if stage.loaded.recipe.kind == "eval"]
    assert {stage.start for stage in evaluations} == {"pretrain", "sft", "grpo"}
    assert len({stage.loaded.recipe.data.path for stage in evaluations}) == 1
    trained = {stage.loaded.recipe.data.path for stage in found.values() if stage.loaded.recipe.kind in ("sft", "grpo")}
    assert evaluations[0].loaded.recipe.data.path not in trained
    assert found["pretrain"].loaded.recipe.model.framework == "linen"


def test_a_shown_pipeline_is_a_recipe_and_names_the_origin_of_each_key(path, tmp_path):
    loaded = load_recipe(str(path), ["stages.sft.train.steps=9"])
    lines = [str(line) for line in shown_lines(loaded, True)]
    again = tmp_path / "shown.yaml"
    again.write_text("\n".join(lines))
    assert load_recipe(str(again), []).recipe == loaded.recipe
    after = lines.index(next(line for line in lines if line.startswith("  sft:")))
    assert lines[after + 1].split() == ["base:", "sft_stories", "#", f"{path}:16"]
    assert lines[after + 3].split("#")[1].strip() == "override"
