"""Lines and states of the journal: damage is reported, and an interrupted append was never acknowledged."""

import json
from pathlib import Path

import google_crc32c
import pytest

from geomcache.cache.journal import Commit, Drop, Journal, begin_line, decode_line, encode_line
from geomcache.cache.layout import Layout
from geomcache.errors import CacheCorruptError, CacheFormatError
from geomcache.ranges import count_rows
from tests.support.records import FILES, FINGERPRINT, LAYOUT, SPEC, commit, sizes
from tests.support.stores import make_maps


def journal(path: Path, content: bytes | None = None) -> Journal:
    if content is not None:
        path.write_bytes(content)
    return Journal(path, LAYOUT, FINGERPRINT)


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    """A journal of three records behind the first line."""
    records: list[Commit | Drop] = [commit(2), commit(0, ((3, 9),)), Drop(2, "for a test")]
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
    assert (state.files, state.incomplete_nbytes, state.rows) == (FILES, 0, ((32, 48),))
    path.write_bytes(b"".join(lines))
    assert state.read() == {0, 2}
    assert state.rows == ((3, 9),)
    assert state.dropped_rows == {2: ((32, 48),)}
    assert state.commits == {0: commit(0, ((3, 9),))}
    assert state.read() == set()
    state.append(commit(2))
    assert state.dropped_rows == {}
    assert count_rows(state.rows) == 22
    again = journal(path)
    again.read()
    assert (again.commits, again.dropped_rows) == (state.commits, {})


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
        assert state.incomplete_nbytes == length - good
        assert set(state.commits) == [set(), {2}, {2, 0}][whole.index(good)]
        assert state.repair() == length - good
        assert (tmp_path / "journal").stat().st_size == good


def test_a_torn_end_is_cut_off_and_appended_to(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "journal"
    state = journal(path, b"".join(lines[:2]) + lines[2][:40] + b"\n" + bytes(100))
    state.read()
    assert (state.incomplete_nbytes, set(state.commits)) == (141, {2})
    assert path.stat().st_size == len(lines[0]) + len(lines[1]) + 141  # reading changes nothing
    assert state.repair() == 141
    state.append(Drop(2, "for a test"))
    assert path.read_bytes() == b"".join([*lines[:2], lines[3]])


def test_a_first_line_is_never_torn(tmp_path: Path, lines: list[bytes]) -> None:
    for content in (b"", lines[0][:-1], b"\n"):
        with pytest.raises(CacheCorruptError, match="journal: "):
            journal(tmp_path / "journal", content).read()
    with pytest.raises(CacheCorruptError, match="journal.* none"):
        journal(tmp_path / "none").read()


def test_every_flipped_byte_in_front_of_a_good_line_is_told(tmp_path: Path, lines: list[bytes]) -> None:
    content = bytearray(b"".join(lines))
    last_newline = len(content) - len(lines[-1]) - 1  # without it the last two lines are one, and torn
    for at in [*range(0, last_newline, 23), last_newline - 1, *(len(lines[0]) + n for n in (-1, 0, 1))]:
        content[at] ^= 1 << at % 8
        with pytest.raises(CacheCorruptError, match=rf"{tmp_path}/journal: .*at byte \d+"):
            journal(tmp_path / "journal", bytes(content)).read()
        content[at] ^= 1 << at % 8
    content[last_newline] ^= 1
    state = journal(tmp_path / "journal", bytes(content))
    state.read()
    assert state.incomplete_nbytes == len(lines[-1]) + len(lines[-2])


def test_a_journal_that_shrinks_while_it_is_used_is_told(tmp_path: Path, lines: list[bytes]) -> None:
    state = journal(tmp_path / "journal", b"".join(lines))
    state.read()
    (tmp_path / "journal").write_bytes(lines[0])
    with pytest.raises(CacheCorruptError, match=f"{tmp_path}/journal: "):
        state.read()


def test_the_journal_of_another_cache_is_refused(tmp_path: Path) -> None:
    state = journal(tmp_path / "journal", begin_line(LAYOUT, "ff" * 32, FILES))
    with pytest.raises(CacheCorruptError, match="fingerprint abab.*ffff"):
        state.read()
    other = Layout.of(SPEC, frames=90, shard_frames=32)
    state = journal(tmp_path / "journal", begin_line(other, FINGERPRINT, FILES))
    with pytest.raises(CacheCorruptError, match="shard_frames 16.*32"):
        state.read()


RECORD = commit(1).to_dict()


@pytest.mark.parametrize(
    "record",
    [
        RECORD | {"record": "other"},
        RECORD | {"shard": 6},
        RECORD | {"shard": -1},
        RECORD | {"shard": True},
        RECORD | {"shard": 1.0},
        RECORD | {"shard": 10**300},
        RECORD | {"shard": float("nan")},
        RECORD | {"rows": [[16, 10**300]]},
        RECORD | {"rows": [[-(10**300), 32]]},
        RECORD | {"rows": [[16, float("nan")]]},
        RECORD | {"rows": {"16": 32}},
        RECORD | {"bytes": [10**300] * 5},
        RECORD | {"bytes": [-1] * 5},
        RECORD | {"bytes": [float("inf")] * 5},
        RECORD | {"sha256": [7] * 5},
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
    line = with_checksum(json.dumps(record).encode())
    with pytest.raises((CacheFormatError, CacheCorruptError), match="journal: expected"):
        journal(tmp_path / "journal", lines[0] + line + lines[1]).read()


def with_checksum(record: bytes) -> bytes:
    content = record[:-1]
    return content + b',"crc32c":"%08x"}\n' % google_crc32c.value(content)


@pytest.mark.parametrize(
    "value", [b"[" * 100_000 + b"]" * 100_000, b"9" * 5000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000]
)
def test_a_record_that_json_cannot_read_is_refused(tmp_path: Path, lines: list[bytes], value: bytes) -> None:
    line = with_checksum(b'{"record":"commit","shard":' + value + b"}")
    with pytest.raises(CacheFormatError, match="journal: expected") as caught:
        journal(tmp_path / "journal", lines[0] + line).read()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change",
    [{"m2": [-1.0] * 6}, {"count": 10**300}, {"count": 0}, {"mean": [1e300] * 6}, {"saturated": -1}, {"mean": None}],
)
def test_statistics_that_no_values_have_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    record = json.loads(json.dumps(RECORD))
    record["statistics"][SPEC.camera_keys[0]]["ray"] |= change
    line = with_checksum(json.dumps(record).encode())
    state = journal(tmp_path / "journal", begin_line(LAYOUT, FINGERPRINT, FILES) + line)
    state.read()
    with pytest.raises(CacheFormatError, match="statistics of ray"):
        state.statistics()


@pytest.mark.parametrize(
    "files",
    [
        {"x": [-1, "cd" * 32]},
        {"x": [10**300, "cd" * 32]},
        {"x": [1.0, "cd" * 32]},
        {"x": [True, "cd" * 32]},
        {"x": [1, "cd" * 31]},
        {"x": [1, "../" * 21 + "x"]},
        {"x": [1, 7]},
        {"x": [1]},
        {"x": None},
        [],
        None,
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, files: object) -> None:
    record = json.loads(begin_line(LAYOUT, FINGERPRINT, FILES)) | {"files": files}
    del record["crc32c"]
    with pytest.raises(CacheFormatError, match="journal: expected"):
        journal(tmp_path / "journal", with_checksum(json.dumps(record).encode())).read()
