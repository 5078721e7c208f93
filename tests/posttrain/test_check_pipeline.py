"""What `posttrain check` knows of a pipeline before a stage has run, and what once some have."""

from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import cli, compile_check, pipeline
from posttrain.data.story_files import FILE_NAMES
from recipes.layers import LoadedRecipe
from recipes.load import load_recipe

RECIPE = """\
kind: pipeline
run: {{dir: {folder}/run}}
logging: {{console: none}}
common: {{model: {{preset: stories}}, tokenizer: {{path: "{{stages.data}}/tokenizer"}}, sampler: {{engine: native}}}}
stages:
  data: {{kind: stories, stories: {{documents: 40, examples: 16, held_out: 4}}}}
  pretrain: {{base: pretrain_stories, data: {{path: "{{stages.data}}/pretrain.jsonl"}}}}
  sft: {{base: sft_stories, data: {{path: "{{stages.data}}/sft.jsonl"}}}}
  grpo: {{base: grpo_stories, data: {{path: "{{stages.data}}/problems.jsonl", eval_path: null}}}}
  export: {{kind: export, data: {{path: "{{stages.data}}/test.jsonl"}}}}
"""
Check = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs the command: its exit code, the block of each stage, and the verdict (or the error)."""
    monkeypatch.setattr("posttrain.process.start_process", lambda: None)
    recipe = tmp_path / "p.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))

    def run(*arguments: str) -> tuple[int, dict[str, str], str]:
        code = cli.main(["check", str(recipe), *arguments])
        said = capsys.readouterr()
        body, found, verdict = said.out.partition("\nverdict: ")
        blocks = body.split("\nstage ")[1:]
        return code, {block.split()[3]: " ".join(block.split()) for block in blocks}, verdict if found else said.err

    return run


def test_each_stage_is_told_before_any_has_run_and_nothing_is_made(check: Check, tmp_path: Path) -> None:
    code, blocks, verdict = check()
    assert code == 0, verdict
    assert "begins with stage data" in " ".join(verdict.split())
    assert list(blocks) == ["data", "pretrain", "sft", "grpo", "export"]
    run = tmp_path / "run"
    assert (
        f"pretrain.jsonl, sft.jsonl, pairs.jsonl, problems.jsonl, validation.jsonl, test.jsonl below {run}/data"
        in (blocks["data"])
    )
    assert "rows of 128 tokens fit its 256 positions weights random ones" in blocks["pretrain"]
    assert f"weights those that stage pretrain will leave in {run}/pretrain" in blocks["sft"]
    assert f"data {run}/data/sft.jsonl, which stage data will write" in blocks["sft"]
    assert "known later the rows, and what of them is trained; once data has run, check again" in blocks["sft"]
    assert "native (as the recipe says); judged by gsm8k_exact x 1" in blocks["grpo"]
    assert "how the rewards judge what the model writes; once data and sft have run" in blocks["grpo"]
    assert not run.exists()


def test_what_cannot_run_is_named_with_its_stage_and_the_others_are_told(check: Check, tmp_path: Path) -> None:
    code, blocks, verdict = check(
        "stages.sft.data.path='{stages.data}/stf.jsonl'",
        "stages.pretrain.data.sequence_length=512",
        f"stages.grpo.model.load_parameters_path={tmp_path / 'nowhere'}",
        f"stages.export.data.path={tmp_path / 'none.jsonl'}",
    )
    assert code == 1 and " ".join(verdict.split()).endswith("see the problems of pretrain, sft, grpo, export")
    assert "problem data.sequence_length=512: the model has positions for 256 tokens" in blocks["pretrain"]
    assert "stage data will not write it; it writes tokenizer, pretrain.jsonl" in blocks["sft"]
    assert f"model.load_parameters_path={tmp_path / 'nowhere'}: does not exist" in blocks["grpo"]
    assert "problem data.path=" in blocks["export"] and "none.jsonl" in blocks["export"]


def test_once_a_stage_is_done_what_it_wrote_is_read(check: Check, tmp_path: Path) -> None:
    others = [f"stages.{name}=null" for name in ("pretrain", "sft", "grpo", "export")]
    pipeline.run(load_recipe(str(tmp_path / "p.yaml"), others), ["test"], reward_file=None)
    assert sorted(path.name for path in (tmp_path / "run/data").iterdir() if path.name in FILE_NAMES) == sorted(
        FILE_NAMES
    )
    # The files of a stage that is done are what the next ones read: forty documents fill some rows.
    code, blocks, verdict = check()
    assert code == 0 and "begins with stage pretrain" in " ".join(verdict.split())
    assert "done already; it will not be repeated" in blocks["data"]
    for name in ("pretrain", "sft"):
        assert "tokens to predict" in blocks[name] and "known later" not in blocks[name]
    assert "160 prompts that fit, 0 held out" in blocks["grpo"] and "once sft has run" in blocks["grpo"]
    assert "4 problems, 0 held out" in blocks["export"]
    (tmp_path / "run/data/sft.jsonl").write_text("")
    code, blocks, verdict = check()
    assert code == 1 and "sft.jsonl" in blocks["sft"] and "the problems of sft" in verdict
    # Too few problems for a step.
    code, blocks, _ = check("stages.sft=null", "stages.grpo.rl.prompts_per_step=200")
    assert code == 1 and "problem rl.prompts_per_step=200: there are 160 prompts" in blocks["grpo"]


def test_tables_of_memory_are_those_of_the_stages_that_train(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def table(loaded: LoadedRecipe, **settings: float | None) -> bool:
        asked.append((loaded.recipe.kind, settings))
        return loaded.recipe.kind != "sft"

    monkeypatch.setattr(compile_check, "check_compile", table)
    code, blocks, verdict = check("--compile", "--device-memory-gib", "2")
    settings = {"devices": None, "device_memory_gib": 2.0, "timeout": None}
    assert asked == [("pretrain", settings), ("sft", settings), ("grpo", settings)]
    assert code == 1 and "it does not fit into --device-memory-gib" in blocks["sft"] and "problems of sft" in verdict
    code, _, error = check("--prompts", "3")
    assert code == 2 and "--prompts=3: it has no effect with kind=pipeline" in error
