"""How near a completion's length is to a wanted one: a reward that needs no answer, for trying out a trainer."""

from dataclasses import dataclass, field
from typing import Literal

from rewards.base import RewardInput


@dataclass(frozen=True)
class Length:
    """Minus the distance from `target`, as a share of `target`: 0 at the target, -1 at twice as long and beyond."""

    target: int
    """Wanted length, in `unit`."""
    unit: Literal["words", "characters"] = "words"
    """Words are what white space parts."""
    low: float = field(default=-1.0, init=False)
    high: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(
                f"reward length: target={self.target}: a length is wanted that can be missed on both sides; "
                "set target >= 1"
            )
        if self.unit not in ("words", "characters"):
            raise ValueError(f"reward length: unit={self.unit!r}: it counts words or characters; name one of the two")

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""
        length = len(item.completion.split()) if self.unit == "words" else len(item.completion)
        return max(-1.0, -abs(length - self.target) / self.target)
