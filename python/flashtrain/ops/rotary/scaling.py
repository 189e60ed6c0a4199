"""Context extension of rotary embeddings: other frequencies for positions beyond those trained on.

Each class gives the angle per position of every pair and a factor of cosines and sines. `dim` is
the rotary dimension, `base` the base of the geometric series of frequencies.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


def frequencies(dim: int, base: float) -> Tensor:
    """base**(-2i / dim) for pairs i, float64 [dim / 2] (Su et al. 2021, section 3.3)."""
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def _check_at_least_1(name: str, value: float) -> None:
    if not value >= 1.0:
        raise ValueError(f"{name}: got {value}; supported: at least 1")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """No scaling, and the base class of the others.

    Args:
      factor: how many times longer the context becomes, at least 1.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_at_least_1("factor", self.factor)

    def frequencies(self, dim: int, base: float) -> Tensor:
        """Angle per position, float64 [dim / 2]."""
        return frequencies(dim, base)

    @property
    def table_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


class LinearScaling(RotaryScaling):
    """Positions are divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    def frequencies(self, dim: int, base: float) -> Tensor:
        return frequencies(dim, base) / self.factor


class NTKScaling(RotaryScaling):
    """ "NTK-aware": a larger base, so that the lowest frequency is divided by `factor` and the
    highest stays (Peng et al. 2023, arXiv:2309.00071, section 3.1)."""

    def frequencies(self, dim: int, base: float) -> Tensor:
        if dim == 2:
            return frequencies(dim, base)
        return frequencies(dim, base * self.factor ** (dim / (dim - 2)))


@dataclasses.dataclass(frozen=True)
class YarnScaling(RotaryScaling):
    """YaRN (arXiv:2309.00071, section 3.2 and 3.4): slow pairs are interpolated, fast ones are not.

    Args:
      factor: as above.
      original_max_position: the context length of pre-training.
      beta_fast, beta_slow: pairs with more turns in it than beta_fast keep their frequency, those
        with fewer than beta_slow have it divided by `factor`, with a ramp between.
      attention_factor: of cosines and sines; None: 0.1 ln(factor) + 1.
    """

    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_1("original_max_position", self.original_max_position)
        if not self.beta_fast > self.beta_slow > 0.0:
            raise ValueError(
                f"beta_fast: got {self.beta_fast}; supported: greater than beta_slow, "
                f"{self.beta_slow}, which must be positive"
            )

    def frequencies(self, dim: int, base: float) -> Tensor:
        def pair_of(turns: float) -> float:
            """The (fractional) pair that turns so often in the original context."""
            wavelength = self.original_max_position / (2 * math.pi * turns)
            return dim * math.log(wavelength) / (2 * math.log(base))

        low = max(math.floor(pair_of(self.beta_fast)), 0)
        high = min(math.ceil(pair_of(self.beta_slow)), dim - 1)
        pairs = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
        interpolated = ((pairs - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
        plain = frequencies(dim, base)
        return plain / self.factor * interpolated + plain * (1.0 - interpolated)

    @property
    def table_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's rule (arXiv:2407.21783; Meta's reference code for it).

    Args:
      factor: as above.
      original_max_position: the context length of pre-training.
      low_freq_factor, high_freq_factor: wavelengths longer than original_max_position /
        low_freq_factor are multiplied by `factor`, those shorter than original_max_position /
        high_freq_factor stay, and frequencies between are interpolated.
    """

    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least_1("original_max_position", self.original_max_position)
        if not self.high_freq_factor > self.low_freq_factor > 0.0:
            raise ValueError(
                f"high_freq_factor: got {self.high_freq_factor}; supported: greater than "
                f"low_freq_factor, {self.low_freq_factor}, which must be positive"
            )

    def frequencies(self, dim: int, base: float) -> Tensor:
        plain = frequencies(dim, base)
        turns = self.original_max_position * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0.0, 1.0)
        return plain * kept + plain / self.factor * (1.0 - kept)
