"""The shipped quickstart in miniature, with the real vLLM where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MINIATURE = (
    "common.sampler.num_slots=16",
    "common.model.overrides={num_layers: 1}",
    "stages.stories.stories={documents: 400, examples: 40, held_out: 12}",
    "stages.pretrain.train={steps: 20, per_device_batch_size: 4}",
    "stages.sft.train={steps: 4, per_device_batch_size: 4}",
    "stages.grpo.train.steps=2",
    "stages.grpo.rl={prompts_per_step: 2, num_generations: 4}",
    "logging.console=none",
)


def posttrain(folder: Path, *arguments: str) -> str:
    """What a command line printed, in a process of its own, since vLLM leaves its marks on one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_the_quickstart_ends_with_vllms_answers_from_the_export_which_are_the_native_engines_too(tmp_path):
    out = posttrain(tmp_path, "pipeline", "quickstart", *MINIATURE)
    run = tmp_path / "runs" / "quickstart"
    stages = {stage["name"]: stage for stage in json.loads((run / "pipeline.json").read_text())}
    assert list(stages) == [stage.name for stage in load_recipe("quickstart", []).stages]
    for name, stage in stages.items():
        assert (stage["kind"] == "eval") is ("greedy" in stage["result"].get("estimates", {})), name
    assert stages["export"]["result"]["engine"] == "vllm" and out.count("  Q: ") == 3
    assert (run / "report" / "index.html").stat().st_size > 50_000
    answers = stages["export"]["result"]["answers"]
    asked = [word for one in answers for word in ("--prompt", one["question"])]
    asked += ["--temperature", "0", "--max-tokens", "40", "--engine", "native", "--out", "answers.jsonl"]
    posttrain(tmp_path, "generate", str(run / "export" / "model"), *asked)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [one["completion"] for one in answers]
