"""Signatures of a frame's pictures, as a cache stores them: an exact hash and block means.

The hash tells two pictures apart that differ in one bit. The means survive another decoder or a re-encoded video, which
move a block's mean by less than a level or two, and still tell frames of other episodes apart.
`geomcache.frames.signature` computes them.

Legend of shapes:  n frames   V views   G blocks a side
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

BLOCKS = 4  # G
TOLERANCE = 4
"""Largest distance of one picture by two decoders or two encodings, in levels of a block mean. Re-encoding LIBERO as
LeRobot does moves a mean by 2 at the most, and frames of two episodes differ by 7 at the least."""


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """Signatures of frames, all views of each."""

    hashes: NDArray[np.uint64]
    """[n, V] XXH3, 64 bit, seed 0, of the picture's RGB bytes, row by row."""
    means: NDArray[np.uint8]
    """[n, V, G, G, 3] mean of each block and channel, rounded half up."""

    @classmethod
    def empty(cls, frames: int, views: int) -> Self:
        """Return signatures of so many frames, not yet filled."""
        return cls(
            hashes=np.empty((frames, views), np.uint64), means=np.empty((frames, views, BLOCKS, BLOCKS, 3), np.uint8)
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, part: slice | NDArray[np.int64] | Sequence[int]) -> "Signatures":
        return Signatures(hashes=self.hashes[part], means=self.means[part])

    def __setitem__(self, part: slice | NDArray[np.int64], other: "Signatures") -> None:
        self.hashes[part], self.means[part] = other.hashes, other.means

    def equal(self, other: "Signatures") -> NDArray[np.bool_]:
        """Return for each frame whether all of its pictures are the same, bool [n]."""
        same: NDArray[np.bool_] = (self.hashes == other.hashes).all(axis=1)
        same &= (self.means == other.means).all(axis=(1, 2, 3, 4))
        return same

    def distances(self, other: "Signatures") -> NDArray[np.int64]:
        """Return for each picture the largest difference of a block's mean, in levels of 0 to 255, int64 [n, V]."""
        differences = np.abs(self.means.astype(np.int64) - other.means)
        largest: NDArray[np.int64] = differences.max(axis=(2, 3, 4), initial=0)
        return largest
