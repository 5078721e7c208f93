"""The doctor names each symptom once it has lasted, and once only."""

import logging
import math
from collections.abc import Iterator

import pytest

from posttrain.doctor import Doctor, HopelessRun
from recipes.schema import DoctorSection

HEALTHY = {
    "completions/truncated": 0.9,
    "groups/without_signal": 0.75,
    "rewards/total/mean": 0.5,
    "sampler/mismatch_kl": 0.01,
}
SYMPTOMS = {
    "every completion is truncated": {"completions/truncated": 1.0},
    "no group has any difference in reward": {"groups/without_signal": 1.0},
    "every reward is the lowest there is": {"rewards/total/mean": -1.0},
    "every reward is the highest there is": {"rewards/total/mean": 2.0},
    "sampler and trainer disagree": {"sampler/mismatch_kl": 0.11},
}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The messages of the doctor's warnings."""
    logger, found = logging.getLogger("posttrain.doctor"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def doctor(*, low: float = -1.0, high: float = 2.0, **settings: object) -> Doctor:
    return Doctor(DoctorSection(patience=3).model_copy(update=settings), lowest=low, highest=high)


def examine(watching: Doctor, step: int, row: dict[str, float]) -> list[str]:
    watching.note(row)
    return watching.examine(step)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_that_lasts_is_named_once_with_its_remedy(symptom: str, warnings: list[str]) -> None:
    watching, ill = doctor(), {**HEALTHY, **SYMPTOMS[symptom]}
    assert [examine(watching, step, ill) for step in range(1, 8)] == [[], [], [symptom], [], [], [], []]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"step 3: doctor.patience=3: {symptom}, for 3 steps: ")
    assert len(warnings[0].split(": ", 3)[3]) > 20, "a remedy"


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_healthy_step_begins_the_count_anew(symptom: str) -> None:
    watching, ill = doctor(), {**HEALTHY, **SYMPTOMS[symptom]}
    steps = [ill, ill, HEALTHY, ill, ill, HEALTHY, ill, ill, ill]
    named = [examine(watching, number, row) for number, row in enumerate(steps, start=1)]
    assert named == [[]] * 8 + [[symptom]]


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_stop_ends_the_run_at_the_step_that_warn_would_name(symptom: str, warnings: list[str]) -> None:
    watching, ill = doctor(action="stop"), {**HEALTHY, **SYMPTOMS[symptom]}
    examine(watching, 1, ill)
    examine(watching, 2, ill)
    with pytest.raises(HopelessRun, match=rf"step 3: doctor\.patience=3: {symptom}"):
        examine(watching, 3, ill)
    assert not warnings


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_patience_outlives_attempts_of_a_step_each(symptom: str) -> None:
    ill, counts = {**HEALTHY, **SYMPTOMS[symptom]}, dict[str, int]()
    for step in (1, 2):
        attempt = doctor(action="stop")
        attempt.take_up(counts)
        assert examine(attempt, step, ill) == []
        counts = attempt.counts()
    # One that was ended before it could say so, and one whose policy has recovered.
    for row, named in ((ill, [symptom]), (HEALTHY, [])):
        late = doctor()
        late.take_up({**counts, symptom: 3, "of another version": 9})
        assert examine(late, 4, row) == named and "of another version" not in late.counts()
    last = doctor(action="stop")
    last.take_up(counts)
    with pytest.raises(HopelessRun, match=rf"step 3: doctor\.patience=3: {symptom}"):
        examine(last, 3, ill)


def test_a_healthy_run_has_no_symptom_and_off_looks_at_nothing(warnings: list[str]) -> None:
    watching, blind = doctor(action="stop"), doctor(action="off")
    blind.take_up(dict.fromkeys(SYMPTOMS, 9))
    ill = {**HEALTHY, **{name: value for change in SYMPTOMS.values() for name, value in change.items()}}
    for step in range(1, 20):
        assert examine(watching, step, HEALTHY) == []
        assert examine(blind, step, ill) == []
    assert not warnings


def test_symptoms_that_come_together_are_each_named() -> None:
    ill = {**HEALTHY, "completions/truncated": 1.0, "groups/without_signal": 1.0, "rewards/total/mean": -1.0}
    assert examine(doctor(patience=1), 1, ill) == [
        "every completion is truncated",
        "no group has any difference in reward",
        "every reward is the lowest there is",
    ]


@pytest.mark.parametrize(
    ("low", "high", "mean", "named"),
    [
        # Sums of weighted rewards reach their end to rounding.
        (0.0, 0.3, 0.1 + 0.2, "every reward is the highest there is"),
        (0.0, 1.0, 1 - 1e-6, None),
        (-math.inf, 0.0, 0.0, "every reward is the highest there is"),
        (-math.inf, 0.0, -1e300, None),
        (-math.inf, math.inf, 0.0, None),
        # A single value is no sign of anything.
        (0.0, 0.0, 0.0, None),
    ],
)
def test_rewards_at_the_end_of_their_range(low: float, high: float, mean: float, named: str | None) -> None:
    found = examine(doctor(patience=1, low=low, high=high), 1, {**HEALTHY, "rewards/total/mean": mean})
    assert found == ([] if named is None else [named])


@pytest.mark.parametrize("mismatch", [math.nan, math.inf])
def test_a_mismatch_that_is_no_number_is_one(mismatch: float) -> None:
    found = examine(doctor(patience=1), 1, {**HEALTHY, "sampler/mismatch_kl": mismatch})
    assert found == ["sampler and trainer disagree"]
