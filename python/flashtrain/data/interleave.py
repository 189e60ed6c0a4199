"""Mixes several sources by weight; the source of each sample is computed on the fly."""

import math
from collections.abc import Sequence

import numpy as np

from flashtrain.data.permutation import Permutation

# Samples in which each source has its exact share; weights are rounded to 1/4096.
PERIOD = 4096

# Epochs are the other streams of a seed's permutations; no run has 2**32 of them.
_FIRST_STREAM = 2**32


class Interleave:
    """A pure function from a sample's number to its source and its number within that source.

    Every `PERIOD` samples hold the same number of samples of each source, shuffled again.

    Args:
        weights: positive; their ratios count.
        seed: as of the data's shuffle.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights={list(weights)} must be positive numbers")
        exact = np.array(weights) / np.sum(weights) * PERIOD
        counts = np.floor(exact).astype(np.int64)
        # The samples that rounding down leaves go to the largest remainders.
        by_remainder = np.argsort(counts - exact, kind="stable")
        counts[by_remainder[: PERIOD - counts.sum()]] += 1
        if not counts.all():
            raise ValueError(f"weights={list(weights)}: each must be at least 1/{PERIOD} of all")
        self._counts = counts
        self._firsts = np.cumsum(counts) - counts
        self._seed = seed

    @property
    def shares(self) -> list[int]:
        """Of each source, its samples in a period."""
        return self._counts.tolist()

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources and numbers within them, int64, of sample numbers from 0 on."""
        periods, positions = np.divmod(np.asarray(samples, np.int64), PERIOD)
        places = np.empty_like(positions)
        for period in np.unique(periods):
            permutation = Permutation(PERIOD, self._seed, stream=_FIRST_STREAM + int(period))
            places[periods == period] = permutation(positions[periods == period])
        sources = np.searchsorted(self._firsts, places, side="right") - 1
        return sources, periods * self._counts[sources] + places - self._firsts[sources]
