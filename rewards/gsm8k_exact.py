"""Whether the final number is the gold number, as GSM8K asks. No algebra system, so it costs microseconds.

It is not the data set's own script, which takes the digits right after the first `####` and knows no tags. Of a line
that is a number and its unit both take the same; this one reads more spellings (`x = 5`, `1 1/2`, `3 million`), and
takes no number from a line that goes on to change it (`5 or 6`, `5 and a half`).
"""

from dataclasses import dataclass, field

from rewards.base import RewardInput, Tags
from rewards.extraction import final_answer
from rewards.normalization import canonical


@dataclass(frozen=True)
class Gsm8kExact:
    """1 where the final answer is the gold answer, 0 otherwise.

    The final answer is what `rewards.extraction.final_answer` finds: the last box or solution block, else what follows
    the last `####`, or the number that this begins with. Both answers are normalised first, so `1,000` equals `1000.0`.
    """

    tags: Tags = field(default_factory=Tags)
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""
        found = final_answer(item.completion, self.tags)
        return float(found is not None and canonical(found) == canonical(item.answer))
