"""The bytes of shard files, against hand-worked numbers."""

import random
import struct

import google_crc32c
import numpy as np
import pytest

from geomcache.cache.layout import Layout, choose_shard_frames, crc32c, with_crc, without_crc
from geomcache.errors import UserInputError
from tests.support.stores import CAMERAS, make_maps, make_spec

ABSENT = 0xFFFFFFFFFFFFFFFF


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    assert with_crc(b"123456789") == b"123456789" + bytes.fromhex("839206e3")
    assert without_crc(with_crc(b"abc")) == b"abc"
    assert without_crc(b"abc" + bytes(4)) is None
    assert without_crc(b"ab") is None


@pytest.mark.parametrize(
    ("grid_hw", "frames", "shard_frames"),
    [
        ((14, 14), 273_465, 4096),  # 32 MiB would hold 14,242 frames; 64 shards of the dataset 4,272
        ((36, 36), 273_465, 2048),  # 32 MiB: 2,157
        ((36, 36), 16_777_216, 2048),  # 8192 shards
        ((36, 36), 16_777_217, 4096),  # one frame more would need another
        ((14, 14), 30_000_000, 4096),
        ((14, 14), 8192 * 65_536, 65_536),
        ((14, 14), 8193 * 65_536, 65_536),  # the largest, whatever the number of shards
        ((36, 36), 161_500_000, 32_768),  # a million episodes
        ((288, 288), 273_465, 64),  # 32 MiB: 33, but 8192 shards need 34
        ((288, 288), 27_600_000, 1024),  # 8192 shards need 4096, and 4 GiB hold 1,849: 26,954 shards
        ((14, 14), 2_765, 32),  # 64 shards: 43
        ((14, 14), 5, 16),
        ((2000, 2000), 100_000, 16),  # 32 MiB: none
    ],
)
def test_shard_frames(grid_hw: tuple[int, int], frames: int, shard_frames: int) -> None:
    assert choose_shard_frames(make_spec(grid_hw=grid_hw), frames) == shard_frames


def test_layout_names_the_files_of_a_shard() -> None:
    layout = Layout.of(make_spec(), frames=90, shard_frames=16)
    assert layout.shards == 6
    assert layout.shard_rows(5) == (80, 90)
    assert list(layout.shards_of(((0, 17), (18, 20), (64, 65)))) == [0, 1, 4]
    assert layout.files(3) == (
        f"{CAMERAS[0]}/ray/c.3.0.0.0",
        f"{CAMERAS[0]}/ray_conf/c.3.0.0",
        f"{CAMERAS[1]}/ray/c.3.0.0.0",
        f"{CAMERAS[1]}/ray_conf/c.3.0.0",
        "frame_crc32c/c.3.0",
        "picture_hash/c.3.0",
        "picture_means/c.3.0.0.0.0",
    )
    ray, conf, index, table = 10 * (3 * 4 * 6 * 2 + 4), 10 * (3 * 4 * 2 + 4), 16 * 16 + 4, 16 * 4 * 4 + 4
    tables = table, 16 * 2 * 8 + 4, 16 * 2 * 4 * 4 * 3 + 4
    sizes = ray + index, conf + index, ray + index, conf + index, *tables
    assert layout.size_bounds(10) == tuple((size, size) for size in sizes)
    assert layout.raw_nbytes(20, 2) == 2 * sum(sizes)


@pytest.mark.parametrize(
    "key", ["lock", "episodes", "frame_index", "Zarr.json", "manifest.json", "frame_crc32c", "picture_hash"]
)
def test_a_camera_cannot_take_the_name_of_another_part(key: str) -> None:
    with pytest.raises(UserInputError, match=f"camera key: expected none of .*, got '{key}'"):
        Layout.of(make_spec(cameras=(key,)), frames=90, shard_frames=16)


def test_shard_file_holds_maps_checksums_and_index_where_zarr_puts_them() -> None:
    spec = make_spec(grid_hw=(2, 2))
    layout = Layout.of(spec, frames=90, shard_frames=16)
    column, local = layout.columns[1], np.array([1, 2, 7])
    maps = make_maps(spec, [1, 2, 7])[CAMERAS[0]]["ray_conf"]
    parts, checksums = layout.encode(column, local, maps)
    content = b"".join(bytes(part) for part in parts)
    assert len(content) == 3 * 12 + 16 * 16 + 4
    entries = [(ABSENT, ABSENT)] * 16
    for slot, row in enumerate((1, 2, 7)):
        payload = maps[slot].tobytes()
        entries[row] = (slot * 12, 12)
        assert content[slot * 12 : slot * 12 + 8] == payload
        assert content[slot * 12 + 8 : slot * 12 + 12] == struct.pack("<I", google_crc32c.value(payload))
        assert checksums[slot] == google_crc32c.value(payload)
    index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    assert content[36:] == index + struct.pack("<I", google_crc32c.value(index))


def test_a_file_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(grid_hw=(2, 2))
    layout, rows = Layout.of(spec, frames=90, shard_frames=16), np.arange(16)
    column, maps = layout.columns[0], make_maps(spec, [*range(16)])[CAMERAS[0]]["ray"]
    whole = [bytes(part) for part in layout.encode(column, rows, maps)[0]]
    monkeypatch.setattr("geomcache.cache.layout._BLOCK_NBYTES", 3 * column.stride)
    parts = [bytes(part) for part in layout.encode(column, rows, maps)[0]]
    assert (len(whole), len(parts)) == (2, 7)
    assert b"".join(parts) == b"".join(whole)


def test_checksum_file_has_a_row_for_every_frame_of_the_shard() -> None:
    layout = Layout.of(make_spec(), frames=90, shard_frames=16)
    numbers = [random.Random(0).randrange(2**32) for _ in range(8)]
    values = np.array(numbers, dtype=np.uint32).reshape(4, 2).T
    content = layout.tables[0].encode(16, np.array([3, 15]), values)
    table = struct.unpack("<64I", content[:-4])
    assert table[12:16] == tuple(numbers[::2])
    assert table[60:64] == tuple(numbers[1::2])
    assert not any(table[:12] + table[16:60])
    assert content[-4:] == struct.pack("<I", google_crc32c.value(content[:-4]))
