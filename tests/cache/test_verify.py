"""`geomcache verify` finds and names what a hex editor did, and its repair makes extraction redo just that."""

import errno
import hashlib
import json
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from geomcache.cache.check import CacheCheck, Problem
from geomcache.cache.header import Header
from geomcache.cache.journal import begin_line
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import VerifyReport, require_intact, verify
from geomcache.cli import main as cli
from geomcache.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError, UserInputError
from geomcache.training.trainer import train
from tests.support.cli import call
from tests.support.stores import (
    CAMERAS,
    commit,
    expected,
    fill,
    make_dataset_spec,
    make_maps,
    make_spec,
    make_store,
    open_writer,
)

SPEC = make_spec()
RAY = f"{CAMERAS[1]}/ray"
RAY_STRIDE = 3 * 4 * 6 * 2 + 4
EVERY_EPISODE = ((0, 20), (20, 50), (50, 75), (75, 90))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 frames in five shards of 16 and one of 10."""
    return make_store(tmp_path_factory.mktemp("verify") / "cache")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "cache")


def flip(file: Path, at: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def flip_two(file: Path, one: int, other: int) -> None:
    flip(file, one)
    flip(file, other)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def files_of(path: Path, shard: int) -> list[Path]:
    return sorted(file for file in path.rglob(f"c.{shard}.0*") if "episode" not in str(file))


def swap_shards(path: Path) -> None:
    for one, other in zip(files_of(path, 1), files_of(path, 2), strict=True):
        swap(one, other)


def swap_frames(path: Path) -> None:
    """Two frames of a file change places with their own checksums."""
    file = path / RAY / "c.1.0.0.0"
    content = file.read_bytes()
    first, second = content[:RAY_STRIDE], content[RAY_STRIDE : 2 * RAY_STRIDE]
    file.write_bytes(second + first + content[2 * RAY_STRIDE :])


def test_a_whole_cache_is_found_whole(original: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in original.rglob("*")}
    report = verify(original, repair=True)
    assert (report.sealed, report.frames, report.shards, report.problems, report.repairs) == (True, 90, 6, (), ())
    assert report.nbytes == sum(file.stat().st_size for shard in range(6) for file in files_of(original, shard))
    assert before == {file: file.stat().st_mtime_ns for file in original.rglob("*")}
    require_intact(original)


# What was done to the cache, the file that is named, the rows that are, and values in the message.
SHARD = f"{RAY}/c.1.0.0.0"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, tuple[tuple[int, int], ...], tuple[str, ...]]] = {
    "a bit of a map": (
        lambda path: flip(path / SHARD, 3 * RAY_STRIDE + 9, 5),
        SHARD,
        ((19, 20),),
        ("sha256", "episode 0 frame 19"),
    ),
    "bits of two maps": (
        lambda path: flip_two(path / SHARD, 2 * RAY_STRIDE, 5 * RAY_STRIDE),
        SHARD,
        ((18, 19), (21, 22)),
        ("2 frames", "episode 0 frame 18", "episode 1 frame 1"),
    ),
    "a bit of a map's own checksum": (lambda path: flip(path / SHARD, RAY_STRIDE - 1), SHARD, (), ("sha256",)),
    "a bit of the index": (
        lambda path: flip(path / SHARD, -30),
        SHARD,
        ((16, 32),),
        ("16 frames", "episode 0 frame 16", "episode 1 frame 11"),
    ),
    "a bit of the checksums": (
        lambda path: flip(path / "frame_crc32c/c.5.0", 7),
        "frame_crc32c/c.5.0",
        ((80, 90),),
        ("10 frames", "episode 3 frame 5", "episode 3 frame 14"),
    ),
    "a shard missing": (lambda path: (path / SHARD).unlink(), SHARD, ((16, 32),), ("none", "16 frames")),
    "a shard cut off": (
        lambda path: (path / SHARD).write_bytes(b"x" * 77),
        SHARD,
        ((16, 32),),
        ("2628 bytes", "77"),
    ),
    "a shard of no byte": (lambda path: (path / SHARD).write_bytes(b""), SHARD, ((16, 32),), ("2628 bytes", "0")),
    "two frames swapped": (
        swap_frames,
        SHARD,
        ((16, 18),),
        ("2 frames", "episode 0 frame 16", "episode 0 frame 17"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("sealed", [True, False])
def test_damage_is_named_and_repaired(path: Path, original: Path, name: str, sealed: bool) -> None:
    damage, file, rows, values = DAMAGES[name]
    if not sealed:
        (path / "manifest.json").unlink()
    damage(path)
    report = verify(path)
    (problem,) = (each for each in report.problems if each.shard is not None)
    shard = int(file.split("/c.")[1].split(".")[0])
    assert (problem.file, problem.shard, problem.rows) == (file, shard, rows)
    assert problem.message.startswith(f"{path / file}: ")
    assert [value for value in values if value not in problem.message] == []
    assert [each.file for each in report.problems if each is not problem] == ([] if sealed else ["manifest.json"])
    assert report == verify(path)  # nothing was changed
    assert_repaired(path, original, {shard})


def assert_repaired(path: Path, original: Path, shards: set[int]) -> None:
    """Repair drops these shards, the next writer makes them alone, and the cache is the original again."""
    lines = " ".join(verify(path, repair=True).repairs)
    assert "geomcache extract --model made-up" in lines
    store = GeometryStore.open(path)
    dropped = {row for row in range(90) if row // 16 in shards}
    assert {row for start, stop in store.rows for row in range(start, stop)} == {*range(90)} - dropped
    assert not store.sealed
    with open_writer(path, [(0, 1)]) as writer:  # whatever it was asked for
        assert writer.pending() == tuple(sorted(shards))
        assert set(fill(writer)) == shards
        assert writer.seal()
    for file in original.rglob("*"):
        if file.is_file() and file.name != "journal.jsonl":
            assert file.read_bytes() == (path / file.relative_to(original)).read_bytes()
    assert verify(path).problems == ()


def test_shards_and_cameras_that_change_places_are_found(path: Path, original: Path) -> None:
    swap_shards(path)
    swap(path / CAMERAS[0] / "ray/c.4.0.0.0", path / RAY / "c.4.0.0.0")
    report = verify(path)
    assert {(problem.shard, problem.file.partition("/c.")[0]) for problem in report.problems} == {
        *((shard, f"{camera}/{output}") for shard in (1, 2) for camera in CAMERAS for output in SPEC.outputs),
        *((shard, table) for shard in (1, 2) for table in ("frame_crc32c", "picture_hash", "picture_means")),
        *((4, f"{camera}/ray") for camera in CAMERAS),
    }
    assert_repaired(path, original, {1, 2, 4})


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_manifest_is_made_again_from_the_journal(path: Path, original: Path, damage: str) -> None:
    content = (original / "manifest.json").read_bytes()
    damaged = {"flip": content.replace(b"ray", b"rax"), "cut": content[:-40], "empty": b""}[damage]
    (path / "manifest.json").write_bytes(damaged)
    report = verify(path, repair=True)
    assert [problem.file for problem in report.problems] == ["manifest.json"]
    assert len(report.repairs) == 1
    assert str(path / "manifest.json") in report.repairs[0]
    assert (path / "manifest.json").read_bytes() == content
    assert verify(path).problems == ()


def test_a_manifest_that_contradicts_the_journal_is_told(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    content = content[: content.index(b',\n"sha256"')]
    digest = hashlib.sha256((path / RAY / "c.1.0.0.0").read_bytes()).hexdigest().encode()
    content = content.replace(digest, b"00" * 32)
    seal = hashlib.sha256(content).hexdigest().encode()
    (path / "manifest.json").write_bytes(content + b',\n"sha256":"%s"\n}\n' % seal)
    assert [problem.file for problem in verify(path).problems] == ["manifest.json", f"{RAY}/c.1.0.0.0"]


@pytest.mark.parametrize(
    "name",
    ["journal.jsonl", "frame_index/c.0", "episode_index/c.0", "episodes/length/c.0", "episodes/start/c.0",
     f"{RAY}/zarr.json", "frame_index/zarr.json", f"{CAMERAS[0]}/zarr.json"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_other_files_are_checked_and_the_shards_as_well(path: Path, name: str, damage: str) -> None:
    if damage == "flip":
        flip(path / name, 17)
    else:
        (path / name).unlink()
    flip(path / RAY / "c.1.0.0.0", 3 * RAY_STRIDE)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    report = verify(path)
    assert [problem.file for problem in report.problems] == [name, f"{RAY}/c.1.0.0.0"]
    assert str(path / name) in report.problems[0].message
    assert report.problems[1].rows == ((19, 20),)
    if "_index/c" in name:  # no reader of ours needs them: the shards can be repaired
        line, command = verify(path, repair=True).repairs
        assert "16 frames of episodes 0:2;" in line
        assert "geomcache extract" in command
    else:
        assert len(verify(path, repair=True).repairs) == 1
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_changed_attributes_are_told_before_anything_else(path: Path) -> None:
    content = (path / "zarr.json").read_bytes()
    (path / "zarr.json").write_bytes(content.replace(b'"fps": 10', b'"fps": 11'))
    (problem,) = verify(path).problems
    assert problem.file == "zarr.json"
    assert "fingerprint" in problem.message
    assert len(verify(path, repair=True).repairs) == 1
    (path / "zarr.json").write_bytes(content[:-5])
    with pytest.raises(CacheFormatError, match=re.escape(str(path / "zarr.json"))):
        verify(path)


def test_statistics_that_were_changed_are_made_again(path: Path, original: Path) -> None:
    content = (path / "zarr.json").read_bytes()
    count = str(90 * 12 * 2).encode()
    assert count in content
    (path / "zarr.json").write_bytes(content.replace(count, b"7"))
    assert [problem.file for problem in verify(path, repair=True).problems] == ["zarr.json"]
    assert (path / "zarr.json").read_bytes() == content
    assert verify(path).problems == ()


def test_coordinates_that_contradict_the_episode_table_are_told(tmp_path: Path) -> None:
    """Wrong from the beginning, so that every hash agrees."""
    path = tmp_path / "cache"
    open_writer(path).close()
    group: Any = zarr.open_group(path, mode="r+")
    group["frame_index"][30] = 29
    lines = (path / "journal.jsonl").read_bytes().split(b"\n")
    begin = json.loads(lines[0])
    del begin["crc32c"]
    content = (path / "frame_index/c.0").read_bytes()
    begin["files"]["frame_index/c.0"] = [len(content), hashlib.sha256(content).hexdigest()]
    text = json.dumps(begin, sort_keys=True, separators=(",", ":")).encode()[:-1]
    (path / "journal.jsonl").write_bytes(text + b',"crc32c":"%08x"}\n' % google_crc32c.value(text))
    with open_writer(path) as writer:
        fill(writer)
        assert writer.seal()
    (problem,) = verify(path).problems
    assert problem.file == "episode_index"
    for value in ("row 30", "episode 1 frame 10", "episode 1 frame 29"):
        assert value in problem.message


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_journal_of_a_sealed_cache_that_lost_its_last_line_is_damaged_and_not_interrupted(
    path: Path, damage: str
) -> None:
    """A writer that took it for one would forget a shard that is there."""
    journal = path / "journal.jsonl"
    content = journal.read_bytes()
    if damage == "flip":
        flip(journal, -40)
    else:
        journal.write_bytes(content[: content.rstrip(b"\n").rindex(b"\n") + 1])
    changed = journal.read_bytes()
    with pytest.raises(CacheCorruptError, match=re.escape(str(journal))):
        open_writer(path, [(0, 1)])
    files = [problem.file for problem in verify(path).problems]
    assert files == ["journal.jsonl"] * (damage == "flip") + ["manifest.json"]
    assert len(verify(path, repair=True).repairs) == 1
    assert journal.read_bytes() == changed
    assert GeometryStore.open(path).frames_present == 90


def test_missing_rows_are_told(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open_writer(path) as writer:
        fill(writer, 3)
    report = verify(path)
    assert (report.sealed, report.frames) == (False, 48)
    assert [problem.file for problem in report.problems] == ["manifest.json"]
    assert verify(path, repair=True).repairs == ()
    assert not any("--repair" in line for line in report.lines())  # it could do nothing
    part = make_store(tmp_path / "part", [(0, 20), (50, 60)])
    (problem,) = verify(part).problems
    assert problem.file == "manifest.json"
    for value in ("episode 2:", "25 frames", "found 10"):
        assert value in problem.message
    assert verify(make_store(tmp_path / "some", [EVERY_EPISODE[0], EVERY_EPISODE[3]])).problems == ()


def test_a_dropped_shard_is_told_until_it_is_made_again(path: Path) -> None:
    (path / RAY / "c.2.0.0.0").unlink()
    verify(path, repair=True)
    problems = verify(path).problems
    assert [problem.file for problem in problems] == ["manifest.json", "journal.jsonl"]
    assert "shard 2: expected 16 frames" in problems[1].message


def test_a_shard_that_another_process_has_is_left_alone(path: Path) -> None:
    with open_writer(path) as writer:
        flip(path / RAY / "c.1.0.0.0", 0)
        assert writer._lock.claim(1)
        report = verify(path, repair=True)
        assert ["shard 1 " in line for line in report.repairs] == [True]
        assert GeometryStore.open(path).sealed
        writer._lock.release(1)
        files = writer._journal.commits[1].files
        assert not writer.drop(1, replace(files, digests=(b"\0" * 32, *files.digests[1:])), "made again")
        assert writer.drop(1, files, "damaged")
        assert not writer.drop(1, files, "twice")


def test_a_folder_in_the_place_of_a_shard_is_damage(path: Path, original: Path) -> None:
    (path / RAY / "c.1.0.0.0").unlink()
    (path / RAY / "c.1.0.0.0").mkdir()
    (problem,) = verify(path).problems
    assert problem.shard == 1
    assert problem.rows == ((16, 32),)
    assert_repaired(path, original, {1})


class FailingReads:
    """Makes reads of one file fail, so many times."""

    def __init__(self, patch: pytest.MonkeyPatch, file: Path, code: int, times: int) -> None:
        self.left = times
        read_bytes = Path.read_bytes

        def failing(path: Path) -> bytes:
            if path == file and self.left:
                self.left -= 1
                raise OSError(code, os.strerror(code), str(path))
            return read_bytes(path)

        patch.setattr(Path, "read_bytes", failing)
        patch.setattr("geomcache.cache.check._SECOND_READ_S", 0)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("name", [SHARD, "frame_crc32c/c.1.0"])
def test_a_read_that_fails_once_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str) -> None:
    reads = FailingReads(monkeypatch, path / name, code, 1)
    report = verify(path, repair=True)
    assert reads.left == 0
    assert (report.problems, report.repairs, report.sealed) == ((), (), True)
    require_intact(path)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ETIMEDOUT])
def test_a_shard_that_cannot_be_read_now_is_told_and_not_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Too many open files, or a server that does not answer, say nothing about the shard's bytes."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        FailingReads(patch, path / SHARD, code, 1000)
        report = verify(path, repair=True)
    (problem,) = report.problems
    assert (problem.file, problem.shard, problem.rows, problem.repairable) == (SHARD, 1, ((16, 32),), False)
    assert os.strerror(code) in problem.message
    assert ["1 shard" in line for line in report.repairs] == [True]
    assert not any("--repair" in line for line in replace(report, repairs=()).lines())
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert verify(path).problems == ()


def test_a_disk_error_that_a_second_read_confirms_is_damage(
    path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        FailingReads(patch, path / SHARD, errno.EIO, 2)
        (problem,) = verify(path).problems
        assert (problem.file, problem.repairable) == (SHARD, True)
        FailingReads(patch, path / SHARD, errno.EIO, 1000)
        verify(path, repair=True)
    assert (path / f"{SHARD}.dropped").read_bytes() == (original / SHARD).read_bytes()  # what the disk still gives
    with open_writer(path, [(0, 1)]) as writer:
        assert fill(writer) == [1]
        assert writer.seal()
    assert verify(path).problems == ()


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match="none"):
        verify(tmp_path / "none")
    with pytest.raises(CacheFormatError, match=re.escape(str(tmp_path))):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("environment", "shards"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"RANK": "1"}, {0, 1, 2, 3, 4, 5}),  # exported by hand: this process is alone
        ({"RANK": "1", "WORLD_SIZE": "2"}, {0, 1, 2, 3, 4, 5}),
        ({"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, {1, 5}),
        ({"RANK": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, {0, 1, 2, 3, 4, 5}),  # one a machine
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, {0, 1, 2, 3, 4, 5}),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "2"}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_the_processes_of_a_run_check_each_shard_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], shards: set[int]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    caught = set()
    for shard in range(6):
        file = path / RAY / f"c.{shard}.0.0.0"
        flip(file, 0)
        try:
            require_intact(path)
        except CacheCorruptError as error:
            assert str(file) in str(error)
            caught.add(shard)
        flip(file, 0)
    assert caught == shards
    flip(path / "journal.jsonl", 40)  # every process checks all other files
    with pytest.raises(CacheCorruptError):
        require_intact(path)


@pytest.mark.parametrize("name", ["episode_index", "frame_index", "frame_crc32c", "episodes/length", RAY])
def test_a_shape_that_contradicts_the_attributes_is_told_and_not_believed(path: Path, name: str) -> None:
    """With hashes that fit: reading 2^44 coordinates would take days."""
    metadata = path / name / "zarr.json"
    old = metadata.read_bytes()
    stated = json.loads(old)
    stated["shape"][0] = 1 << 44
    metadata.write_bytes(json.dumps(stated).encode())
    new = metadata.read_bytes()

    def rehash(files: dict[str, Any]) -> None:
        assert files[f"{name}/zarr.json"] == [len(old), hashlib.sha256(old).hexdigest()]
        files[f"{name}/zarr.json"] = [len(new), hashlib.sha256(new).hexdigest()]

    reseal(path, rehash)
    (problem,) = verify(path).problems
    assert problem.file == f"{name}/zarr.json"
    assert str(1 << 44) in problem.message
    assert not problem.repairable


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what manifest and journal record of the files other than shards, with checksums that fit."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    change(manifest["files"])
    text = json.dumps(manifest).encode()[:-1]
    seal = hashlib.sha256(text).hexdigest().encode()
    (path / "manifest.json").write_bytes(text + b',\n"sha256":"%s"\n}\n' % seal)
    first, *lines = (path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    begin = json.loads(first)
    del begin["crc32c"]
    change(begin["files"])
    text = json.dumps(begin, sort_keys=True, separators=(",", ":")).encode()[:-1]
    begin_line = text + b',"crc32c":"%08x"}\n' % google_crc32c.value(text)
    (path / "journal.jsonl").write_bytes(begin_line + b"".join(lines))


@pytest.mark.parametrize("content", ["bomb", "short", "garbage", "unchecked"])
def test_coordinates_that_are_no_chunk_are_told_and_take_no_memory(path: Path, content: str) -> None:
    """A few kilobytes of zstd can say that they are 256 MiB, and be that."""
    from numcodecs.zstd import Zstd

    size = {"bomb": 256 << 20, "short": 8 * 89}.get(content, 8 * 90)
    packed = Zstd(level=3).encode(bytes(size))
    frame = b"garbage" if content == "garbage" else packed
    checksum = google_crc32c.value(frame) ^ (content == "unchecked")
    new = frame + checksum.to_bytes(4, "little")
    file = path / "frame_index/c.0"
    file.write_bytes(new)
    reseal(path, lambda files: files.update({"frame_index/c.0": [len(new), hashlib.sha256(new).hexdigest()]}))
    tracemalloc.start()
    try:
        (problem,) = verify(path).problems
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert problem.file == "episode_index"


@pytest.mark.parametrize(
    ("present", "cut"),
    [
        (((0, 4096),), False),  # ends where a shard of 16 does
        (((0, 4097),), True),
        (((5, 32),), False),  # the episode begins at 5
        (((16, 32), (48, (1 << 40) + 5)), False),
        (((16, 32), (49, (1 << 40) + 5)), True),
    ],
)
def test_an_episode_of_2_to_the_40_frames_is_not_walked_through(
    tmp_path: Path, present: tuple[tuple[int, int], ...], cut: bool
) -> None:
    """Shard by shard that would take days."""
    check = CacheCheck(tmp_path)
    check.header = Header.new(make_spec(), make_dataset_spec())
    assert check.header.shard_frames == 16
    start, stop = 5, (1 << 40) + 5
    clipped = tuple((max(first, start), min(last, stop)) for first, last in present)
    assert check._is_cut_within_a_shard(clipped, start, stop) == cut


def test_a_hostile_size_does_not_make_a_hostile_list(path: Path) -> None:
    """Attributes that promise 2^40 frames, with a fingerprint and a journal that agree: few lines, little memory."""
    header = Header.read(path)
    header = replace(header, dataset=replace(header.dataset, frames=1 << 40))
    (path / "zarr.json").write_bytes(header.encode())
    (path / "manifest.json").unlink()
    (path / "journal.jsonl").write_bytes(begin_line(header.layout, header.fingerprint, {"zarr.json": (1, "0")}))
    report = verify(path)
    assert 1 < len(report.problems) < 10


def test_a_long_list_is_cut_and_says_so(tmp_path: Path) -> None:
    problems = tuple(Problem(file=str(n), message=f"line {n}", shard=n, repairable=True) for n in range(250))
    report = VerifyReport(path=tmp_path, sealed=True, frames=1, shards=1, nbytes=1, problems=problems)
    lines = [*report.lines()]
    assert lines[:2] == ["line 0", "line 1"]
    assert " 150 more" in lines[100]
    assert "250 problems" in lines[101]
    assert lines[102].endswith("--repair")
    assert len(report.to_dict()["problems"]) == 250


def test_the_command_line(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "verify", path) == 0
    assert "90 frames in 6 shards" in capsys.readouterr().out
    flip(path / RAY / "c.1.0.0.0", 3 * RAY_STRIDE)
    assert call(monkeypatch, "verify", path) == cli.EXIT_DAMAGE
    out = capsys.readouterr().out.splitlines()
    assert "episode 0 frame 19" in out[0]
    assert out[-1].endswith(f"geomcache verify {path} --repair")
    assert call(monkeypatch, "verify", path, "--json") == cli.EXIT_DAMAGE
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"][0]["rows"] == [[19, 20]]
    assert call(monkeypatch, "verify", path, "--repair") == cli.EXIT_DAMAGE
    assert "16 frames of episodes 0:2;" in capsys.readouterr().out
    assert call(monkeypatch, "verify", path.parent / "none") == cli.EXIT_USER_ERROR
    assert call(monkeypatch, "verify", path, "--device", "cpu") == cli.EXIT_USER_ERROR
    assert "--device" in capsys.readouterr().err
    assert call(monkeypatch, "verify", path, "--parity", "3", "--repair") == cli.EXIT_USER_ERROR
    assert "--repair" in capsys.readouterr().err


def test_training_can_verify_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(path / RAY / "c.1.0.0.0", 3 * RAY_STRIDE)
    with pytest.raises(CacheCorruptError, match=r"`geomcache verify .*episode 0 frame 19"):
        train(path, ["--steps=1"], verify=True)

    def parsed(_args: object) -> None:
        raise UserInputError("the options are parsed")

    monkeypatch.setattr("geomcache.training.trainer.parse_config", parsed)
    with pytest.raises(UserInputError, match="parsed"):
        train(path, [])


def test_repaired_rows_hold_what_is_made_again(path: Path) -> None:
    """Not the old numbers: a repaired cache reads the new files."""
    flip(path / RAY / "c.1.0.0.0", 0)
    verify(path, repair=True)
    with open_writer(path) as writer:
        claim = writer.claim()
        assert claim is not None
        maps = make_maps(SPEC, range(16, 32))
        maps[CAMERAS[1]]["ray"] = maps[CAMERAS[1]]["ray"] + np.float16(1)
        commit(writer, claim, maps)
        assert writer.seal()
    wanted = expected(SPEC, [19])["ray"]
    wanted[:, 1] += np.float16(1)
    assert np.array_equal(GeometryStore.open(path).batch([19]).ray, wanted)
