"""What a frame's pictures look like, in a few bytes: an exact hash and block means.

The hash tells two pictures apart that differ in one bit. The means survive another decoder or a re-encoded video, which
move a block's mean by less than a level or two, and still tell frames of other episodes apart.

Legend of shapes:  n frames   V views   H, W pixels   G blocks a side
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

BLOCKS = 4  # G
TOLERANCE = 4
"""Largest distance of one picture by two decoders or two encodings, in levels of a block mean. LeRobot's own re-encoding of
LIBERO moves a mean by 2 at the most, and frames of two episodes differ by 7 at the least (docs/cache-format.md)."""


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """Signatures of frames, all views of each."""

    hashes: NDArray[np.uint64]
    """[n, V] XXH3, 64 bit, seed 0, of the picture's RGB bytes, row by row."""
    means: NDArray[np.uint8]
    """[n, V, G, G, 3] mean of each block and channel, rounded half up."""

    @classmethod
    def of(cls, images: Sequence[NDArray[np.uint8]]) -> Self:
        """Return the signatures of decoded pictures.

        Args:
            images: for each view [n, H, W, 3], RGB. Views may differ in size.
        """
        return cls(
            hashes=np.stack([hash_pictures(view) for view in images], axis=1),
            means=np.stack([mean_blocks(view) for view in images], axis=1),
        )

    def __len__(self) -> int:
        return len(self.hashes)

    def equal(self, other: "Signatures") -> NDArray[np.bool_]:
        """Return for each frame whether all of its pictures are the same, [n]."""
        same: NDArray[np.bool_] = (self.hashes == other.hashes).all(axis=1)
        return same & (self.means == other.means).all(axis=(1, 2, 3, 4))

    def distance(self, other: "Signatures") -> NDArray[np.int64]:
        """Return for each frame the largest difference of a block's mean, in levels of 0 to 255, [n]."""
        differences = np.abs(self.means.astype(np.int64) - other.means)
        largest: NDArray[np.int64] = differences.max(axis=(1, 2, 3, 4), initial=0)
        return largest


def hash_pictures(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return XXH3 (64 bit, seed 0) of each picture [n, H, W, 3], as [n]."""
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(image)) for image in images], dtype=np.uint64)


def mean_blocks(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean of each of GxG blocks of pictures [n, H, W, 3], rounded half up, as [n, G, G, 3].

    Block i of a side of H pixels has the pixels from floor(i H / G) on, before floor((i + 1) H / G); a side shorter than
    G pixels repeats them: a block has at least one.
    """
    _, height, width, _ = images.shape
    rows, columns = _edges(height), _edges(width)
    bands = np.stack([images[:, a:b].sum(axis=1, dtype=np.uint32) for a, b in rows], axis=1)  # [n, G, W, 3]
    sums = np.stack([bands[:, :, a:b].sum(axis=2) for a, b in columns], axis=2)  # [n, G, G, 3]
    counts = np.multiply.outer([b - a for a, b in rows], [b - a for a, b in columns])[:, :, None]
    return ((2 * sums + counts) // (2 * counts)).astype(np.uint8)


def _edges(side: int) -> list[tuple[int, int]]:
    starts = [block * side // BLOCKS for block in range(BLOCKS)]
    return [(start, max(start + 1, (block + 1) * side // BLOCKS)) for block, start in enumerate(starts)]
