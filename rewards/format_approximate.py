"""Each tag for itself: a gradient towards the form for a policy that does not write all of it yet."""

from dataclasses import dataclass, field

from rewards.base import RewardInput, Tags


@dataclass(frozen=True)
class FormatApproximate:
    """For each of the four tags `present` if it occurs exactly once in the completion, else `absent`.

    Where the prompt itself ends with the reasoning's start tag, that tag counts as written there.
    """

    tags: Tags = field(default_factory=Tags)
    present: float = 0.25
    """For a tag that occurs once."""
    absent: float = 0.0
    """For a tag that is missing or repeated; a penalty is negative."""

    @property
    def low(self) -> float:
        """Four times the lesser of the two."""
        return 4 * min(self.present, self.absent)

    @property
    def high(self) -> float:
        """Four times the greater of the two."""
        return 4 * max(self.present, self.absent)

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""
        tags = self.tags
        counts = {tag: item.completion.count(tag) for tag in tags.in_order()}
        counts[tags.reasoning_start] += item.prompt.rstrip().endswith(tags.reasoning_start)
        once = sum(count == 1 for count in counts.values())
        return once * self.present + (4 - once) * self.absent
