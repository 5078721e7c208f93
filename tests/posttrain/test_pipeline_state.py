"""What a pipeline's stages were made from: of one that stopped half-way, of one that moved, of files outside."""

import json
import os
import shutil
from pathlib import Path

import pytest

from posttrain.pipeline_state import begun_path, done_path, read_begun, read_done
from pretrain.guard import Interrupted
from recipes.load import load_recipe
from recipes.rundir import manifest_path, read_attempts, resolved_path
from tests.posttrain.test_pipeline import Fakes


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """A pipeline that was interrupted in its stage sft, which is the third of five."""
    fakes = Fakes(tmp_path, monkeypatch)
    fakes.stop_at = "sft"
    with pytest.raises(Interrupted):
        fakes()
    fakes.stop_at = None
    return fakes


def save(stage: Path, step: int) -> None:
    """What a finished save leaves behind, as far as the run directory knows it."""
    manifest_path(stage, step).parent.mkdir(parents=True)
    manifest_path(stage, step).write_text("{}")


def test_a_half_trained_stage_does_not_go_on_from_what_another_stage_gave(stopped: Fakes) -> None:
    run = stopped.folder / "run"
    save(run / "sft", 30)
    before = read_begun(run, "sft")
    assert before is not None and before.made_from == {
        name: done.identity for name in ("data", "pretrain") if (done := read_done(run, name))
    }
    shutil.rmtree(run / "pretrain")
    (line,) = stopped.refused("stages.pretrain.optimizer.learning_rate=0.5")
    assert line == (
        f"{run}/sft: stage sft was begun, and was made from another pretrain than the one that is there, or will be; "
        f"remove {run}/sft to begin it anew, or choose another run.dir"
    )
    shutil.rmtree(run / "sft")
    stopped("stages.pretrain.optimizer.learning_rate=0.5")
    assert stopped.ran == ["pretrain", "sft", "grpo", "eval_sft"]


def test_a_stage_without_a_checkpoint_starts_anew_from_what_there_is_now(stopped: Fakes) -> None:
    run = stopped.folder / "run"
    first = read_begun(run, "sft")
    shutil.rmtree(run / "pretrain")
    stopped()
    made, pretrain = read_done(run, "sft"), read_done(run, "pretrain")
    assert first is not None and made is not None and pretrain is not None
    assert stopped.ran[:2] == ["pretrain", "sft"] and len(read_attempts(run / "sft")) == 2
    assert made.made_from["pretrain"] == pretrain.identity != first.made_from["pretrain"]


def test_a_stage_that_goes_on_is_said_to_be_made_from_what_it_was_begun_from(stopped: Fakes) -> None:
    run = stopped.folder / "run"
    save(run / "sft", 30)
    before = begun_path(run, "sft").read_text()
    stopped("stages.sft.logging.console=none")
    assert begun_path(run, "sft").read_text() == before
    begun, done = read_begun(run, "sft"), read_done(run, "sft")
    assert begun is not None and done is not None and done.made_from == begun.made_from
    assert done.values["logging"]["console"] == "none" != begun.values["logging"]["console"]


def test_a_checkpoint_of_nobody_knows_what_is_refused(stopped: Fakes) -> None:
    run = stopped.folder / "run"
    save(run / "sft", 30)
    begun_path(run, "sft").unlink()
    (line,) = stopped.refused()
    assert "stage sft was begun, and there is no begun.json that says from what; remove" in line


def test_what_is_said_of_a_damaged_record_helps(stopped: Fakes) -> None:
    """Of a stage in the middle, too, from which others were made, and from those again others."""
    run = stopped.folder / "run"
    stopped()
    later = [run / "eval_sft", run / "grpo"]
    done_path(run, "sft").write_text('{"name": "sf')
    said = f"remove what was made from it as well: {later[0]}, {later[1]}"
    (line,) = stopped.refused()
    assert line == (
        f"{run}/sft/stage.json: is no record of a stage; remove it, and the stage's folder is taken up again ({said})"
    )
    done_path(run, "sft").unlink()
    for folder in later:
        shutil.rmtree(folder)
    stopped.ran.clear()
    stopped()
    assert stopped.ran == ["sft", "grpo", "eval_sft"]
    # The last has none after it; of one that was only begun the folder goes.
    done_path(run, "eval_sft").write_text("[]")
    (line,) = stopped.refused()
    assert line.endswith("the stage's folder is taken up again")
    done_path(run, "eval_sft").unlink()
    begun_path(run, "eval_sft").write_text("{}")
    (line,) = stopped.refused()
    assert line == f"{run}/eval_sft/begun.json: is no record of a stage; remove {run}/eval_sft to begin the stage anew"


