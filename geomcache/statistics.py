"""Mean and standard deviation of each channel, in a form that merges: ranks and resumed runs give the same numbers.

Values are those of the cache (rounded to float16), taken as float64; confidences are taken as their natural logarithm,
as the adapter sees them. Merging follows Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979); merged in the order of the shards, the result is the same to the bit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import CacheFormatError
from geomcache.geometry import FLOAT16_MAX, OUTPUTS


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of the channels of one output."""

    count: int
    """Values a channel."""
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    saturated: int
    """Values at float16's limit, of all channels: larger ones were cut to it."""

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation of each channel."""
        return tuple(float(np.sqrt(m2 / self.count)) for m2 in self.m2)

    @classmethod
    def of(cls, output: str, values: NDArray[np.float16]) -> Self:
        """Of maps of one output, float16, [..., h, w, 6] for ``ray`` and [..., h, w] for the others. Not empty."""
        channels = len(OUTPUTS[output].channels)
        saturated = int(np.count_nonzero(np.abs(values) >= FLOAT16_MAX))
        flat: NDArray[np.float64] = values.reshape(-1, channels).astype(np.float64)
        if OUTPUTS[output].log:
            flat = np.log(flat)
        mean = flat.mean(axis=0)
        m2 = np.square(flat - mean).sum(axis=0)
        return cls(count=len(flat), mean=tuple(mean.tolist()), m2=tuple(m2.tolist()), saturated=saturated)

    def merge(self, other: Self) -> Self:
        """Of both together."""
        count = self.count + other.count
        delta = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        mean = tuple(a + d * other.count / count for a, d in zip(self.mean, delta, strict=True))
        weight = self.count * other.count / count
        m2 = tuple(a + b + d * d * weight for a, b, d in zip(self.m2, other.m2, delta, strict=True))
        return type(self)(count=count, mean=mean, m2=m2, saturated=self.saturated + other.saturated)

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Of all parts, in their order. At least one."""
        iterator = iter(parts)
        total = next(iterator)
        for part in iterator:
            total = total.merge(part)
        return total

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; floats survive exactly."""
        return {"count": self.count, "mean": list(self.mean), "m2": list(self.m2), "saturated": self.saturated}

    @classmethod
    def from_dict(cls, data: Any, output: str) -> Self:
        """Back from `to_dict`.

        Raises:
            CacheFormatError: malformed, or not of this output's channels.
        """
        channels = len(OUTPUTS[output].channels)
        fits = (
            isinstance(data, Mapping)
            and set(data) == {"count", "mean", "m2", "saturated"}
            and all(type(data[name]) is int and data[name] >= 0 for name in ("count", "saturated"))
            and data["count"] >= 1
            and all(
                isinstance(data[name], list)
                and len(data[name]) == channels
                and all(isinstance(value, int | float) and np.isfinite(value) for value in data[name])
                for name in ("mean", "m2")
            )
        )
        if not fits:
            raise CacheFormatError(
                f"statistics of {output}: expected count, mean and m2 of {channels} channels, got {data!r:.120}"
            )
        return cls(
            count=data["count"],
            mean=tuple(map(float, data["mean"])),
            m2=tuple(map(float, data["m2"])),
            saturated=data["saturated"],
        )
