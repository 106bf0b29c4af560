"""Compute the signatures of a frame's pictures: an exact hash and block means.

Legend of shapes:  n frames   V views   H, W pixels   G blocks a side
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from geomcache.cache.signatures import BLOCKS, Signatures


def sign_pictures(images: Sequence[NDArray[np.uint8]]) -> Signatures:
    """Return the signatures of decoded pictures.

    Args:
        images: for each view uint8 [n, H, W, 3], RGB. Views may differ in size.
    """
    return Signatures(
        hashes=np.stack([hash_pictures(view) for view in images], axis=1),
        means=np.stack([mean_blocks(view) for view in images], axis=1),
    )


def hash_pictures(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return XXH3 (64 bit, seed 0) of each picture [n, H, W, 3], as uint64 [n]."""
    return np.array([xxhash.xxh3_64_intdigest(np.ascontiguousarray(image)) for image in images], dtype=np.uint64)


def mean_blocks(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean of each of GxG blocks of pictures [n, H, W, 3], rounded half up, as uint8 [n, G, G, 3].

    Block i of a side of H pixels has the pixels from floor(i H / G) on, before floor((i + 1) H / G). A side shorter
    than G pixels repeats them: a block has at least one.
    """
    _, height, width, _ = images.shape
    rows, columns = _edges(height), _edges(width)
    narrow = np.uint16 if max(b - a for a, b in rows) * 255 < 1 << 16 else np.uint32  # a third faster
    bands = np.stack([images[:, a:b].sum(axis=1, dtype=narrow) for a, b in rows], axis=1)  # [n, G, W, 3]
    sums = np.stack([bands[:, :, a:b].sum(axis=2, dtype=np.uint32) for a, b in columns], axis=2)  # [n, G, G, 3]
    counts = np.multiply.outer([b - a for a, b in rows], [b - a for a, b in columns])[:, :, None]
    means: NDArray[np.uint8] = ((2 * sums + counts) // (2 * counts)).astype(np.uint8)
    return means


def _edges(side: int) -> list[tuple[int, int]]:
    starts = [block * side // BLOCKS for block in range(BLOCKS)]
    return [(start, max(start + 1, (block + 1) * side // BLOCKS)) for block, start in enumerate(starts)]
