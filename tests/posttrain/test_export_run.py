"""The export stage: what its folder says of the tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.convert import Target
from models.tokenizer import load_tokenizer
from posttrain import export_run
from recipes.load import load_recipe
from recipes.schema import TokenizerSection
from tests.models.checkpoints.test_convert import write_tokenizer

RECIPE = """\
kind: export
model: {preset: tiny-llama, load_parameters_path: somewhere}
tokenizer: {path: TOKENIZER}
data: {path: problems.jsonl}
"""


def test_ids_that_only_the_file_beside_the_tokenizer_names_end_completions_of_the_export_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [4], "temperature": 0.5}))
    targets: list[Target] = []
    monkeypatch.setattr(export_run, "convert", lambda source, folder, target, **_: targets.append(target))
    monkeypatch.setattr(export_run, "_problems", lambda *_: ([], None))
    monkeypatch.setattr(export_run, "_answers", lambda *_: ("native", "", []))
    recipe = tmp_path / "export.yaml"
    recipe.write_text(RECIPE.replace("TOKENIZER", str(tokenizer)))
    loaded: Any = load_recipe(str(recipe), [f"run.dir={tmp_path / 'run'}"])
    export_run.run(loaded, ["test"])
    (target,) = targets
    assert load_tokenizer(TokenizerSection(path=str(target.tokenizer))).stop_ids == (2, 4)
