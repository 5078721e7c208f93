"""Finding the token at which a completion's text first holds a stop string."""

from collections.abc import Callable, Sequence

PARTIAL = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class StopText:
    """Decodes a completion token by token, at a cost that does not grow with its length.

    Each token is decoded with the few before it, as spaces and bytes depend on neighbours, and of the text only what a
    stop string could still begin in is kept.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str]) -> None:
        self._decode, self._stop_strings = decode, stop_strings
        self._longest = max(map(len, stop_strings))
        self._settled: list[int] = []
        self._pending: list[int] = []
        self._text = ""

    def push(self, token: int) -> bool:
        """Takes the next token; true when a stop string is in the text up to it."""
        self._pending.append(token)
        before = self._decode(self._settled)
        after = self._decode([*self._settled, *self._pending])
        text = self._text + after[len(before) :]
        if any(stop in text.rstrip(PARTIAL) for stop in self._stop_strings):
            return True
        if len(after) > len(before) and not after.endswith(PARTIAL):
            self._settled, self._pending = self._pending, []
            self._text = text[-self._longest :]
        return False
