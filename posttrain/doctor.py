"""Names what cannot learn: symptoms of a reinforcement-learning run that last for some steps."""

import logging
import math
from collections.abc import Callable, Mapping

from recipes.schema import DoctorSection

logger = logging.getLogger(__name__)

AT_THE_END = 1e-9
"""Rewards whose mean is this near to an end of their range, relative to it, are at that end."""


class HopelessRun(ValueError):
    """A symptom has lasted, and doctor.action=stop."""


class Doctor:
    """Looks at each step's metrics; warns of a lasting symptom once, or ends the run."""

    def __init__(self, section: DoctorSection, *, lowest: float, highest: float) -> None:
        """Watches for what the section says.

        Args:
            section: the recipe's.
            lowest: the smallest total that the rewards can give; may be infinite.
            highest: the largest.
        """
        self._section = section
        self._symptoms = watched_symptoms(section, lowest, highest)
        self._lasted = dict.fromkeys(self._symptoms, 0)
        self._told: set[str] = set()

    def counts(self) -> dict[str, int]:
        """For how many steps each symptom has lasted, as a checkpoint keeps it."""
        return dict(self._lasted)

    def take_up(self, counts: Mapping[str, int]) -> None:
        """Goes on from the counts of an earlier attempt; a symptom that they do not name begins anew."""
        self._lasted |= {name: count for name, count in counts.items() if name in self._symptoms}

    def note(self, row: Mapping[str, float]) -> None:
        """Counts the metrics of a step: before it is saved, so that the counts are those of the steps that are."""
        if self._section.action == "off":
            return
        for name, (shows, _) in self._symptoms.items():
            self._lasted[name] = self._lasted[name] + 1 if shows(row) else 0

    def examine(self, step: int) -> list[str]:
        """Says what the steps up to this one show; an attempt that goes on says again what lasts still.

        Returns:
            The symptoms that have lasted for doctor.patience steps, and weren't named while they did.

        Raises:
            HopelessRun: there is one, and the action is stop.
        """
        if self._section.action == "off":
            return []
        lasting = {name for name, count in self._lasted.items() if count >= self._section.patience}
        found = [name for name in self._symptoms if name in lasting - self._told]
        self._told = lasting
        for name in found:
            message = (
                f"step {step}: doctor.patience={self._section.patience}: {name}, for {self._lasted[name]} steps: "
                f"{self._symptoms[name][1]}"
            )
            if self._section.action == "stop":
                raise HopelessRun(f"{message}; or set doctor.action=warn to go on")
            logger.warning("%s", message)
        return found


Symptom = tuple[Callable[[Mapping[str, float]], bool], str]
"""Whether a step's metrics show it, and what to do about it."""


def watched_symptoms(section: DoctorSection, lowest: float, highest: float) -> dict[str, Symptom]:
    """What is watched for by name: whether a step's metrics show it, and what to do about it."""
    return {
        "every completion is truncated": (
            lambda row: row["completions/truncated"] == 1.0,
            "none ends with a stop token, so none can be right; raise rl.max_completion_length, look at a prompt "
            "with `posttrain check`, or teach the model to stop with SFT first",
        ),
        "no group has any difference in reward": (
            lambda row: row["groups/without_signal"] == 1.0,
            "every advantage is 0, so nothing is learnt; use easier or harder problems, more generations, or a "
            "reward with parts",
        ),
        "every reward is the lowest there is": (
            lambda row: _at(row["rewards/total/mean"], lowest, highest),
            "the policy never succeeds; use easier problems or SFT first",
        ),
        "every reward is the highest there is": (
            lambda row: _at(row["rewards/total/mean"], highest, lowest),
            "there is nothing left to learn; use harder problems, or stop",
        ),
        "sampler and trainer disagree": (
            lambda row: not row.get("sampler/mismatch_kl", 0.0) <= section.max_mismatch,
            f"sampler/mismatch_kl is above doctor.max_mismatch={section.max_mismatch}; look at dtypes, at the "
            "sampler's sync, and at the version of the weights in the completions' ledger",
        ),
    }


def _at(value: float, end: float, other: float) -> bool:
    """Whether a mean is at one end of its range."""
    if math.isinf(end) or end == other:
        return False
    scale = abs(end - other) if math.isfinite(other) else max(1.0, abs(end))
    return abs(value - end) <= AT_THE_END * scale
