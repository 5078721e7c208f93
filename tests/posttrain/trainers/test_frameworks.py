"""Pairs and distillation in Linen are what they are in NNX, and adapters learn from a teacher in either."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import lora
from posttrain.trainers.sft import prepare_rows
from tests.posttrain.trainers.runs import initial, load, train
from tests.pretrain.runs import assert_same_bits, losses

CASES = {
    "distill": ("distill", "teacher.overrides.num_layers=3", "distill.temperature=2.0"),
    "dpo": ("dpo", "data.buckets=[]", "dpo.beta=2.0"),
}
QUIET = ("checkpoint.enabled=false", "train.steps=4")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["distill", "dpo"])
def test_linen_unrolled_has_the_curve_of_nnx_scanned(tmp_path: Path, case: str) -> None:
    """To 1e-5 over four steps, each on rows of its own, the teacher in the student's framework too."""
    kind, *more = CASES[case]
    linen = ["model.framework=linen", "model.scan_layers=false"]
    if kind == "distill":
        linen += ["teacher.framework=linen", "teacher.scan_layers=false"]
    curves = [
        list(losses(train(kind, tmp_path, name, *QUIET, *more, *layout).run_dir).values())
        for name, layout in (("nnx", []), ("linen", linen))
    ]
    assert len(set(curves[0])) == 4
    np.testing.assert_allclose(*curves, rtol=1e-5)


@pytest.mark.slow
def test_adapters_learn_from_a_teacher_on_a_base_that_keeps_every_bit(tmp_path: Path) -> None:
    given = ("lora.rank=2", "teacher.overrides.num_layers=3")
    result = train("distill", tmp_path, "adapters", "checkpoint.interval=3", *given)
    found = losses(result.run_dir)
    whole = losses(train("distill", tmp_path, "whole", given[1], "train.steps=1", QUIET[0]).run_dir)
    assert found[1] == pytest.approx(whole[1], rel=1e-6)
    assert found[6] < found[1] - 0.05
    recipe: Any = load("distill", tmp_path, "unused", *given).recipe
    setup = prepare_rows(recipe)
    setup.close()
    base, _ = lora.split(initial(recipe, setup).params)
    assert_same_bits(lora.split(result.state.params)[0], base)


@pytest.mark.parametrize(
    ("kind", "overrides", "complaint"),
    [
        ("distill", ("teacher.overrides.vocab_size=300",), r"teacher: vocab_size=300, the student's is 259"),
        ("distill", ("teacher.overrides.max_position=32",), r"the teacher has positions for 32 tokens"),
        ("distill", ("lora.rank=2", "lora.modules=[q_proj]"), r"lora\.modules: 'q_proj'"),
        ("dpo", ("model.load_full_state_path=elsewhere",), r"the reference is the weights that training began with"),
        ("dpo", ("dpo.reference_memory=pinned_host",), r"dpo\.reference_memory=pinned_host: has no effect on a CPU"),
        ("dpo", ("dpo.reference=cached", "dpo.reference_memory=pinned_host"), r"has no effect while dpo\.reference"),
        ("dpo", ("dpo.loss=simpo", "dpo.reference_dtype=bfloat16"), r"has no effect while dpo\.loss=simpo"),
        (
            "sft",
            ("optimizer.name=sgd", "optimizer.memory=pinned_host"),
            r"has no effect: sgd without momentum keeps no moments",
        ),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_before_a_run_begins(
    tmp_path: Path, kind: str, overrides: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(kind, tmp_path, "refused", *overrides)
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_reference_may_rest_in_another_number_format(tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: log-probabilities of some 100 nats differ, and so the first loss is ln 2 no more."""
    halved = train("dpo", tmp_path, "halved", "dpo.reference_dtype=bfloat16", "train.steps=1", QUIET[0])
    first = losses(halved.run_dir)[1]
    assert first != np.float32(np.log(2)) and first == pytest.approx(np.log(2), abs=0.1)
