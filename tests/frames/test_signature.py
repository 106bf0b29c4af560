"""Signatures of pictures, against numbers by other means."""

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from geomcache.frames.signature import hash_pictures, mean_blocks, sign_pictures


def pictures(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def test_the_hash_is_xxh3_of_the_bytes_row_by_row() -> None:
    images = pictures(3, 5, 7, 3)
    expected = [xxhash.xxh3_64(bytes(image.tobytes())).intdigest() for image in images]
    assert hash_pictures(images).tolist() == expected
    assert hash_pictures(images[:, ::-1].copy()[:, ::-1]).tolist() == expected  # however it lies in memory
    assert xxhash.xxh3_64(b"").intdigest() == 0x2D06800538D394C2  # the value that XXH3's specification gives


def test_one_bit_changes_the_hash() -> None:
    images = np.repeat(pictures(1, 4, 4, 3), 2, axis=0)
    images[1, 3, 3, 2] ^= 1
    first, second = hash_pictures(images)
    assert first != second


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 7), (64, 48), (2, 9), (1, 1), (1100, 5)])
def test_means_of_blocks_round_half_up(height: int, width: int) -> None:
    images = pictures(2, height, width, 3, seed=height)
    images[0] = 255  # the largest sums
    means = mean_blocks(images)
    assert means.dtype == np.uint8
    for i in range(4):
        for j in range(4):
            y, x = i * height // 4, j * width // 4
            block = images[:, y : max(y + 1, (i + 1) * height // 4), x : max(x + 1, (j + 1) * width // 4)].astype(float)
            np.testing.assert_array_equal(means[:, i, j], np.floor(block.mean(axis=(1, 2)) + 0.5))


def test_views_of_different_sizes_are_signed_together() -> None:
    views = [pictures(3, 8, 8, 3), pictures(3, 6, 10, 3, seed=1)]
    signatures = sign_pictures(views)
    assert (signatures.hashes.shape, signatures.means.shape) == ((3, 2), (3, 2, 4, 4, 3))
    other = sign_pictures([views[0], np.where(views[1] > 250, 255, views[1] + 5).astype(np.uint8)])
    assert signatures.equal(signatures).all()
    assert not signatures.equal(other).any()
    distances = signatures.distances(other)
    assert (distances[:, 0] == 0).all()
    assert ((distances[:, 1] > 0) & (distances[:, 1] <= 5)).all()