@pytest.mark.parametrize("how", ["moved", "named from elsewhere"])
def test_a_half_done_pipeline_goes_on_in_another_place(
    stopped: Fakes, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage's own recipe, which its run holds to, names the folders as they are now."""
    place = stopped.folder / "run"
    save(place / "sft", 30)
    if how == "moved":
        place = place.rename(stopped.folder / "moved")
        named = str(place)
    else:
        monkeypatch.chdir(stopped.folder)
        named = "run"
    stopped(f"run.dir={place}")
    assert stopped.ran == ["sft", "grpo", "eval_sft"]
    recipe = load_recipe(str(resolved_path(place / "sft")), []).recipe
    assert recipe.data.path == f"{named}/data/sft.jsonl" and recipe.run.dir == f"{named}/sft"
    assert recipe.model.load_parameters_path == f"{named}/pretrain"
    assert len(read_attempts(place / "sft")) == 2


def test_an_edited_file_of_a_done_or_half_done_stage_is_refused(stopped: Fakes) -> None:
    run, file = stopped.folder / "run", stopped.folder / "mine.jsonl"
    file.write_text('{"prompt": "1 + 1", "completion": "2"}\n')
    shutil.rmtree(run / "sft")
    stopped.stop_at = "grpo"
    mine = f"stages.sft.data.path={file}"
    with pytest.raises(Interrupted):
        stopped(mine)
    stopped.stop_at = None
    text = file.read_text()
    file.write_text(text.replace("2", "3"))
    said = f"what data.path={file} names is not what it was; remove {run}/sft to"
    assert stopped.refused(mine) == [
        f"{run}/sft: stage sft is done, and {said} make it anew, choose another run.dir, or take the changes back"
    ]
    done_path(run, "sft").unlink()
    save(run / "sft", 60)
    (line,) = stopped.refused(mine)
    assert line.startswith(f"{run}/sft: stage sft was begun, and {said} begin it anew")
    # The same bytes at another time are the same file, and one that is no longer there is not another.
    file.write_text(text)
    os.utime(file, (1, 1))
    stopped(mine)
    assert stopped.ran == ["sft", "grpo", "eval_sft"]
    file.unlink()
    stopped(mine)
    assert stopped.ran == []


def test_a_record_of_before_files_were_kept_is_read(stopped: Fakes) -> None:
    path = done_path(stopped.folder / "run", "data")
    values = json.loads(path.read_text())
    del values["files"]
    path.write_text(json.dumps(values))
    stopped()
    assert stopped.ran == ["sft", "grpo", "eval_sft"]


def test_a_stage_of_another_kind_is_named_by_its_kind_alone(stopped: Fakes) -> None:
    file = stopped.recipe
    file.write_text(file.read_text().replace("base: sft_stories", "base: pretrain_stories"))
    (line,) = stopped.refused("stages.grpo=null", "stages.eval_sft=null")
    assert "stage sft was begun, and its recipe changes kind (sft -> pretrain); remove" in line


def test_a_half_done_stage_goes_on_with_a_mended_reward_file_once_it_is_accepted(stopped: Fakes) -> None:
    run, file = stopped.folder / "run", stopped.folder / "mine.py"
    file.write_text("def reward_short(completion, **columns):\n    return 1.0\n")
    stopped.stop_at = "grpo"
    with pytest.raises(Interrupted):
        stopped(reward_file=file)
    save(run / "grpo", 20)
    stopped.stop_at = None
    file.write_text(file.read_text().replace("1.0", "0.5"))
    (line,) = stopped.refused(reward_file=file)
    assert line.endswith("or set stages.grpo.rewards.changed_file=accept to go on with this one")
    accept = ("stages.grpo.rewards.changed_file=accept", "stages.grpo.rewards.on_failure=stop")
    stopped(*accept, reward_file=file)
    assert stopped.ran == ["grpo", "eval_sft"]
    # What is done is of the mended file, and of the rule with which it went on.
    stopped(*accept, reward_file=file)
    assert stopped.ran == []
    (line,) = stopped.refused(accept[0], reward_file=file)
    assert "stage grpo is done, and its recipe changes rewards.on_failure (stop -> zero)" in line
