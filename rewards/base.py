"""What a reward is: text in, one finite number out, within a range that it states."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class RewardInput:
    """One completion to be judged."""

    prompt: str
    """The prompt as the policy saw it, special tokens spelled out."""
    completion: str
    """What the policy wrote, without special tokens."""
    answer: str
    """The problem's gold answer."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the problem's row: what JSON can hold."""


@dataclass(frozen=True)
class Tags:
    """The marks that a prompt asks the policy to write around its reasoning and its answer."""

    reasoning_start: str = "<reasoning>"
    reasoning_end: str = "</reasoning>"
    solution_start: str = "<answer>"
    solution_end: str = "</answer>"

    def __post_init__(self) -> None:
        spelled = self.in_order()
        for one in spelled:
            if not one.strip() or one != one.strip():
                raise ValueError(
                    f"tags: {one!r}: a tag is text that begins and ends with a visible character; give it one"
                )
        for one in spelled:
            if sum(one in other for other in spelled) > 1:
                raise ValueError(
                    f"tags: {one!r}: it also occurs in another of {', '.join(spelled)}, so the two could not be told "
                    "apart; spell the four tags differently"
                )

    def in_order(self) -> tuple[str, str, str, str]:
        """The four tags in the order in which a completion writes them."""
        return self.reasoning_start, self.reasoning_end, self.solution_start, self.solution_end


class Reward(Protocol):
    """A reward. It is called in a process of its own, on one completion at a time."""

    @property
    def low(self) -> float:
        """The smallest value that it returns."""

    @property
    def high(self) -> float:
        """The largest value that it returns."""

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""


@dataclass(frozen=True)
class RewardSpec:
    """A reward of the registry as a recipe names it."""

    name: str
    weight: float = 1.0
    """What its value is multiplied by in the total."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The reward's own settings; `rewards/<file>` documents them."""


@dataclass(frozen=True)
class RewardInfo:
    """A reward as the pool loaded it."""

    name: str
    weight: float
    low: float
    high: float


LARGEST = 1e30
"""The size of a reward, a weight or an option's value, at most: squares of more, as in a group's variance, overflow."""

FailureKind = Literal["not_finite", "not_a_number", "out_of_range", "exception", "timeout", "died"]
"""Why a reward gave no value: it returned NaN or infinity; returned something else than a number; left the range that
it states, or `LARGEST`; raised; did not answer in time and was killed; or its process ended."""


@dataclass(frozen=True)
class Outcome:
    """What one reward said of one completion: a value, or why there is none."""

    reward: str
    value: float | None
    failure: FailureKind | None
    detail: str
    """For a failure, what happened: the exception's text, the signal, the seconds; empty otherwise."""
    notes: tuple[str, ...] = ()
    """What was odd though a value came: text that the reward printed, a process that it forked."""

    def __post_init__(self) -> None:
        assert (self.value is None) != (self.failure is None), self


class RewardFailure(RuntimeError):
    """A reward gave no value, and the rule for failures is to stop."""


class RewardPoolError(RuntimeError):
    """The processes that run rewards cannot be kept alive, whatever they are given."""


def check_columns(where: str, columns: Mapping[str, Any]) -> None:
    """Requires that columns can be sent to the processes that run rewards.

    Args:
        where: whose columns they are, for the message.
        columns: value by name.

    Raises:
        ValueError: a column holds what JSON cannot, or takes the name of a field that every reward knows.
    """
    for name, value in columns.items():
        if name in ("prompt", "completion", "answer"):
            raise ValueError(f"{where}: column {name!r}: rewards know this name already; rename the column")
        if not _is_json(value):
            raise ValueError(
                f"{where}: column {name!r}: {type(value).__name__}: columns reach rewards as JSON; turn it into text "
                "or numbers, or drop the column"
            )


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or type(value) in (str, int, float, bool)
