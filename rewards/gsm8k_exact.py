"""GSM8K's own measure: the final number equals the gold number. No algebra system, so it costs microseconds."""

from dataclasses import dataclass, field

from rewards.base import RewardInput, Tags
from rewards.extraction import final_answer
from rewards.normalization import canonical


@dataclass(frozen=True)
class Gsm8kExact:
    """1 where the final answer is the gold answer, 0 otherwise.

    The final answer is what `rewards.extraction.final_answer` finds: the last box or solution block, else what follows
    the last `####`. Both answers are normalised first, so `1,000` equals `1000.0`.
    """

    tags: Tags = field(default_factory=Tags)
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""
        found = final_answer(item.completion, self.tags)
        return float(found is not None and canonical(found) == canonical(item.answer))
