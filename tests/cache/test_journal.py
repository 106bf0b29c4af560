"""Lines and states of the journal, and the manifest: every damage is told, what a kill tore off is not acknowledged."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import google_crc32c
import pytest

from geomcache.cache.journal import Commit, Drop, Journal, begin_line, decode_line, encode_line
from geomcache.cache.layout import Layout, ShardFiles
from geomcache.cache.manifest import Manifest
from geomcache.errors import CacheCorruptError, CacheFormatError
from geomcache.ranges import count_rows
from geomcache.statistics import Moments
from tests.support.stores import make_maps, make_spec

SPEC = make_spec()
LAYOUT = Layout.of(SPEC, frames=90, shard_frames=16)
FINGERPRINT = "ab" * 32
FILES = {"episodes/start/c.0": (36, "cd" * 32)}


def commit(shard: int, rows: tuple[tuple[int, int], ...] | None = None) -> Commit:
    rows = rows or (LAYOUT.shard_rows(shard),)
    maps = make_maps(SPEC, [row for start, stop in rows for row in range(start, stop)])
    statistics = {
        camera: {name: Moments.of(name, values).to_dict() for name, values in outputs.items()}
        for camera, outputs in maps.items()
    }
    digests = tuple(hashlib.sha256(bytes([shard, n])).digest() for n in range(5))
    return Commit(shard, rows, ShardFiles(sizes(count_rows(rows)), digests), statistics)


def sizes(rows: int) -> tuple[int, ...]:
    """Bytes of a shard's files that hold so many rows."""
    ray, conf, index = rows * (3 * 4 * 6 * 2 + 4), rows * (3 * 4 * 2 + 4), 16 * 16 + 4
    return ray + index, conf + index, ray + index, conf + index, 16 * 4 * 4 + 4


def journal(path: Path, content: bytes | None = None) -> Journal:
    if content is not None:
        path.write_bytes(content)
    return Journal(path, LAYOUT, FINGERPRINT)


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """A journal of three records behind the first line."""
    records = [commit(2), commit(0, ((3, 9),)), Drop(2, "for a test")]
    return [begin_line(LAYOUT, FINGERPRINT, FILES), *(encode_line(record.to_dict()) for record in records)]


def test_a_line_is_json_and_carries_the_checksum_of_what_is_before_it() -> None:
    line = encode_line({"record": "drop", "shard": 3, "reason": "x"})
    content = b'{"reason":"x","record":"drop","shard":3'
    assert line == content + b',"crc32c":"%08x"}\n' % google_crc32c.value(content)
    assert json.loads(line)["shard"] == 3
    assert decode_line(line) == json.loads(line)


def test_records_add_up(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "journal"
    state = journal(path, b"".join(lines[:2]))
    assert state.read() == {2}
    assert (state.files, state.torn, state.rows) == (FILES, 0, ((32, 48),))
    path.write_bytes(b"".join(lines))
    assert state.read() == {0, 2}
    assert state.rows == ((3, 9),)
    assert state.owed == {2: ((32, 48),)}
    assert state.commits == {0: commit(0, ((3, 9),))}
    assert state.read() == set()
    state.append(commit(2))
    assert (state.owed, state.rows) == ({}, ((3, 9), (32, 48)))
    again = journal(path)
    again.read()
    assert (again.commits, again.owed) == (state.commits, {})


def test_statistics_are_those_of_all_values_whatever_the_order(tmp_path: Path) -> None:
    shards = [commit(4), commit(1, ((16, 20), (25, 32))), commit(0)]
    states = []
    for order in (shards, shards[::-1]):
        state = journal(tmp_path / "journal", begin_line(LAYOUT, FINGERPRINT, FILES))
        state.read()
        for each in order:
            state.append(each)
        states.append(state.statistics())
    assert states[0] == states[1]  # to the bit
    values = make_maps(SPEC, [*range(20), *range(25, 32), *range(64, 80)])
    for camera, outputs in states[0].items():
        ray = values[camera]["ray"].astype(float).reshape(-1, 6)
        assert outputs["ray"].count == len(ray)
        assert outputs["ray"].mean == pytest.approx(ray.mean(axis=0))
        assert outputs["ray"].std == pytest.approx(ray.std(axis=0))


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path: Path, lines: list[bytes]) -> None:
    content = b"".join(lines)
    whole = [sum(map(len, lines[: n + 1])) for n in range(len(lines))]
    lengths = {*range(len(lines[0]), len(content), 61), *(end + n for end in whole[:-1] for n in (-1, 0, 1))}
    for length in sorted(lengths - {whole[0] - 1}):
        state = journal(tmp_path / "journal", content[:length])
        state.read()
        good = max(end for end in whole if end <= length)
        assert state.torn == length - good
        assert set(state.commits) == [set(), {2}, {2, 0}][whole.index(good)]
        assert state.repair() == length - good
        assert (tmp_path / "journal").stat().st_size == good


