"""`geomcache verify` finds what a hex editor did, names it, and its repair makes extraction do just that again."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import Problem, VerifyReport, require_intact, verify
from geomcache.cli import main as cli
from geomcache.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError, UserInputError
from geomcache.training.trainer import train
from tests.support.cli import call
from tests.support.stores import CAMERAS, expected, fill, make_maps, make_spec, make_store, open_writer

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


# What was done to the cache, the file that is named, the rows that are, and what the line says.
SHARD = f"{RAY}/c.1.0.0.0"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, tuple[tuple[int, int], ...], str]] = {
    "a bit of a map": (
        lambda path: flip(path / SHARD, 3 * RAY_STRIDE + 9, 5),
        SHARD,
        ((19, 20),),
        "expected sha256 .*, found .*: episode 0 frame 19$",
    ),
    "bits of two maps": (
        lambda path: [flip(path / SHARD, at * RAY_STRIDE) for at in (2, 5)],
        SHARD,
        ((18, 19), (21, 22)),
        "2 frames from episode 0 frame 18 to episode 1 frame 1$",
    ),
    "a bit of a map's own checksum": (
        lambda path: flip(path / SHARD, RAY_STRIDE - 1),
        SHARD,
        (),
        "no frame, but a checksum that other readers use$",
    ),
    "a bit of the index": (lambda path: flip(path / SHARD, -30), SHARD, ((16, 32),), "16 frames from episode 0"),
    "a bit of the checksums": (
        lambda path: flip(path / "frame_crc32c/c.5.0", 7),
        "frame_crc32c/c.5.0",
        ((80, 90),),
        "10 frames from episode 3 frame 5",
    ),
    "a shard missing": (lambda path: (path / SHARD).unlink(), SHARD, ((16, 32),), "expected the file, found none"),
    "a shard cut off": (
        lambda path: (path / SHARD).write_bytes(b"x" * 77),
        SHARD,
        ((16, 32),),
        "expected 2628 bytes, found 77",
    ),
    "a shard of no byte": (lambda path: (path / SHARD).write_bytes(b""), SHARD, ((16, 32),), "2628 bytes, found 0"),
    "two frames swapped": (swap_frames, SHARD, ((16, 18),), "2 frames from episode 0 frame 16 to episode 0 frame 17$"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("sealed", [True, False])
def test_damage_is_named_and_repaired(path: Path, original: Path, name: str, sealed: bool) -> None:
    damage, file, rows, message = DAMAGES[name]
    if not sealed:
        (path / "manifest.json").unlink()
    damage(path)
    report = verify(path)
    (problem,) = (each for each in report.problems if each.shard is not None)
    shard = int(file.split("/c.")[1].split(".")[0])
    assert (problem.file, problem.shard, problem.rows) == (file, shard, rows)
    assert problem.message.startswith(f"{path / file}: expected")
    assert re.search(message, problem.message), problem.message
    assert [each.file for each in report.problems if each is not problem] == ([] if sealed else ["manifest.json"])
    assert report == verify(path)  # nothing was changed
    assert_repaired(path, original, {shard})


def assert_repaired(path: Path, original: Path, shards: set[int]) -> None:
    """Repair gives up these shards, the next writer makes them alone, and the cache is the original again."""
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
        *((shard, "frame_crc32c") for shard in (1, 2)),
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
    assert report.repairs == (f"{path / 'manifest.json'}: made again from the journal",)
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
def test_files_beside_the_shards_are_checked_and_the_shards_nevertheless(path: Path, name: str, damage: str) -> None:
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
        assert "dropped 16 frames of episodes 0:2" in verify(path, repair=True).repairs[0]
    else:
        assert "nothing was repaired" in verify(path, repair=True).repairs[0]
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_changed_attributes_are_told_before_anything_else(path: Path) -> None:
    content = (path / "zarr.json").read_bytes()
    (path / "zarr.json").write_bytes(content.replace(b'"fps": 10', b'"fps": 11'))
    (problem,) = verify(path).problems
    assert problem.file == "zarr.json"
    assert "fingerprint" in problem.message
    assert "nothing was repaired" in verify(path, repair=True).repairs[0]
    (path / "zarr.json").write_bytes(content[:-5])
    with pytest.raises(CacheFormatError, match=r"zarr.json: expected a Zarr group"):
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
    zarr.open_group(path, mode="r+")["frame_index"][30] = 29
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
    assert "row 30: expected episode 1 frame 10 in the coordinates" in problem.message
    assert "found episode 1 frame 29" in problem.message


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_journal_that_lost_its_last_line_beside_a_seal_is_damage_and_no_torn_append(path: Path, damage: str) -> None:
    """A writer that took it for one would forget a shard that is there."""
    journal = path / "journal.jsonl"
    content = journal.read_bytes()
    if damage == "flip":
        flip(journal, -40)
    else:
        journal.write_bytes(content[: content.rstrip(b"\n").rindex(b"\n") + 1])
    changed = journal.read_bytes()
    with pytest.raises(CacheCorruptError, match="journal.jsonl: expected"):
        open_writer(path, [(0, 1)])
    files = [problem.file for problem in verify(path).problems]
    assert files == ["journal.jsonl"] * (damage == "flip") + ["manifest.json"]
    assert "nothing was repaired" in verify(path, repair=True).repairs[0]
    assert journal.read_bytes() == changed
    assert GeometryStore.open(path).frames_present == 90


def test_missing_rows_are_told(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open_writer(path) as writer:
        fill(writer, 3)
    report = verify(path)
    assert (report.sealed, report.frames) == (False, 48)
    assert ["found none: give the extract command" in problem.message for problem in report.problems] == [True]
    assert verify(path, repair=True).repairs == ()
    assert not any("--repair" in line for line in report.lines())  # it could do nothing
    part = make_store(tmp_path / "part", [(0, 20), (50, 60)])
    (problem,) = verify(part).problems
    assert "episode 2: expected all of its 25 frames or none, found 10" in problem.message
    assert verify(make_store(tmp_path / "some", [EVERY_EPISODE[0], EVERY_EPISODE[3]])).problems == ()


def test_a_dropped_shard_is_told_until_it_is_made_again(path: Path) -> None:
    (path / RAY / "c.2.0.0.0").unlink()
    verify(path, repair=True)
    messages = [problem.message for problem in verify(path).problems]
    assert len(messages) == 2
    assert "found none: give the extract command" in messages[0]
    assert "shard 2: expected 16 frames, found that they were dropped" in messages[1]


def test_a_shard_in_another_hand_is_left_alone(path: Path) -> None:
    with open_writer(path) as writer:
        flip(path / RAY / "c.1.0.0.0", 0)
        assert writer._lock.claim(1)
        report = verify(path, repair=True)
        assert report.repairs == ("shard 1 was not dropped: another process has it, or has made it again",)
        assert GeometryStore.open(path).sealed
        writer._lock.release(1)
        files = writer._journal.commits[1].files
        assert not writer.drop(1, replace(files, digests=(b"\0" * 32, *files.digests[1:])), "made again")
        assert writer.drop(1, files, "damaged")
        assert not writer.drop(1, files, "twice")


def test_a_file_that_cannot_be_read_is_told(path: Path) -> None:
    (path / RAY / "c.1.0.0.0").unlink()
    (path / RAY / "c.1.0.0.0").mkdir()
    (problem,) = verify(path).problems
    assert problem.shard == 1
    assert problem.rows == ((16, 32),)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match="expected a cache, found nothing"):
        verify(tmp_path / "none")
    with pytest.raises(CacheFormatError, match=r"expected a cache, found no zarr.json"):
        verify(tmp_path)


def test_a_hostile_size_does_not_make_a_hostile_list(path: Path) -> None:
    """Attributes that promise 2^40 frames, with a fingerprint and a journal that agree: few lines, little memory."""
    from dataclasses import replace

    from geomcache.cache.header import Header
    from geomcache.cache.journal import begin_line

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
    assert lines[100] == "... and 150 more: --json lists all"
    assert "250 found wrong" in lines[101]
    assert lines[102].endswith("--repair")
    assert len(report.to_dict()["problems"]) == 250


def test_the_command_line(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "verify", path) == 0
    assert "90 frames in 6 shards" in capsys.readouterr().out
    flip(path / RAY / "c.1.0.0.0", 3 * RAY_STRIDE)
    assert call(monkeypatch, "verify", path) == cli.EXIT_DAMAGE
    out = capsys.readouterr().out.splitlines()
    assert "episode 0 frame 19" in out[0]
    assert out[-1] == f"to mend what can be mended: geomcache verify {path} --repair"
    assert call(monkeypatch, "verify", path, "--json") == cli.EXIT_DAMAGE
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"][0]["rows"] == [[19, 20]]
    assert call(monkeypatch, "verify", path, "--repair") == cli.EXIT_DAMAGE
    assert "dropped 16 frames of episodes 0:2" in capsys.readouterr().out
    assert call(monkeypatch, "verify", path.parent / "none") == cli.EXIT_USER_ERROR
    assert call(monkeypatch, "verify", path, "--device", "cpu") == cli.EXIT_USER_ERROR
    assert "--device: expected none without --parity" in capsys.readouterr().err
    assert call(monkeypatch, "verify", path, "--parity", "3", "--repair") == cli.EXIT_USER_ERROR
    assert "--repair: expected none with --parity" in capsys.readouterr().err


def test_training_can_verify_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(path / RAY / "c.1.0.0.0", 3 * RAY_STRIDE)
    with pytest.raises(CacheCorruptError, match=r"found 1 problems: list them with .*episode 0 frame 19"):
        train(path, ["--steps=1"], verify=True)

    def parsed(_args: object) -> None:
        raise UserInputError("the options are parsed")

    monkeypatch.setattr("geomcache.training.trainer.parse_config", parsed)
    with pytest.raises(UserInputError, match="parsed"):
        train(path, [])
    monkeypatch.setenv("RANK", "1")  # one process reads it for all
    with pytest.raises(UserInputError, match="parsed"):
        train(path, [], verify=True)


def test_repaired_rows_hold_what_is_made_again(path: Path) -> None:
    """Not the old numbers: what a repaired cache gives comes from the new files."""
    flip(path / RAY / "c.1.0.0.0", 0)
    verify(path, repair=True)
    with open_writer(path) as writer:
        claim = writer.claim()
        assert claim is not None
        maps = make_maps(SPEC, range(16, 32))
        maps[CAMERAS[1]]["ray"] = maps[CAMERAS[1]]["ray"] + np.float16(1)
        writer.commit(claim, maps)
        assert writer.seal()
    wanted = expected(SPEC, [19])["ray"]
    wanted[:, 1] += np.float16(1)
    assert np.array_equal(GeometryStore.open(path).batch([19]).ray, wanted)
