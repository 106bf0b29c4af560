"""The codecs of maps in a shard file, none of which loses anything.

    raw     the map's bytes
    zstd    a Blosc buffer, zstd after a byte shuffle: Zarr's codec ``blosc``

After either one lies its crc32c, as Zarr's codec of that name stores it.
"""

import functools
import struct
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError

CodecName = Literal["raw", "zstd"]

_LEVEL = 3  # 5 saves a few per cent more in up to 2.6 times the time: benchmarks/RESULTS.md
_TYPESIZE = np.dtype(np.float16).itemsize

# A Blosc 1 header: version, version of the compressor's format, flags, type size, nbytes, block size, cbytes.
_HEADER = struct.Struct("<BBBBIII")
_MAX_OVERHEAD = _HEADER.size  # bytes that Blosc adds to what it cannot compress
_VERSION = 2
_SHUFFLED, _STORED, _UNSPLIT, _ZSTD = 0x01, 0x02, 0x10, 4 << 5  # flags; the upper three bits are the compressor


@dataclass(frozen=True)
class Codec:
    """A way to store maps."""

    name: CodecName = "raw"

    @classmethod
    def of(cls, name: object) -> "Codec":
        """Return the codec of a name that was typed or read from a file.

        Raises:
            UserInputError: no codec has this name.
        """
        if name not in get_args(CodecName):
            raise UserInputError(f"codec: expected {' or '.join(get_args(CodecName))}, got {name!r:.80}")
        return cls(cast("CodecName", name))

    @property
    def compresses(self) -> bool:
        """Return whether maps of one shape can take different numbers of bytes in a file."""
        return self.name != "raw"

    def bounds(self, nbytes: int) -> tuple[int, int]:
        """Return the least and the most bytes that a map of `nbytes` takes in a file, without checksum."""
        return (_MAX_OVERHEAD, nbytes + _MAX_OVERHEAD) if self.compresses else (nbytes, nbytes)

    def zarr_codecs(self) -> list[Any]:
        """Return Zarr's codecs between a map's bytes and their checksum."""
        if not self.compresses:
            return []
        from zarr.codecs import BloscCodec

        return [BloscCodec(typesize=_TYPESIZE, cname="zstd", clevel=_LEVEL, shuffle="shuffle", blocksize=0)]

    def encode(self, maps: NDArray[np.float16]) -> list[bytes]:
        """Return a buffer for each map, [n, h, w(, 6)]. Only for a codec that compresses."""
        encode = _blosc().encode
        return [encode(map_) for map_ in maps]

    def decode_into(self, buffer: bytes, content: NDArray[np.uint8]) -> None:
        """Decode a buffer of unknown origin into an array of a map's bytes. Only for a codec that compresses.

        Raises:
            ValueError, RuntimeError: the buffer does not hold a map of this size.
        """
        _check_header(buffer, content.nbytes)
        _blosc().decode(buffer, content)


RAW = Codec()


def _check_header(buffer: bytes, nbytes: int) -> None:
    """Refuse a header that is not true of its buffer: c-blosc reads and writes as many bytes as the header says.

    With sizes that are true it checks all else that it reads (tests/faults/test_hostile_buffers.py).

    Raises:
        ValueError: the buffer is none of a map of `nbytes`.
    """
    if len(buffer) < _HEADER.size:
        raise ValueError(f"a Blosc header: expected {_HEADER.size} bytes, found {len(buffer)}")
    version, _, flags, typesize, stated_nbytes, block, cbytes = _HEADER.unpack_from(buffer)
    if version != _VERSION or typesize != _TYPESIZE or flags & ~(_SHUFFLED | _STORED | _UNSPLIT) != _ZSTD:
        raise ValueError(
            f"a Blosc header: expected version {_VERSION}, zstd and type size {_TYPESIZE}, found version {version},"
            f" flags {flags:#04x} and type size {typesize}"
        )
    if (stated_nbytes, cbytes) != (nbytes, len(buffer)):
        raise ValueError(f"a Blosc header: expected {nbytes} bytes in {len(buffer)}, found {stated_nbytes} in {cbytes}")
    if not 0 < block <= nbytes:
        raise ValueError(f"a Blosc header: expected blocks of 1 to {nbytes} bytes, found {block}")
    least = nbytes if flags & _STORED else 4 * -(-nbytes // block)  # of a map that is stored; of the blocks' places
    if cbytes < _MAX_OVERHEAD + least or (flags & _STORED and cbytes > _MAX_OVERHEAD + least):
        raise ValueError(f"a Blosc header: expected {_MAX_OVERHEAD + least} bytes for its flags, found {cbytes}")


@functools.cache
def _blosc() -> Any:
    from numcodecs import Blosc  # not at the top: raw caches are read without it

    return Blosc(cname="zstd", clevel=_LEVEL, shuffle=Blosc.SHUFFLE)
