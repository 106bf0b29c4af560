"""The maps of a shard, put together batch after batch: what every engine of stage one makes of a claim."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.signatures import Signatures
from geomcache.cache.writer import Claim, ShardMaps
from geomcache.ranges import count_rows

BatchMaps = Mapping[str, NDArray[np.float16]]
"""Output name -> [n, V, h, w(, 6)], n consecutive rows."""


class ShardAssembly:
    """The maps of a claim's rows, which arrive in order.

    Attributes:
        claim: whose rows these are.
        signatures: of the pictures that the maps belong to.
        places: where rows were carried over from, as in `EncodedBatch`; -1 for those that were encoded.
    """

    def __init__(self, claim: Claim, views: int) -> None:
        self.claim = claim
        self._rows, self._filled = count_rows(claim.rows), 0
        self._maps: dict[str, NDArray[np.float16]] = {}  # output -> [V, rows, h, w(, 6)]: a camera's part is contiguous
        self.signatures = Signatures.empty(self._rows, views)
        self.places = np.full(self._rows, -1)

    def add(self, maps: BatchMaps, signatures: Signatures, places: NDArray[np.int64] | None = None) -> bool:
        """Take the next rows; return whether they were the last ones."""
        part = slice(self._filled, self._filled + len(signatures))
        for name, values in maps.items():
            if name not in self._maps:
                views, *cell = values.shape[1:]
                self._maps[name] = np.empty((views, self._rows, *cell), np.float16)
            self._maps[name][:, part] = np.moveaxis(values, 1, 0)
        self.signatures[part] = signatures
        if places is not None:
            self.places[part] = places
        self._filled = part.stop
        return self._filled == self._rows

    def by_camera(self, camera_keys: tuple[str, ...]) -> ShardMaps:
        """Return the maps as a cache's writer takes them."""
        return {
            key: {name: values[view] for name, values in self._maps.items()} for view, key in enumerate(camera_keys)
        }
