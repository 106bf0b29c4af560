"""Blosc buffers that lie: mutated by the thousand and decoded, in a process that a crash may end.

Run as a program by test_hostile_buffers.py: `python -c "from tests.faults.buffers import main; main()" COUNT SEED`.
Prints one JSON object.
"""

import json
import random
import struct
import sys

import numpy as np

from geomcache.cache.codecs import Codec

HEADER = struct.Struct("<BBBBIII")  # version, format of the compressor, flags, type size, nbytes, block, cbytes
STORED = 0x02  # the flag of a map that was not compressed
SHAPES = ((1, 1), (3, 4, 6), (14, 14, 6), (36, 36), (36, 36, 6), (120, 150, 6))
MARGIN = 4096  # bytes on either side of a map, which nobody may write to


def good_buffers() -> list[tuple[bytes, int]]:
    """Buffers of maps that are random, smooth and constant: (buffer, bytes of the map)."""
    generator = np.random.default_rng(0)
    buffers = []
    for shape in SHAPES:
        smooth = np.linspace(-0.5, 0.5, int(np.prod(shape))).reshape(shape)
        for values in (generator.normal(size=shape), smooth, np.ones(shape)):
            map_ = values.astype(np.float16)
            buffers.append((Codec("zstd").encode(map_[None])[0], map_.nbytes))
    return buffers


def lying(buffer: bytes, generator: random.Random) -> bytes:
    """Change bytes, fields of the header or places of blocks, cut the buffer or add to it."""
    content = bytearray(buffer)
    for _ in range(generator.randint(1, 6)):
        kind, position = generator.randrange(6), generator.randrange(len(content))
        if kind == 0:
            content[position] ^= 1 << generator.randrange(8)
        elif kind == 1:
            content[position % 64 % len(content)] = generator.randrange(256)
        elif kind == 2:  # a length or a place
            odd = (0, 1, len(content), 0x7FFFFFFF, 0xFFFFFFFF, generator.getrandbits(32), position)
            field = 4 * (position % 12)
            content[field : field + 4] = struct.pack("<I", generator.choice(odd))
        elif kind == 3:
            content = content[: max(1, position)]
        elif kind == 4:
            content += generator.randbytes(generator.randrange(1, 64))
        elif len(content) > 2:
            content[2] ^= STORED
    return bytes(content)


def honest_sizes(buffer: bytes, nbytes: int) -> bytes:
    """State the true sizes, version and compressor, so that c-blosc sees what is wrong with the rest."""
    _, lz, flags, _, _, block, _ = HEADER.unpack_from(buffer.ljust(HEADER.size, b"\0"))
    return HEADER.pack(2, lz, flags & 0x13 | 4 << 5, 2, nbytes, block, max(len(buffer), HEADER.size)) + buffer[16:]


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    generator, buffers = random.Random(seed), good_buffers()
    codec, refused, reached = Codec("zstd"), 0, 0
    room = {nbytes: np.full(2 * MARGIN + nbytes, 0xA5, np.uint8) for _, nbytes in buffers}
    for number in range(count):
        good, nbytes = buffers[number % len(buffers)]
        buffer = lying(good, generator)
        if number % 2:
            buffer = honest_sizes(buffer, nbytes)
        memory = room[nbytes]
        try:
            codec.decode_into(buffer, memory[MARGIN : MARGIN + nbytes])
        except ValueError:
            refused += 1
        except RuntimeError:  # c-blosc's own
            refused, reached = refused + 1, reached + 1
        else:
            reached += 1
        assert (memory[:MARGIN] == 0xA5).all(), "bytes in front of the map were written"
        assert (memory[MARGIN + nbytes :] == 0xA5).all(), "bytes behind the map were written"
    print(json.dumps({"buffers": count, "refused": refused, "seen by c-blosc": reached}))
