"""A reader written from docs/cache-format.md alone, with none of geomcache's code, finds what the page promises."""

import hashlib
import itertools
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest

from tests.support.geometry import FEATURE_DIM
from tests.support.stores import (
    LENGTHS,
    MadeUpMaps,
    fill,
    make_maps,
    make_signatures,
    make_spec,
    make_store,
    open_writer,
)

of_every_codec = pytest.mark.parametrize("codec", ["raw", "zstd"])
TRAILING = {"ray": 6, "ray_conf": 1, "depth": 1, "depth_conf": 1, "feature": FEATURE_DIM}


def dimensions(column: str) -> int:
    """How many there are in a map of a column."""
    return 2 + (TRAILING[column.rpartition("/")[2]] > 1)


def crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def canonical(data: object) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode("ascii")


def read_journal(path: Path) -> tuple[dict[str, Any], dict[int, tuple[list[Any], list[int], list[str]]]]:
    first: dict[str, Any] = {}
    shards = {}
    for line in path.read_bytes().splitlines():
        content, _, tail = line.rpartition(b',"crc32c":"')
        assert tail == b'%08x"}' % int.from_bytes(crc(content), "little")
        record = json.loads(line)
        if not first:
            assert record["record"] == "begin"
            first = record
        elif record["record"] == "commit":
            shards[record["shard"]] = record["rows"], record["bytes"], record["sha256"]
        else:
            del shards[record["shard"]]
    return first, shards


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[int, tuple[list[int], list[str]]]]:
    content, _, tail = path.read_bytes().rpartition(b',\n"sha256":"')
    assert tail == hashlib.sha256(content).hexdigest().encode() + b'"\n}\n'
    data = json.loads(path.read_bytes())
    return data, {shard: (sizes, hashes) for shard, sizes, hashes in data["shards"]}


