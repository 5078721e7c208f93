"""Stop strings are found at the token that completes them, with tokens that are pieces of words and of characters."""

from collections.abc import Sequence

import pytest

from models.inference.stop_text import StopText

WORDS = ["the", " end", "en", "d", "\n", "###", "#", "", " of", "é"]


def decode_words(ids: Sequence[int]) -> str:
    return "".join(WORDS[index] for index in ids)


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


def first_stop(decode, ids, stop_strings):
    """The number of tokens after which `StopText` stops, or None."""
    watcher = StopText(decode, stop_strings)
    for count, token in enumerate(ids, 1):
        if watcher.push(token):
            return count
    return None


def first_stop_by_decoding_all(decode, ids, stop_strings):
    for count in range(1, len(ids) + 1):
        if any(stop in decode(ids[:count]) for stop in stop_strings):
            return count
    return None


def test_it_stops_at_the_token_that_completes_a_stop_string():
    assert first_stop(decode_words, [0, 2, 3, 4], ["end"]) == 3
    assert first_stop(decode_words, [0, 6, 7, 6, 6, 0], ["###", "zebra"]) == 5
    assert first_stop(decode_words, [0, 1, 8], ["ending"]) is None


def test_a_stop_string_may_hold_characters_of_several_bytes():
    ids = list("naïve café".encode())
    assert first_stop(decode_bytes, ids, ["ï"]) == 4
    assert first_stop(decode_bytes, ids, ["fé"]) == len(ids)


@pytest.mark.parametrize("stop_strings", [["end"], ["##", "of the"], ["\n\n"], ["é", "dé"]])
def test_it_agrees_with_decoding_the_whole_text_after_every_token(rng, stop_strings):
    for _ in range(50):
        ids = rng.integers(0, len(WORDS), 40).tolist()
        assert first_stop(decode_words, ids, stop_strings) == first_stop_by_decoding_all(
            decode_words, ids, stop_strings
        )


def test_it_decodes_few_tokens_at_a_time_however_long_the_text_is():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_words(ids)

    assert first_stop(decode, [0, 8] * 500, ["never"]) is None
    assert longest <= 4
