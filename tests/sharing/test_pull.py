"""What `pull` makes at PATH: a whole cache or an honest part of it, every file as its hash says, or nothing."""

import hashlib
import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import zarr

from geomcache import waits
from geomcache.cache import locks
from geomcache.cache.compatibility import require_episodes
from geomcache.cache.journal import encode_line
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import (
    CacheCorruptError,
    CacheExistsError,
    CacheIncompleteError,
    CacheNotFoundError,
    MissingFrameError,
    OutOfSpaceError,
    UserInputError,
)
from geomcache.sharing import draft as drafts
from geomcache.sharing.base import home
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.pull import local_copy, pull
from tests.support.sharing import (
    BEGIN_FILES,
    FILES,
    RAY,
    SHARD_FILES,
    SPEC,
    assert_reads,
    contents,
    make_small_store,
    said,
)
from tests.support.stores import fill, make_store, open_writer

__all__ = ["said"]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A pushed cache, as a folder that an address leads to."""
    place = make_small_store(tmp_path / "there")
    (place / "lock").unlink()
    return place


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "here" / "cache.zarr"


def address_of(folder: Path) -> str:
    return f"file://{folder}"


def reseal(manifest: Path, change: dict[str, str]) -> None:
    """Other text in a manifest, with a checksum that fits."""
    text = manifest.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    body = text[: text.rindex(',\n"sha256"')].encode()
    manifest.write_bytes(body + b',\n"sha256":"%s"\n}\n' % hashlib.sha256(body).hexdigest().encode())


def test_a_whole_cache_comes_byte_for_byte(there: Path, path: Path) -> None:
    report = pull(address_of(there), path)
    assert (report.files, report.fetched, report.frames, report.episodes) == (FILES, FILES, 90, "0:4")
    assert contents(path) == contents(there)
    assert verify(path).problems == ()
    assert [each.name for each in path.parent.iterdir()] == ["cache.zarr"]
    again = pull(address_of(there), path)
    assert (again.fetched, again.nbytes) == (0, 0)
    with open_writer(path, spec=SPEC) as writer:  # what has travelled can be gone on with
        assert writer.pending() == ()


def test_a_part_says_what_it_has_and_grows(there: Path, path: Path) -> None:
    report = pull(address_of(there), path, episodes="1")
    # episode 1 has rows 20 to 49, in shards 1 to 3, whose rows are 16 to 63
    assert report.fetched == BEGIN_FILES + 3 * SHARD_FILES
    assert (report.frames, report.frames_extra, report.episodes) == (48, 18, "1")
    assert "18 of these frames were not asked for" in report.lines()[1]
    assert verify(path).problems == ()
    with GeometryStore.open(path) as store:
        assert store.sealed
        assert store.rows == ((16, 64),)
        assert store.episodes() == ((1, 2),)
        assert store.statistics["ray"].count == 48 * 12
        require_episodes(store, [1])
        with pytest.raises(CacheIncompleteError, match=r"\b2\b"):
            require_episodes(store, [1, 2])
        with pytest.raises(MissingFrameError):
            store.batch([64])
    assert_reads(path, list(range(16, 64)))
    alone: Any = zarr.open_group(path, mode="r").attrs["geomcache"]
    assert alone["statistics"]["pooled"]["ray"]["count"] == 48 * 12

    grown = pull(address_of(there), path, episodes="3")
    assert grown.fetched == 2 * SHARD_FILES  # row 75 to 89: shards 4 and 5
    assert grown.episodes == "1:4"
    assert verify(path).problems == ()
    assert pull(address_of(there), path, episodes="1:3").fetched == 0
    whole = pull(address_of(there), path)
    assert whole.fetched == SHARD_FILES
    assert contents(path) == contents(there)
    assert [each.name for each in path.parent.iterdir()] == ["cache.zarr"]


def test_a_part_is_a_cache_that_extraction_goes_on_with(there: Path, path: Path) -> None:
    pull(address_of(there), path, episodes="1")
    with open_writer(path, spec=SPEC) as writer:
        assert fill(writer) == [0, 4, 5]
        assert writer.seal()
    assert verify(path).problems == ()
    assert_reads(path, list(range(90)))


def test_what_was_interrupted_goes_on(there: Path, path: Path, said: list[str]) -> None:
    name = f"{RAY}/c.4.0.0.0"
    content = (there / name).read_bytes()
    (there / name).unlink()
    with pytest.raises(CacheCorruptError, match=rf"{name}: .* {len(content)} .* none"):
        pull(address_of(there), path)
    draft = path.with_name(".cache.zarr.geomcache-pull")
    assert not path.exists()
    assert draft.is_dir()
    (there / name).write_bytes(content)
    half = f"{RAY}/c.0.0.0.0"  # as a power cut could leave it: right size, other bytes
    (draft / half).parent.mkdir(parents=True, exist_ok=True)
    (draft / half).write_bytes(bytes(len((there / half).read_bytes())))
    (draft / "manifest.json.tmp").write_bytes(b"of a pull that was killed while it finished")
    fetched = pull(address_of(there), path).fetched
    assert fetched < FILES
    assert f"{fetched} of {FILES} files" in said[-1]
    assert f"{FILES - fetched} are there already" in said[-1]
    assert contents(path) == contents(there)
    assert not draft.exists()


@pytest.fixture
def draft(path: Path) -> Path:
    """The folder that a pull to `path` fills: others can know its name."""
    path.parent.mkdir()
    return path.with_name(".cache.zarr.geomcache-pull")


@pytest.mark.parametrize("where", ["the draft", "a folder in it", "a file in it", "its lock"])
def test_a_planted_link_is_not_followed(there: Path, path: Path, draft: Path, tmp_path: Path, where: str) -> None:
    thesis = tmp_path / "home" / "thesis"
    thesis.mkdir(parents=True)
    (thesis / "chapter1.tex").write_text("two years")
    (thesis / "zarr.json").write_text("mine")
    link, target = {
        "the draft": (draft, thesis),
        "a folder in it": (draft / RAY, thesis),
        "a file in it": (draft / "frame_index" / "zarr.json", thesis / "zarr.json"),
        "its lock": (draft / "lock", thesis / "chapter1.tex"),
    }[where]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    with pytest.raises(CacheExistsError, match=str(draft)):
        pull(address_of(there), path)
    assert contents(thesis) == {"chapter1.tex": b"two years", "zarr.json": b"mine"}
    assert link.is_symlink()
    assert not path.exists()


def test_a_folder_of_another_user_is_not_used(
    there: Path, path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft.mkdir()
    if os.geteuid() == 0:
        os.chown(draft, 12345, 12345)
    else:
        real, fields = Path.lstat, [*draft.lstat()]
        fields[stat.ST_UID] = 12345
        monkeypatch.setattr(Path, "lstat", lambda self: os.stat_result(fields) if self == draft else real(self))
    with pytest.raises(CacheExistsError, match="12345"):
        pull(address_of(there), path)
    assert contents(draft) == {}


@pytest.mark.parametrize("name", ["notes.txt", "frame_crc32c/c.99.0", "observation.images.other/ray/c.0.0.0.0"])
def test_files_that_no_pull_of_this_cache_makes_are_not_removed(
    there: Path, path: Path, draft: Path, name: str
) -> None:
    (draft / name).parent.mkdir(parents=True)
    (draft / name).write_bytes(b"mine")
    with pytest.raises(CacheExistsError, match=name):
        pull(address_of(there), path)
    assert contents(draft) == {name: b"mine"}
    (draft / name).unlink()
    assert pull(address_of(there), path).fetched == FILES


def test_files_of_a_larger_pull_that_was_given_up_are_removed(there: Path, path: Path, draft: Path) -> None:
    other = draft / RAY / "c.5.0.0.0"
    other.parent.mkdir(parents=True)
    other.write_bytes((there / RAY / "c.5.0.0.0").read_bytes())
    pull(address_of(there), path, episodes="1")
    assert not (path / RAY / "c.5.0.0.0").exists()
    assert verify(path).problems == ()


def with_size(there: Path, name: str, size: int) -> None:
    """Let manifest and journal say another size, with checksums that fit, and make the file so long."""
    expected = hashlib.sha256((there / name).read_bytes()).hexdigest()
    stored = (there / name).stat().st_size
    reseal(there / "manifest.json", {f'"{name}":[{stored},"{expected}"]': f'"{name}":[{size},"{expected}"]'})
    first, rest = (there / "journal.jsonl").read_bytes().split(b"\n", 1)
    record = json.loads(first)
    del record["crc32c"]
    record["files"][name][0] = size
    (there / "journal.jsonl").write_bytes(encode_line(record) + rest)
    os.truncate(there / name, size)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("episodes/start/c.0", (3 << 30) + 5),
        ("episodes/length/c.0", 8 * 4 + 4 + 1),
        ("episode_index/c.0", 1 << 20),
        ("frame_index/zarr.json", (16 << 20) + 1),
    ],
)
def test_a_size_that_the_header_does_not_allow_is_refused_before_anything_is_read(
    there: Path, path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    with_size(there, name, size)
    fetched: list[str] = []
    fetch = FsspecRemote.fetch

    def counted(self: FsspecRemote, name: str, limit: int, folder: Path) -> bool:
        fetched.append(name)
        return fetch(self, name, limit, folder)

    monkeypatch.setattr(FsspecRemote, "fetch", counted)
    with pytest.raises(CacheCorruptError, match=rf"{name}: .* {size}") as raised:
        pull(address_of(there), path)
    assert str(raised.value).startswith(f"{address_of(there)}/manifest.json: ")
    assert fetched == ["zarr.json", "manifest.json", "journal.jsonl"]
    assert not path.parent.exists()


def test_a_damaged_copy_is_mended(there: Path, path: Path) -> None:
    pull(address_of(there), path)
    name = f"{RAY}/c.2.0.0.0"
    (path / name).write_bytes((path / name).read_bytes()[::-1])
    assert pull(address_of(there), path).fetched == 1
    assert contents(path) == contents(there)


@pytest.mark.parametrize("name", [f"{RAY}/c.2.0.0.0", "frame_crc32c/c.0.0", "episode_index/c.0", f"{RAY}/zarr.json"])
def test_a_file_that_is_not_the_manifests_is_refused_by_name(there: Path, path: Path, name: str) -> None:
    (there / name).write_bytes((there / name).read_bytes() + b"\n")
    with pytest.raises(CacheCorruptError, match=name) as raised:
        pull(address_of(there), path)
    assert str(raised.value).startswith(address_of(there))
    assert "\n" not in str(raised.value)
    assert not path.exists()


def test_control_files_that_contradict_each_other_are_refused(there: Path, path: Path, tmp_path: Path) -> None:
    part = make_small_store(tmp_path / "part", [(0, 20)])
    other = make_store(tmp_path / "other")
    for source, name, message in (
        (part, "zarr.json", "zarr.json: .*manifest.json"),
        (part, "journal.jsonl", "journal.jsonl: .*manifest.json"),
        (other, "manifest.json", "manifest.json: .*fingerprint"),
    ):
        content = (there / name).read_bytes()
        shutil.copy(source / name, there / name)
        with pytest.raises(CacheCorruptError, match=message) as raised:
            pull(address_of(there), path)
        assert str(raised.value).startswith(f"{address_of(there)}/")
        (there / name).write_bytes(content)
    length = there / "episodes/length/c.0"
    length.write_bytes(length.read_bytes()[::-1])
    with pytest.raises(CacheCorruptError, match="episodes/length/c.0"):
        pull(address_of(there), path)
    assert not path.parent.exists()


def test_names_that_lead_outside_are_refused(there: Path, path: Path) -> None:
    reseal(there / "manifest.json", {'"frame_crc32c/zarr.json"': '"../outside/zarr.json"'})
    with pytest.raises(CacheCorruptError, match=f"{address_of(there)}/manifest.json: "):
        pull(address_of(there), path)
    group = json.loads((there / "zarr.json").read_text())
    group["attributes"]["geomcache"]["spec"]["cameras"][0]["key"] = "../outside"
    (there / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ValueError, match="camera key"):
        pull(address_of(there), path)
    assert not path.parent.exists()


def test_what_cannot_be_had_is_told_before_anything_is_made(
    there: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = make_small_store(tmp_path / "part", [(0, 20), (75, 90)])
    with pytest.raises(CacheIncompleteError, match=rf"{address_of(part)}: .* 0:4, .* 1:3: "):
        pull(address_of(part), path, episodes="0:4")
    with pytest.raises(UserInputError, match="0:4"):
        pull(address_of(there), path, episodes="2:9")
    with pytest.raises(CacheNotFoundError, match=rf"{address_of(tmp_path)}/none: .*zarr.json"):
        pull(address_of(tmp_path / "none"), path)
    (part / "manifest.json").unlink()
    with pytest.raises(CacheIncompleteError, match=f"{address_of(part)}: .*manifest.json.*geomcache push"):
        pull(address_of(part), path)
    assert not path.parent.exists()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutOfSpaceError, match=rf"{path}: .* 27.2 kB, .* 1.0 kB: .*--episodes"):
        pull(address_of(there), path)


def test_what_is_at_the_path_is_not_lost(there: Path, path: Path, tmp_path: Path) -> None:
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(CacheExistsError, match=f"{path}: .*{address_of(there)}"):
        pull(address_of(there), path)
    assert contents(path) == {"thesis.tex": b"mine"}
    for name, other, message in (
        ("other", make_store(tmp_path / "other"), "fingerprint [0-9a-f]{64}.*[0-9a-f]{64}"),
        ("shifted", make_small_store(tmp_path / "shifted", shift=1000), " 6 shards"),
    ):
        before = contents(other)
        with pytest.raises(CacheExistsError, match=message):
            pull(address_of(there), tmp_path / name)
        assert contents(other) == before


def test_a_compressed_cache_comes_in_part_and_whole(tmp_path: Path, path: Path) -> None:
    there = make_small_store(tmp_path / "there", codec="zstd")
    (there / "lock").unlink()
    part = pull(address_of(there), path, episodes="1")
    assert (part.fetched, part.frames) == (BEGIN_FILES + 3 * SHARD_FILES, 48)
    assert part.nbytes == sum(len(content) for content in contents(path).values()) - control_nbytes(path)
    assert verify(path).problems == ()
    assert_reads(path, list(range(16, 64)))
    assert GeometryStore.open(path).codec == "zstd"
    pull(address_of(there), path)
    assert contents(path) == contents(there)


def control_nbytes(path: Path) -> int:
    return sum((path / name).stat().st_size for name in ("journal.jsonl", "zarr.json", "manifest.json"))


def test_another_process_that_pulls_the_same_is_waited_for(
    there: Path, path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = path.with_name(".cache.zarr.geomcache-pull")
    draft.mkdir(parents=True)
    other = locks.LockFile(draft / "lock")
    assert other.claim(drafts._CLAIM)
    finished: list[float] = []

    def wait(seconds: float) -> None:
        finished.append(seconds)
        other.close()

    monkeypatch.setattr(drafts, "sleep", wait)
    assert pull(address_of(there), path).fetched == FILES
    assert len(finished) == 1
    assert said[0].startswith(f"{draft}: ")


def test_a_long_pull_of_another_process_has_more_lines(
    there: Path, path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = path.with_name(".cache.zarr.geomcache-pull")
    draft.mkdir(parents=True)
    other = locks.LockFile(draft / "lock")
    assert other.claim(drafts._CLAIM)
    monkeypatch.setattr(waits, "LINE_EVERY_S", 0.1)

    def wait(_seconds: float) -> None:
        for _ in range(200):
            if len(said) > 1:
                break
            time.sleep(0.05)
        other.close()

    monkeypatch.setattr(drafts, "sleep", wait)
    pull(address_of(there), path)
    assert said[1].startswith(f"{draft}: waiting for another process")


def test_training_uses_a_copy_and_makes_it_once(
    there: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    assert local_copy("libero.zarr") == Path("libero.zarr")
    assert said == []
    copy = local_copy(address_of(there))
    with GeometryStore.open(there) as store:
        assert copy == tmp_path / "home" / f"there-{store.fingerprint[:16]}.zarr"
    assert f"{FILES} of {FILES} files downloaded" in said[-1]
    assert "GEOMCACHE_HOME" in said[0]
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    said.clear()
    monkeypatch.setenv("RANK", "1")
    assert local_copy(address_of(there)) == copy
    assert said == []
    assert before == {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    monkeypatch.setenv("RANK", "0")
    (copy / RAY / "c.0.0.0.0").write_bytes(b"short")
    local_copy(address_of(there))
    assert f"1 of {FILES} files downloaded" in said[-1]


def test_copies_are_kept_beside_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEOMCACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert home() == Path("/caches/geomcache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "geomcache"
