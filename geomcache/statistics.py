"""Mean and standard deviation of each channel, in a form that merges: ranks and resumed runs give the same numbers.

The values are those of the cache (rounded to float16), converted to float64; of a confidence the natural logarithm is
taken, as the adapter does. Merging follows Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979). Merged in the order of the shards, the result is the same to the bit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import CacheFormatError
from geomcache.geometry import FLOAT16_MAX, OUTPUTS

_MAX_COUNT = 1 << 80  # 2^40 frames of 9999 x 9999 cells have fewer values; floats hold sums of squares of so many


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of each channel of one output."""

    count: int
    """Number of values per channel."""
    mean: tuple[float, ...]
    """Mean of each channel."""
    m2: tuple[float, ...]
    """Sum of squared deviations from the mean, of each channel."""
    saturated: int
    """Number of values at float16's limit in all channels together: larger ones were cut to it."""

    @property
    def std(self) -> tuple[float, ...]:
        """Return the population standard deviation of each channel."""
        return tuple(float(np.sqrt(m2 / self.count)) for m2 in self.m2)

    @classmethod
    def of(cls, output: str, values: NDArray[np.float16]) -> Self:
        """Measure maps of one output, not empty: float16 [..., h, w, 6] for ``ray``, [..., h, w] for the others."""
        channels = len(OUTPUTS[output].channels)
        saturated = int(np.count_nonzero(np.abs(values) >= FLOAT16_MAX))
        flat: NDArray[np.float64] = values.reshape(-1, channels).astype(np.float64)
        if OUTPUTS[output].log:
            flat = np.log(flat)
        mean = flat.mean(axis=0)
        m2 = np.square(flat - mean).sum(axis=0)
        return cls(count=len(flat), mean=tuple(mean.tolist()), m2=tuple(m2.tolist()), saturated=saturated)

    def merge(self, other: Self) -> Self:
        """Return the moments of both together."""
        count = self.count + other.count
        delta = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        mean = tuple(a + d * other.count / count for a, d in zip(self.mean, delta, strict=True))
        weight = self.count * other.count / count
        m2 = tuple(a + b + d * d * weight for a, b, d in zip(self.m2, other.m2, delta, strict=True))
        return type(self)(count=count, mean=mean, m2=m2, saturated=self.saturated + other.saturated)

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Return the moments of all parts, at least one, merged in their order."""
        iterator = iter(parts)
        total = next(iterator)
        for part in iterator:
            total = total.merge(part)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the moments as JSON types, from which floats come back exactly."""
        return {"count": self.count, "mean": list(self.mean), "m2": list(self.m2), "saturated": self.saturated}

    @classmethod
    def from_dict(cls, data: Any, output: str) -> Self:
        """Build moments from what `to_dict` returned, or from JSON types of unknown origin.

        Raises:
            CacheFormatError: the data is malformed, of other channels than the output's, or of no possible values.
        """
        channels = len(OUTPUTS[output].channels)
        if (
            not isinstance(data, Mapping)
            or set(data) != {"count", "mean", "m2", "saturated"}
            or not _are_numbers([data["count"]], int, 1, _MAX_COUNT)
            or not _are_numbers([data["saturated"]], int, 0, channels * data["count"])
            or not _are_numbers(data["mean"], int | float, -FLOAT16_MAX, FLOAT16_MAX, channels)
            or not _are_numbers(data["m2"], int | float, 0, data["count"] * (2 * FLOAT16_MAX) ** 2, channels)
        ):
            raise CacheFormatError(
                f"statistics of {output}: expected count, mean, m2 and saturated of {channels} channels of float16"
                f" numbers, got {data!r:.120}"
            )
        return cls(
            count=data["count"],
            mean=tuple(map(float, data["mean"])),
            m2=tuple(map(float, data["m2"])),
            saturated=data["saturated"],
        )


def _are_numbers(values: Any, kind: Any, low: float, high: float, count: int = 1) -> bool:
    """Return whether a list has `count` numbers of this type from `low` to `high`; NaN and bool are none."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, kind) and type(value) is not bool and low <= value <= high for value in values)
    )
