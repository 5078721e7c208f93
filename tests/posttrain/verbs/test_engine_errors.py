"""An engine or reward processes that cannot be kept alive: one line and exit code 1, whichever verb needed them."""

from typing import Any

import pytest

from posttrain import cli
from posttrain.samplers.base import SamplerError
from rewards.base import RewardPoolError

RUNS = {
    "grpo": ("posttrain.trainers.grpo.run", "grpo_stories"),
    "distill": ("posttrain.trainers.distill.run", "distill_stories"),
    "eval": ("posttrain.evaluate_run.run", "grpo_stories"),
    "pipeline": ("posttrain.pipeline.run", "quickstart"),
}


@pytest.mark.parametrize("kind", [SamplerError, RewardPoolError])
@pytest.mark.parametrize("verb", RUNS)
def test_what_cannot_be_kept_alive_is_one_line_and_code_1(
    verb: str, kind: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise kind("engine: died; restart it")

    function, recipe = RUNS[verb]
    monkeypatch.setattr(function, fails)
    monkeypatch.setattr("posttrain.process.start_process", lambda: None)
    assert cli.main([verb, recipe]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "engine: died; restart it"
