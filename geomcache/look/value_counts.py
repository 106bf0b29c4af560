"""How often each float16 value occurs: exact histograms and percentiles of any number of values, in one pass.

float16 has 63,488 finite values. Counting each takes half a megabyte a channel, however many frames are counted, and no
range has to be known in advance.
"""

from collections.abc import Iterable
from typing import Self

import numpy as np
from numpy.typing import NDArray

CLIP = (1.0, 99.0)  # percentiles that colours span

# Bit patterns of the finite values, ascending by value: the negative ones count down, from -65504 to -0.
_PATTERNS = np.concatenate((np.arange(0xFBFF, 0x7FFF, -1), np.arange(0x0000, 0x7C00))).astype(np.uint16)
_VALUES: NDArray[np.float64] = _PATTERNS.view(np.float16).astype(np.float64)


class ValueCounts:
    """Counts of one channel's values.

    Attributes:
        total: number of values counted.
    """

    def __init__(self) -> None:
        self.total = 0
        self._by_pattern = np.zeros(1 << 16, dtype=np.int64)

    def add(self, values: NDArray[np.float16]) -> None:
        """Count values of any shape. A cache never holds NaN or infinity."""
        flat = np.ascontiguousarray(values).reshape(-1)
        self._by_pattern += np.bincount(flat.view(np.uint16), minlength=1 << 16)
        self.total += flat.size

    def percentile(self, percent: float) -> float:
        """Return the smallest value with at least `percent` of the values at or below it. Needs at least one value."""
        sums = np.cumsum(self._by_pattern[_PATTERNS])
        rank = max(1, int(np.ceil(percent / 100.0 * self.total)))
        return float(_VALUES[np.searchsorted(sums, rank)])

    def limits(self) -> NDArray[np.float64]:
        """Return the range that colours span, [2]. Needs at least one value."""
        return np.array([self.percentile(percent) for percent in CLIP])

    def histogram(self, edges: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the counts between ascending edges; the last bin includes its upper edge, as in NumPy."""
        counts, _ = np.histogram(_VALUES, bins=edges, weights=self._by_pattern[_PATTERNS].astype(np.float64))
        return counts.astype(np.int64)

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Return the counts of all parts together."""
        counts = cls()
        for part in parts:
            counts.total += part.total
            counts._by_pattern += part._by_pattern
        return counts