def test_a_torn_end_is_cut_off_and_appended_to(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "journal"
    state = journal(path, b"".join(lines[:2]) + lines[2][:40] + b"\n" + bytes(100))
    state.read()
    assert (state.torn, set(state.commits)) == (141, {2})
    assert path.stat().st_size == len(lines[0]) + len(lines[1]) + 141  # reading changes nothing
    assert state.repair() == 141
    state.append(Drop(2, "for a test"))
    assert path.read_bytes() == b"".join([*lines[:2], lines[3]])


def test_a_first_line_is_never_torn(tmp_path: Path, lines: list[bytes]) -> None:
    for content in (b"", lines[0][:-1], b"\n"):
        with pytest.raises(CacheCorruptError, match="journal: expected a first line"):
            journal(tmp_path / "journal", content).read()
    with pytest.raises(CacheCorruptError, match="expected the journal, found none"):
        journal(tmp_path / "none").read()


def test_every_flipped_byte_in_front_of_a_good_line_is_told(tmp_path: Path, lines: list[bytes]) -> None:
    content = bytearray(b"".join(lines))
    last_newline = len(content) - len(lines[-1]) - 1  # without it the last two lines are one, and torn
    for at in [*range(0, last_newline, 23), last_newline - 1, *(len(lines[0]) + n for n in (-1, 0, 1))]:
        content[at] ^= 1 << at % 8
        with pytest.raises(CacheCorruptError, match="expected lines with their checksums, found a damaged one at byte"):
            journal(tmp_path / "journal", bytes(content)).read()
        content[at] ^= 1 << at % 8
    content[last_newline] ^= 1
    state = journal(tmp_path / "journal", bytes(content))
    state.read()
    assert state.torn == len(lines[-1]) + len(lines[-2])


def test_a_journal_that_shrinks_while_it_is_used_is_told(tmp_path: Path, lines: list[bytes]) -> None:
    state = journal(tmp_path / "journal", b"".join(lines))
    state.read()
    (tmp_path / "journal").write_bytes(lines[0])
    with pytest.raises(CacheCorruptError, match="it was cut off"):
        state.read()


def test_the_journal_of_another_cache_is_refused(tmp_path: Path) -> None:
    state = journal(tmp_path / "journal", begin_line(LAYOUT, "ff" * 32, FILES))
    with pytest.raises(CacheCorruptError, match="expected fingerprint abab.*, found ffff"):
        state.read()
    other = Layout.of(SPEC, frames=90, shard_frames=32)
    state = journal(tmp_path / "journal", begin_line(other, FINGERPRINT, FILES))
    with pytest.raises(CacheCorruptError, match="expected shard_frames 16.*, found 32"):
        state.read()


RECORD = commit(1).to_dict()


@pytest.mark.parametrize(
    "record",
    [
        RECORD | {"record": "other"},
        RECORD | {"shard": 6},
        RECORD | {"shard": -1},
        RECORD | {"shard": True},
        RECORD | {"shard": "../../etc/passwd"},
        RECORD | {"rows": []},
        RECORD | {"rows": [[0, 16]]},
        RECORD | {"rows": [[16, 33]]},
        RECORD | {"rows": [[20, 18]]},
        RECORD | {"rows": [[16, 18], [18, 32]]},
        RECORD | {"rows": [[16.0, 32]]},
        RECORD | {"rows": [[16, 31]]},
        RECORD | {"rows": [[16, 32, 40]]},
        RECORD | {"rows": 7},
        RECORD | {"bytes": [1, 2, 3, 4, 5]},
        RECORD | {"bytes": [*sizes(16)[:4], float(sizes(16)[4])]},
        RECORD | {"bytes": [*sizes(16), 0]},
        RECORD | {"bytes": sizes(16)[:4]},
        RECORD | {"sha256": ["ab" * 32] * 4},
        RECORD | {"sha256": ["ab" * 31] * 5},
        RECORD | {"sha256": ["xy" * 32] * 5},
        RECORD | {"statistics": []},
        {"record": "commit", "shard": 1},
        {"record": "drop", "shard": 1, "reason": "it is not there"},
        {"record": "begin"},
        {},
        [],
        7,
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path: Path, lines: list[bytes], record: object) -> None:
    content = json.dumps(record).encode()[:-1]
    line = content + b',"crc32c":"%08x"}\n' % google_crc32c.value(content)
    with pytest.raises((CacheFormatError, CacheCorruptError), match="journal: expected"):
        journal(tmp_path / "journal", lines[0] + line + lines[1]).read()


def manifest() -> Manifest:
    state = {0: commit(0, ((3, 9),)), 1: commit(1), 5: commit(5)}
    moments = {
        camera: {name: Moments.from_dict(value, name) for name, value in outputs.items()}
        for camera, outputs in state[5].statistics.items()
    }
    return Manifest(
        rows=((3, 9), (16, 32), (80, 90)),
        files=FILES,
        shards={shard: each.files for shard, each in state.items()},
        statistics=moments,
    )


def test_manifest_comes_back_and_reads_as_json() -> None:
    content = manifest().encode(LAYOUT, FINGERPRINT)
    assert Manifest.parse(content, Path("manifest"), LAYOUT, FINGERPRINT) == manifest()
    data = json.loads(content)
    assert data["sha256"] == hashlib.sha256(content[: content.index(b',\n"sha256":"')]).hexdigest()
    assert data["rows"] == [[3, 9], [16, 32], [80, 90]]
    assert [(shard, sizes) for shard, sizes, _ in data["shards"]] == [
        (0, [*sizes(6)]),
        (1, [*sizes(16)]),
        (5, [*sizes(10)]),
    ]
    pooled = data["statistics"]["pooled"]["ray"]
    assert pooled["count"] == sum(of["ray"].count for of in manifest().statistics.values())


def test_every_flipped_bit_and_every_cut_of_a_manifest_is_told() -> None:
    content = bytearray(manifest().encode(LAYOUT, FINGERPRINT))
    for bit in range(0, 8 * len(content), 3):
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match="expected content with the sha256 at its end"):
            Manifest.parse(bytes(content), Path("manifest"), LAYOUT, FINGERPRINT)
        content[bit // 8] ^= 1 << bit % 8
    for length in range(len(content)):
        with pytest.raises(CacheCorruptError):
            Manifest.parse(bytes(content[:length]), Path("manifest"), LAYOUT, FINGERPRINT)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [[0, 9], [16, 32], [80, 90]]},
        {"rows": [[3, 9], [16, 32], [80, 91]]},
        {"rows": [[3, 9], [16, 32]]},
        {"rows": [[0, 2**62]]},
        {"shards": []},
        {"shards": [[0, [], []]]},
        {"statistics": {"cameras": {}}},
        {"files": {"../x": 1}},
        {"files": []},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    data = json.loads(manifest().encode(LAYOUT, FINGERPRINT)) | change
    del data["sha256"]
    content = json.dumps(data).encode()[:-1]
    content += b',\n"sha256":"%s"\n}\n' % hashlib.sha256(content).hexdigest().encode()
    with pytest.raises(CacheFormatError, match="manifest: expected records of schema version 1"):
        Manifest.parse(content, Path("manifest"), LAYOUT, FINGERPRINT)


def test_manifest_of_another_cache_is_refused() -> None:
    content = manifest().encode(LAYOUT, "ff" * 32)
    with pytest.raises(CacheCorruptError, match="files of two caches were mixed"):
        Manifest.parse(content, Path("manifest"), LAYOUT, FINGERPRINT)


def test_a_manifest_of_thirty_million_frames_stays_small() -> None:
    layout = Layout.of(SPEC, frames=30_000_000, shard_frames=4096)
    shards = {
        shard: ShardFiles(
            tuple(low for low, _ in layout.size_bounds(stop - start)), tuple(bytes([n]) * 32 for n in range(5))
        )
        for shard in range(layout.shards)
        for start, stop in [layout.shard_rows(shard)]
    }
    big = Manifest(rows=((0, layout.frames),), files=FILES, shards=shards, statistics=manifest().statistics)
    content = big.encode(layout, FINGERPRINT)
    tracemalloc.start()
    try:
        parsed = Manifest.parse(content, Path("manifest"), layout, FINGERPRINT)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parsed.shards == shards
    assert count_rows(parsed.rows) == 30_000_000
    assert (len(content), kept, peak) < (4 << 20, 8 << 20, 30 << 20)
