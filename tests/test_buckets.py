"""Batches of one shape: their order, and what stands in for clips that cannot be used."""

import itertools

import numpy as np
import pytest

from wanjax.data.buckets import Groups, Order, Usable, group
from wanjax.data.clip import Clip, UnusableClip
from wanjax.errors import InputError

BUCKETS = {
    (5, 16, 16): np.array([0, 1, 2, 3, 4, 5, 6]),
    (9, 16, 16): np.array([10, 11]),
    (9, 32, 16): np.array([20, 21, 22, 23]),
}
OF = {int(i): shape for shape, members in BUCKETS.items() for i in members}


def test_batches_are_of_one_shape_and_all_clips_appear():
    order = Order(BUCKETS, size=4, seed=3)
    assert (order.passes, order.batches) == (2, 4 + 1 + 2)  # two passes over 7, 2 and 4 clips, four at a time
    epochs = []
    for epoch in range(6):
        batches = [[order[4 * b + k] for k in range(4)] for b in range(7 * epoch, 7 * epoch + 7)]
        for b, batch in enumerate(batches):
            assert {OF[i] for i in batch} == {order.shape(7 * epoch + b)}
        assert {i for batch in batches for i in batch} == {*OF}
        epochs.append(batches)
    assert len({str(batches) for batches in epochs}) == 6  # shuffled anew
    counts = np.bincount([i for batches in epochs for batch in batches for i in batch])
    assert counts[:7].max() - counts[:7].min() <= 1  # 96 places for 7 clips
    assert set(counts[10:12]) == {12}
    assert set(counts[20:24]) == {12}


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("sizes", [(71, 3), (200, 1), (40, 30, 4), (3,)])
def test_small_buckets_come_no_more_often_than_others(size, sizes):
    ends = np.cumsum((0, *sizes))
    buckets = {(5 + 4 * i, 16, 16): np.arange(*ends[i : i + 2]) for i in range(len(sizes))}
    order = Order(buckets, size)
    counts = np.bincount([order[k] for k in range(order.batches * size)], minlength=ends[-1]) / order.passes
    assert counts.min() > 0.5  # every clip in every epoch
    means = [counts[a:b].mean() for a, b in itertools.pairwise(ends)]
    assert max(means) / min(means) < 1.35


def test_repeats():
    repeats = np.ones(24, int)
    repeats[[1, 20, 21, 22, 23]] = 3
    order = Order(BUCKETS, 1, seed=3, repeats=repeats)
    assert (order.passes, order.batches) == (1, 9 + 2 + 12)
    assert sorted(order[k] for k in range(23)) == sorted(np.repeat([*OF], repeats[[*OF]]))
    assert [order.times(k) for k in range(23)] == [0] * 23
    assert order.times(23) == 1


def test_order_is_random_access_and_repeatable():
    order, again, other = Order(BUCKETS, 4, seed=3), Order(BUCKETS, 4, seed=3), Order(BUCKETS, 4, seed=4)
    forwards = [order[k] for k in range(64)]
    assert forwards == [again[k] for k in reversed(range(64))][::-1]
    assert forwards != [other[k] for k in range(64)]


def test_groups_of_any_clips():
    assert group(Broken(3, set())) == Groups({(5, 16, 16): pytest.approx(np.arange(3))}, {})


def test_replacement_is_a_function_of_the_index():
    clips = Broken(20, {3, 4, 5, 19})
    buckets = {(5, 16, 16): np.array([1, 3, 5, 19]), (9, 16, 16): np.array([0, 2, 4])}
    forwards = {i: Usable(clips, buckets)[i].name for i in [1, 3, 5, 19, 0, 2, 4]}
    usable = Usable(clips, buckets)
    backwards = {i: usable[i].name for i in [4, 2, 0, 19, 5, 3, 1]}
    assert forwards == backwards == {1: "1", 3: "1", 5: "1", 19: "1", 0: "0", 2: "2", 4: "0"}
    with pytest.raises(InputError, match=r"none of 2 clips of shape"):
        Usable(clips, {(5, 16, 16): np.array([3, 4])})[3]


class Broken:
    """Clips of which some are unusable."""

    def __init__(self, count, bad):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def shape(self, index):
        return 5, 16, 16

    def __getitem__(self, index):
        if index in self.bad:
            raise UnusableClip(str(index), "bad")
        return Clip(np.zeros((5, 16, 16, 3), np.uint8), "", str(index))


def test_a_pass_that_no_memory_holds_is_refused():
    with pytest.raises(InputError, match=r"a pass of 1,000,000,001 clips, .*; up to 33,554,432 are accepted"):
        Order({(5, 16, 16): np.arange(2)}, 1, repeats=np.array([10**9, 1]))
