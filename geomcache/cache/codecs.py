"""How a map lies in a shard file: as it is, or compressed without loss.

    raw     the map
    zstd    zstd behind a byte shuffle: Zarr's codec ``blosc``

Either is followed by its crc32c, as Zarr's codec of that name puts it there.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError

CodecName = Literal["raw", "zstd"]

_LEVEL = 3  # 5 saves a few per cent more in up to 2.6 times the time: benchmarks/RESULTS.md
_MAX_OVERHEAD = 16  # bytes that Blosc adds to what it cannot compress: BLOSC_MAX_OVERHEAD of its header


@dataclass(frozen=True)
class Codec:
    """A way to store maps, by its name."""

    name: CodecName = "raw"

    @classmethod
    def of(cls, name: object) -> "Codec":
        """By a name from outside.

        Raises:
            UserInputError: there is none of this name.
        """
        if name not in get_args(CodecName):
            raise UserInputError(f"codec: expected {' or '.join(get_args(CodecName))}, got {name!r:.80}")
        return cls(cast("CodecName", name))

    @property
    def compresses(self) -> bool:
        """Whether maps of one size have different sizes in a file."""
        return self.name != "raw"

    def bounds(self, nbytes: int) -> tuple[int, int]:
        """The least and the most bytes that a map of `nbytes` takes, without checksum."""
        return (_MAX_OVERHEAD, nbytes + _MAX_OVERHEAD) if self.compresses else (nbytes, nbytes)

    def zarr_codecs(self) -> list[Any]:
        """Zarr's codecs between a map's bytes and their checksum."""
        if not self.compresses:
            return []
        from zarr.codecs import BloscCodec

        return [BloscCodec(typesize=2, cname="zstd", clevel=_LEVEL, shuffle="shuffle", blocksize=0)]

    def encode(self, maps: NDArray[np.float16]) -> list[bytes]:
        """Maps, one by one; only of a codec that compresses."""
        encode = _blosc().encode
        return [encode(map_) for map_ in maps]

    @property
    def decode_into(self) -> Callable[[bytes, NDArray[np.uint8]], object]:
        """Function that puts a map's bytes into an array of their size; only of a codec that compresses.

        It raises RuntimeError or ValueError at bytes that are none of its own. Its input was written by others: compare
        the checksum first.
        """
        return cast("Callable[[bytes, NDArray[np.uint8]], object]", _blosc().decode)


RAW = Codec()


@functools.cache
def _blosc() -> Any:
    from numcodecs import Blosc  # type: ignore[import-untyped]  # not at the top: raw caches are read without it

    return Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.SHUFFLE)
