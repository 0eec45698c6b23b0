import time

import numpy as np
import pytest

from deltamux.router.decide.features import bounded_ids, distinct, pair_buckets

# Worked out with Python's integers; a change makes every stored router wrong.
GOLDEN_BUCKETS = [22162, 62150, 30097, 16620]


def test_pair_buckets_are_frozen_for_feature_version_1():
    ids = np.array([0, 1, 2, 49151, 7], dtype=np.int64)
    assert pair_buckets(ids).tolist() == GOLDEN_BUCKETS
    assert pair_buckets(ids, 16).tolist() == [bucket >> 12 for bucket in GOLDEN_BUCKETS]


def test_a_pair_and_its_reverse_differ():
    assert pair_buckets(np.array([3, 4])) != pair_buckets(np.array([4, 3]))


def test_pairs_spread_evenly_over_the_buckets():
    ids = np.random.default_rng(0).integers(0, 49_152, 65_537)
    counts = np.bincount(pair_buckets(ids, 256), minlength=256)
    # 256 expected in each, standard deviation 16.
    assert counts.min() > 256 - 6 * 16
    assert counts.max() < 256 + 6 * 16


@pytest.mark.parametrize("length", [0, 1])
def test_fewer_than_two_tokens_have_no_pair(length):
    assert pair_buckets(np.arange(length)).shape == (0,)


def test_repeating_a_prompt_adds_no_token_and_one_pair():
    once = np.array([5, 6, 7])
    tokens, pairs = distinct(np.tile(once, 20))
    assert tokens.tolist() == [5, 6, 7]
    assert len(pairs) == len(distinct(once)[1]) + 1


def test_a_short_conversation_is_kept_whole():
    assert bounded_ids([[1, 2], [], [3]], 10, 2, 2).tolist() == [1, 2, 3]


def test_a_long_conversation_keeps_both_ends():
    turns = [[1, 2, 3], [4], [5, 6], [7]]
    assert bounded_ids(turns, 10, 2, 3).tolist() == [1, 2, 5, 6, 7]


@pytest.mark.parametrize("alien", [-1, 10, 2**63, -(2**70), 2**70])
def test_ids_outside_the_vocabulary_are_dropped(alien):
    assert bounded_ids([[1, alien, 9]], 10).tolist() == [1, 9]


def test_a_huge_conversation_takes_bounded_time():
    turns = [[1] * 100_000] * 3 + [[2]] * 100_000
    # This thread's own time, so that what else runs on the machine does not count: milliseconds.
    start = time.thread_time()
    ids = bounded_ids(turns, 10)
    assert time.thread_time() - start < 1.0
    assert ids.tolist() == [1] * 512 + [2] * 512
