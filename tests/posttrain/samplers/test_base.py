"""What every engine refuses, and the seeds of completions."""

from dataclasses import replace

import numpy as np
import pytest

from posttrain.samplers.base import Prompt, Sampling, check_prompts, check_sampling, check_sequences, sample_seed

PLAIN = Sampling(max_tokens=4, temperature=1.0)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ((), "prompt 7: is empty: .*BOS"),
        (tuple(range(7)), "prompt 7: 7 tokens with up to 4 sampled ones: the sampler holds 10"),
        ((1, 20), "prompt 7: token id 20: the vocabulary has ids 0 to 19"),
        ((1, -1), "prompt 7: token id -1"),
    ],
)
def test_a_prompt_that_no_engine_can_complete_is_refused_by_its_number(token_ids, message):
    good = Prompt((0, 19), 3)
    check_prompts([good], PLAIN, vocab_size=20, max_length=10)
    with pytest.raises(ValueError, match=message):
        check_prompts([good, Prompt(token_ids, 7)], PLAIN, vocab_size=20, max_length=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "sampling.max_tokens=0"),
        ({"temperature": -0.1}, "sampling.temperature=-0.1"),
        ({"temperature": float("nan")}, "sampling.temperature=nan"),
        ({"temperature": float("inf")}, "sampling.temperature=inf"),
        ({"top_k": 0}, "sampling.top_k=0"),
        ({"top_p": 0.0}, "sampling.top_p=0.0"),
        ({"top_p": 1.5}, "sampling.top_p=1.5"),
        ({"num_samples": 0}, "sampling.num_samples=0"),
        ({"stop_strings": ("a", "")}, "sampling.stop_strings"),
        ({"stop_ids": (20,)}, "sampling.stop_ids: token id 20"),
    ],
)
def test_settings_that_describe_no_distribution_or_end_are_refused(changes, message):
    check_sampling(replace(PLAIN, temperature=0.0, top_k=1, top_p=0.1, stop_ids=(19,)), vocab_size=20)
    with pytest.raises(ValueError, match=message):
        check_sampling(replace(PLAIN, **changes), vocab_size=20)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [([], "sequence 1: 0 tokens"), ([1] * 11, "sequence 1: 11 tokens"), ([3, 20], "sequence 1: token id 20")],
)
def test_a_sequence_that_cannot_be_scored_is_refused_by_its_index(sequence, message):
    check_sequences([[1], np.array([19] * 10)], vocab_size=20, max_length=10)
    with pytest.raises(ValueError, match=message):
        check_sequences([[1], sequence], vocab_size=20, max_length=10)


def test_seeds_are_fixed_numbers_and_differ_in_every_part():
    """The first is blake2b("0/0/0/0", 4 bytes) without its highest bit: a resumed run must draw what it would have."""
    import hashlib

    digest = hashlib.blake2b(b"0/0/0/0", digest_size=4).digest()
    assert sample_seed(0, 0, 0, 0) == int.from_bytes(digest, "big") % 2**31
    parts = [
        (seed, step, prompt, sample)
        for seed in range(4)
        for step in range(4)
        for prompt in range(8)
        for sample in range(8)
    ]
    assert len({sample_seed(*each) for each in parts}) == len(parts)
    assert sample_seed(0, 1, 12, 3) != sample_seed(0, 11, 2, 3)
    assert all(0 <= sample_seed(*each) < 2**31 for each in parts)
