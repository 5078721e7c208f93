"""The whole form, in order: reasoning between its tags, then an answer between its tags."""

from dataclasses import dataclass, field

from rewards.base import RewardInput, Tags


@dataclass(frozen=True)
class FormatExact:
    """1 where `reasoning_start ... reasoning_end ... solution_start x solution_end` stands anywhere, 0 otherwise.

    The answer holds at least one character. Where the prompt itself ends with the reasoning's start tag, as templates
    for reasoning models write it, the completion need not repeat it.
    """

    tags: Tags = field(default_factory=Tags)
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""
        tags = self.tags
        wanted = list(tags.in_order())
        if item.prompt.rstrip().endswith(tags.reasoning_start):
            wanted.remove(tags.reasoning_start)
        # The earliest place of each tag leaves most room for the next, so no other choice can match where this one
        # does not. A regular expression with three open ends would take time cubic in the text.
        place = 0
        for tag in wanted:
            found = item.completion.find(tag, place + (tag == tags.solution_end))
            if found < 0:
                return 0.0
            place = found + len(tag)
        return 1.0
