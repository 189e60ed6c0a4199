"""A mixture reads every sample of every source once, in exact shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.data.interleave import PERIOD, Interleave


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), seed=st.integers(0, 2**64 - 1)
)
def test_shares_are_exact_and_no_sample_is_read_twice(weights, seed):
    periods = 3
    sources, numbers = Interleave(weights, seed)(np.arange(periods * PERIOD))
    share = np.array(weights) / sum(weights)
    for source in range(len(weights)):
        of_source = numbers[sources == source]
        assert np.array_equal(np.sort(of_source), np.arange(len(of_source)))
        assert len(of_source) % periods == 0
        assert abs(len(of_source) / periods - share[source] * PERIOD) < 1


def test_a_sample_does_not_depend_on_its_neighbours():
    interleave = Interleave([0.7, 0.3], seed=1)
    sources, numbers = interleave(np.arange(10_000))
    for sample in (0, PERIOD - 1, PERIOD, 9_999):
        source, number = interleave(np.array([sample]))
        assert (source[0], number[0]) == (sources[sample], numbers[sample])


def test_sources_alternate_at_random():
    sources, _ = Interleave([1, 1], seed=1)(np.arange(4 * PERIOD))
    assert not np.array_equal(sources[:PERIOD], sources[PERIOD : 2 * PERIOD])
    # Runs of a fair coin: half of the neighbours differ, with a standard error of sqrt(n) / 2.
    changes = np.count_nonzero(np.diff(sources))
    assert abs(changes - 2 * PERIOD) < 5 * np.sqrt(4 * PERIOD) / 2


def test_weights_too_small_are_refused():
    with pytest.raises(ValueError, match=r"each must be at least 1/4096 of all"):
        Interleave([1.0, 1e-5], seed=0)