def read_rows(folder: Path, rows: list[int], codec: str) -> dict[str, dict[int, bytes]]:
    """Every map of every row, by column, each check of the page made."""
    about = json.loads((folder / "zarr.json").read_bytes())["attributes"]["geomcache"]
    assert (about["schema_version"], about["codec"]) == (2, codec)
    identity: dict[str, Any] = {"spec": dict(about["spec"]), "dataset": dict(about["dataset"])}
    del identity["spec"]["model_id"], identity["dataset"]["repo_id"], identity["dataset"]["revision"]
    assert about["fingerprint"] == hashlib.sha256(canonical(identity)).hexdigest()
    k = about["shard_frames"]
    h, w = about["spec"]["grid_hw"]
    columns = [
        f"{camera['key']}/{output}" for camera in about["spec"]["cameras"] for output in about["spec"]["outputs"]
    ]
    found: dict[str, dict[int, bytes]] = {column: {} for column in columns}
    for shard in sorted({row // k for row in rows}):
        here = [row - shard * k for row in rows if row // k == shard]
        names = [column + f"/c.{shard}" + ".0" * dimensions(column) for column in columns]
        table = (folder / f"frame_crc32c/c.{shard}.0").read_bytes()
        assert table[-4:] == crc(table[:-4])
        sums = np.frombuffer(table[:-4], "<u4").reshape(k, len(columns))
        for number, (column, name) in enumerate(zip(columns, names, strict=True)):
            size = 2 * h * w * TRAILING[column.rpartition("/")[2]]
            content = (folder / name).read_bytes()
            index = content[-16 * k - 4 :]
            lengths = [size + 4] * len(here)
            if codec == "zstd":
                lengths = [length for _, length in struct.iter_unpack("<QQ", index[:-4]) if length != 2**64 - 1]
                assert all(20 <= length <= size + 20 for length in lengths)
            stops = [*itertools.accumulate(lengths)]
            assert len(content) == stops[-1] + 16 * k + 4
            places = zip(here, stops, lengths, strict=True)
            entries = {row: (stop - length, length) for row, stop, length in places}
            expected = b"".join(struct.pack("<QQ", *entries.get(row, (2**64 - 1,) * 2)) for row in range(k))
            assert index == expected + crc(expected)
            for row, (offset, length) in entries.items():
                payload = content[offset : offset + length - 4]
                assert content[offset + length - 4 : offset + length] == crc(payload)
                if codec == "zstd":
                    payload = numcodecs.Blosc().decode(payload)
                assert crc(payload) == struct.pack("<I", sums[row, number])
                found[column][shard * k + row] = payload
            assert not sums[[row for row in range(k) if row not in here]].any()
    return found


def check_maps(maps: MadeUpMaps, rows: list[int], found: dict[str, dict[int, bytes]]) -> None:
    for camera, outputs in maps.items():
        for output, values in outputs.items():
            assert list(found[f"{camera}/{output}"]) == rows
            assert b"".join(found[f"{camera}/{output}"].values()) == values.tobytes()


@of_every_codec
@pytest.mark.parametrize("outputs", [("ray", "ray_conf"), tuple(TRAILING)])
def test_the_page_describes_a_sealed_cache(tmp_path: Path, outputs: tuple[str, ...], codec: str) -> None:
    spec = make_spec(outputs=outputs)
    folder = make_store(tmp_path / "cache", [(0, 37), (70, 90)], spec=spec, codec=codec)
    data, shards = read_manifest(folder / "manifest.json")
    rows = [row for start, stop in data["rows"] for row in range(start, stop)]
    assert data["rows"] == [[0, 37], [70, 90]]
    found = read_rows(folder, rows, codec)
    check_maps(make_maps(spec, rows), rows, found)
    first, journaled = read_journal(folder / "journal.jsonl")
    assert {shard: (sizes, hashes) for shard, (_, sizes, hashes) in journaled.items()} == shards
    assert first["files"] == {name: entry for name, entry in data["files"].items() if name != "zarr.json"}
    for name, (nbytes, digest) in data["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (nbytes, digest)
    for shard, (sizes, hashes) in shards.items():
        names = [f"{column}/c.{shard}" + ".0" * dimensions(column) for column in data["columns"]]
        names += [f"frame_crc32c/c.{shard}.0", f"picture_hash/c.{shard}.0", f"picture_means/c.{shard}.0.0.0.0"]
        for name, nbytes, digest in zip(names, sizes, hashes, strict=True):
            content = (folder / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (nbytes, digest)
    named = {*data["files"], "manifest.json", "journal.jsonl", "lock"}
    others = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - named
    assert len(others) == len(shards) * (len(data["columns"]) + 3)


def test_the_page_describes_a_growing_cache(tmp_path: Path) -> None:
    spec = make_spec()
    with open_writer(tmp_path / "cache", [(5, 40)]) as writer:
        fill(writer, 2)
        assert not (tmp_path / "cache" / "manifest.json").exists()
        first, shards = read_journal(tmp_path / "cache" / "journal.jsonl")
        assert (first["shard_frames"], sorted(shards)) == (16, [0, 1])
        rows = [row for ranges, _, _ in shards.values() for start, stop in ranges for row in range(start, stop)]
        assert rows == list(range(5, 32))
        check_maps(make_maps(spec, rows), rows, read_rows(tmp_path / "cache", rows, "raw"))


def load_reader() -> dict[str, Any]:
    """The page's reader, run as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text(encoding="utf-8")
    code, example = re.findall(
        r"^```python\n(.*?)^```$", page.partition("\n## A reader\n")[2], re.DOTALL | re.MULTILINE
    )
    assert "zarr" not in re.findall(r"^(?:import|from) (\S+)", code, re.MULTILINE)
    assert "geomcache" not in re.findall(r"^(?:import|from) (\S+)", code, re.MULTILINE)
    assert 'Cache("libero.zarr")' in example
    names: dict[str, Any] = {}
    exec(compile(code, "cache-format.md", "exec"), names)
    return names


@of_every_codec
@pytest.mark.parametrize("sealed", [True, False])
def test_the_reader_on_the_page_reads_what_was_written(tmp_path: Path, sealed: bool, codec: str) -> None:
    reader = load_reader()
    assert reader["crc32c"](b"123456789") == 0xE3069283
    spec = make_spec(outputs=tuple(TRAILING))
    rows = [row for row in range(90) if not 37 <= row < 70]
    if sealed:
        make_store(tmp_path / "cache", [(0, 37), (70, 90)], spec=spec, codec=codec)
    else:
        for wanted in ([(5, 37)], [(0, 37), (70, 90)]):  # the first shard is dropped and made again
            with open_writer(tmp_path / "cache", wanted, spec=spec, codec=codec) as writer:
                fill(writer)
        assert b'"record":"drop"' in (tmp_path / "cache" / "journal.jsonl").read_bytes()
        with (tmp_path / "cache" / "journal.jsonl").open("ab") as file:
            file.write(b'{"record":"commit","shard":')  # torn off by a kill
    cache = reader["Cache"](tmp_path / "cache")
    assert cache.sealed == sealed
    written, signatures = make_maps(spec, rows), make_signatures(spec, rows)
    for place, row in enumerate(rows):
        for column, maps in cache.read(row).items():
            camera, _, output = column.partition("/")
            assert maps.dtype == np.float16
            np.testing.assert_array_equal(maps, written[camera][output][place])
        hashes, means = cache.signatures(row)
        np.testing.assert_array_equal(hashes, signatures.hashes[place])
        np.testing.assert_array_equal(means, signatures.means[place])
    for row in (37, 69, 90):
        with pytest.raises(LookupError, match=f"row {row} "):
            cache.read(row)
    starts = np.cumsum((0, *LENGTHS))
    assert [cache.row(episode, 1) for episode in range(len(LENGTHS))] == [start + 1 for start in starts[:-1]]


def test_the_reader_on_the_page_believes_no_blosc_header() -> None:
    unpack = load_reader()["unpack"]
    maps = np.random.default_rng(0).normal(size=(36, 36, 6)).astype(np.float16)
    buffer = bytes(numcodecs.Blosc(cname="zstd", clevel=3, shuffle=1).encode(maps))
    assert unpack(buffer, maps.nbytes, "map") == maps.tobytes()
    header = struct.unpack_from("<BBBBIII", buffer)
    for field, value in ((0, 3), (2, 0x11), (2, header[2] | 2), (3, 1), (4, 2**30), (5, 0), (5, 1), (6, 2**30)):
        lie = struct.pack("<BBBBIII", *header[:field], value, *header[field + 1 :]) + buffer[16:]
        with pytest.raises(ValueError, match="not as it was written"):
            unpack(lie, maps.nbytes, "map")
    for cut in (b"", buffer[:15], buffer[:16], buffer[:-1], buffer + b"\0"):
        with pytest.raises(ValueError, match="not as it was written"):
            unpack(cut, maps.nbytes, "map")


@of_every_codec
def test_the_reader_on_the_page_finds_damage(tmp_path: Path, codec: str) -> None:
    reader = load_reader()
    folder = make_store(tmp_path / "cache", codec=codec)
    for name in ("zarr.json", "manifest.json", "episodes/identity/c.0", "frame_crc32c/c.1.0"):
        shutil.copytree(folder, tmp_path / "copy")
        flip(tmp_path / "copy" / name, -20)
        with pytest.raises((ValueError, KeyError)):
            reader["Cache"](tmp_path / "copy").read(20)
        shutil.rmtree(tmp_path / "copy")
    column = "observation.images.front/ray/c.1.0.0.0"
    fifth = int(np.frombuffer((folder / column).read_bytes()[-260:-4], "<u8")[8])
    assert codec == "zstd" or fifth == 4 * (2 * 3 * 4 * 6 + 4)
    for place in (fifth, -20):  # of the fifth map of the shard, and of the index
        before = (folder / column).read_bytes()
        flip(folder / column, place)
        with pytest.raises(ValueError, match="not as it was written"):
            reader["Cache"](folder).read(20)
        (folder / column).write_bytes(before)
    assert reader["Cache"](folder).read(20)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
