import itertools
import time
from collections import Counter

import grain
import numpy as np
import pytest

from pretrain.data.shuffle import SMALL, shuffled


def epochs(size: int, seed: int, count: int) -> list[list[int]]:
    dataset = shuffled(grain.MapDataset.range(size), seed).repeat(count)
    return [[dataset[epoch * size + place] for place in range(size)] for epoch in range(count)]


@pytest.mark.parametrize("size", [1, 2, 97])
def test_every_epoch_is_a_permutation_of_all(size):
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs(size, 0, 4))


@pytest.mark.parametrize("size", [SMALL + 1, SMALL + 2])
def test_large_sets_are_permuted_too(size):
    dataset = shuffled(grain.MapDataset.range(size), 0).repeat(2)
    seen = np.zeros(size, int)
    for place in range(size):
        seen[dataset[size + place]] += 1
    assert (seen == 1).all()
    assert [dataset[place] for place in range(20)] != [dataset[size + place] for place in range(20)]


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(order) for seed in (0, 1) for order in epochs(97, seed, 3)]
    assert len(set(orders)) == 6
    assert epochs(97, 0, 3) == epochs(97, 0, 3)


def test_all_orders_are_equally_likely():
    counts = Counter(tuple(order) for order in epochs(3, 0, 6000))
    assert set(counts) == set(itertools.permutations(range(3)))
    # 6000 draws of 6 orders: 1000 each, with a standard deviation of 29.
    assert max(abs(count - 1000) for count in counts.values()) < 145


def test_slices_take_turns_in_the_order():
    dataset = shuffled(grain.MapDataset.range(7), 0).repeat(None)
    turns = [dataset[host::2] for host in range(2)]
    assert [turns[place % 2][place // 2] for place in range(14)] == [dataset[place] for place in range(14)]


def test_few_documents_are_found_fast():
    dataset = shuffled(grain.MapDataset.range(3), 0).repeat(None)
    start = time.process_time()
    for place in range(300):
        dataset[place]
    # Processor time, since a machine may have others to serve. grain's own order takes 10 ms a place here, 3 s in all;
    # this takes about 10 ms.
    assert time.process_time() - start < 1.0
