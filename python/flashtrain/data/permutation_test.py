"""The keyed permutation is one, for every size, and looks like a shuffle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data.permutation import Permutation


@pytest.mark.parametrize(
    "sizes", [range(1, 300), [1000, 1023, 1024, 1025, 4095, 4096, 4097, 65_537, 300_000]]
)
def test_is_a_bijection(sizes):
    for size in sizes:
        images = Permutation(size, seed=size * 7919, stream=size % 3)(np.arange(size))
        assert images.dtype == np.int64
        assert np.array_equal(np.sort(images), np.arange(size)), size


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**64 - 1))
def test_is_a_bijection_for_every_key(size, seed, stream):
    images = Permutation(size, seed, stream)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_large_domains_stay_inside_and_do_not_collide():
    for size in (2**32 + 1, 374_337_375_694 // 2048, 2**62):
        indices = np.unique(np.random.default_rng(0).integers(0, size, 100_000))
        images = Permutation(size, seed=1)(indices)
        assert images.min() >= 0
        assert images.max() < size
        assert len(np.unique(images)) == len(indices)


def test_an_image_does_not_depend_on_its_neighbours():
    permutation = Permutation(1000, seed=3)
    whole = permutation(np.arange(1000))
    assert permutation(np.array([417]))[0] == whole[417]
    assert np.array_equal(permutation(np.arange(1000)[::-1]), whole[::-1])


def test_values_are_fixed_for_ever():
    """Resuming an old run needs the order it began with."""
    images = Permutation(10, seed=1111, stream=0)(np.arange(10))
    assert images.tolist() == [6, 2, 7, 1, 5, 9, 4, 0, 8, 3]


def test_each_seed_and_stream_is_another_permutation():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 0)]
    images = {Permutation(100, seed, stream)(np.arange(100)).tobytes() for seed, stream in keys}
    assert len(images) == len(keys)


def test_images_are_spread_and_uncorrelated():
    size = 100_000
    images = Permutation(size, seed=5)(np.arange(size))
    # Standard errors of a random shuffle: 1/sqrt(n) for correlations, sqrt(n p (1-p)) for counts.
    for lag in (1, 2, 64):
        correlation = np.corrcoef(images[:-lag], images[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 5 / np.sqrt(size)
    tenths = np.bincount(images[: size // 2] * 10 // size, minlength=10)
    assert np.abs(tenths - 5000).max() < 5 * np.sqrt(5000 * 0.5)


def test_unusable_sizes_are_refused():
    for size in (0, -1, 2**62 + 1):
        with pytest.raises(ValueError, match="size="):
            Permutation(size, seed=0)
