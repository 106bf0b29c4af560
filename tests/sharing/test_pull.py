"""What `pull` makes at PATH: a whole cache or an honest part of it, every file as its hash says, or nothing."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import zarr

from geomcache.cache import locks
from geomcache.cache.compatibility import require_episodes
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
from geomcache.sharing import pull as module
from geomcache.sharing.pull import home, local_copy, pull
from tests.support.sharing import FILES, RAY, SPEC, assert_reads, contents, make_small_store, said
from tests.support.stores import fill, make_store, open_writer

__all__ = ["said"]

BEGIN_FILES = 12  # metadata, coordinates and table


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


def test_a_whole_cache_comes_byte_for_byte(there: Path, path: Path, said: list[str]) -> None:
    report = pull(address_of(there), path, say=said.append)
    assert (report.files, report.fetched, report.frames, report.episodes) == (FILES, FILES, 90, "0:4")
    assert contents(path) == contents(there)
    assert verify(path).problems == ()
    assert [each.name for each in path.parent.iterdir()] == ["cache.zarr"]
    again = pull(address_of(there), path, say=said.append)
    assert (again.fetched, again.nbytes_kept) == (0, report.nbytes_fetched)
    with open_writer(path, spec=SPEC) as writer:  # what has travelled can be gone on with
        assert writer.pending() == ()


def test_a_part_says_what_it_has_and_grows(there: Path, path: Path, said: list[str]) -> None:
    report = pull(address_of(there), path, episodes="1", say=said.append)
    # episode 1 has rows 20 to 49, in shards 1 to 3, whose rows are 16 to 63
    assert report.fetched == BEGIN_FILES + 2 * 3
    assert (report.frames, report.frames_beside, report.episodes) == (48, 18, "1")
    assert "18 of these frames were not asked for" in report.lines()[1]
    assert verify(path).problems == ()
    with GeometryStore.open(path) as store:
        assert store.sealed
        assert store.rows == ((16, 64),)
        assert store.episodes() == ((1, 2),)
        assert store.statistics["ray"].count == 48 * 12
        require_episodes(store, [1])
        with pytest.raises(CacheIncompleteError, match="lacks 2"):
            require_episodes(store, [1, 2])
        with pytest.raises(MissingFrameError):
            store.batch([64])
    assert_reads(path, list(range(16, 64)))
    alone = zarr.open_group(path, mode="r").attrs["geomcache"]
    assert alone["statistics"]["pooled"]["ray"]["count"] == 48 * 12

    grown = pull(address_of(there), path, episodes="3", say=said.append)
    assert grown.fetched == 2 * 2  # row 75 to 89: shards 4 and 5
    assert grown.episodes == "1:4"
    assert verify(path).problems == ()
    assert pull(address_of(there), path, episodes="1:3", say=said.append).fetched == 0
    whole = pull(address_of(there), path, say=said.append)
    assert whole.fetched == 2
    assert contents(path) == contents(there)
    assert [each.name for each in path.parent.iterdir()] == ["cache.zarr"]


def test_a_part_is_a_cache_that_extraction_goes_on_with(there: Path, path: Path, said: list[str]) -> None:
    pull(address_of(there), path, episodes="1", say=said.append)
    with open_writer(path, spec=SPEC) as writer:
        assert fill(writer) == [0, 4, 5]
        assert writer.seal()
    assert verify(path).problems == ()
    assert_reads(path, list(range(90)))


def test_what_was_interrupted_goes_on(there: Path, path: Path, said: list[str]) -> None:
    name = f"{RAY}/c.4.0.0.0"
    content = (there / name).read_bytes()
    (there / name).unlink()
    with pytest.raises(CacheCorruptError, match=rf"{name}: expected {len(content)} bytes .* found none"):
        pull(address_of(there), path, say=said.append)
    draft = path.with_name(".cache.zarr.geomcache-pull")
    assert not path.exists()
    assert draft.is_dir()
    (there / name).write_bytes(content)
    half = f"{RAY}/c.0.0.0.0"  # as a power cut could leave it: right size, other bytes
    (draft / half).parent.mkdir(parents=True, exist_ok=True)
    (draft / half).write_bytes(bytes(len((there / half).read_bytes())))
    (draft / "frame_crc32c").mkdir(exist_ok=True)
    (draft / "frame_crc32c" / "c.99.0").write_bytes(b"of another pull")
    assert pull(address_of(there), path, say=said.append).fetched < FILES
    assert "are here already, as they should be" in said[-1]
    assert contents(path) == contents(there)
    assert not draft.exists()


def test_a_damaged_copy_is_mended(there: Path, path: Path, said: list[str]) -> None:
    pull(address_of(there), path, say=said.append)
    name = f"{RAY}/c.2.0.0.0"
    (path / name).write_bytes((path / name).read_bytes()[::-1])
    assert pull(address_of(there), path, say=said.append).fetched == 1
    assert contents(path) == contents(there)


@pytest.mark.parametrize("name", [f"{RAY}/c.2.0.0.0", "frame_crc32c/c.0.0", "episode_index/c.0", f"{RAY}/zarr.json"])
def test_a_file_that_is_not_the_manifests_is_refused_by_name(
    there: Path, path: Path, said: list[str], name: str
) -> None:
    (there / name).write_bytes((there / name).read_bytes() + b"\n")
    with pytest.raises(CacheCorruptError, match=name) as raised:
        pull(address_of(there), path, say=said.append)
    assert str(raised.value).startswith(address_of(there))
    assert "\n" not in str(raised.value)
    assert not path.exists()


def test_control_files_that_contradict_each_other_are_refused(
    there: Path, path: Path, tmp_path: Path, said: list[str]
) -> None:
    part = make_small_store(tmp_path / "part", [(0, 20)])
    other = make_store(tmp_path / "other")
    for source, name, message in (
        (part, "zarr.json", r"zarr.json: expected the content that manifest.json has a hash of"),
        (part, "journal.jsonl", r"journal.jsonl: expected the shards, hashes and files of manifest.json"),
        (other, "manifest.json", "expected fingerprint"),
    ):
        content = (there / name).read_bytes()
        shutil.copy(source / name, there / name)
        with pytest.raises(CacheCorruptError, match=message) as raised:
            pull(address_of(there), path, say=said.append)
        assert str(raised.value).startswith(f"{address_of(there)}/")
        (there / name).write_bytes(content)
    length = there / "episodes/length/c.0"
    length.write_bytes(length.read_bytes()[::-1])
    with pytest.raises(CacheCorruptError, match="episodes/length/c.0"):
        pull(address_of(there), path, say=said.append)
    assert not path.parent.exists()


def test_names_that_lead_outside_are_refused(there: Path, path: Path, said: list[str]) -> None:
    reseal(there / "manifest.json", {'"frame_crc32c/zarr.json"': '"../outside/zarr.json"'})
    with pytest.raises(CacheCorruptError, match=r"manifest.json: expected the files of such a cache, found other"):
        pull(address_of(there), path, say=said.append)
    group = json.loads((there / "zarr.json").read_text())
    group["attributes"]["geomcache"]["spec"]["cameras"][0]["key"] = "../outside"
    (there / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ValueError, match="camera key"):
        pull(address_of(there), path, say=said.append)
    assert not path.parent.exists()


def test_what_cannot_be_had_is_told_before_anything_is_made(
    there: Path, path: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = make_small_store(tmp_path / "part", [(0, 20), (75, 90)])
    with pytest.raises(CacheIncompleteError, match=r"expected episodes 0:4, lacks 1:3: ask for others"):
        pull(address_of(part), path, episodes="0:4", say=said.append)
    with pytest.raises(UserInputError, match="expected a part of 0:4"):
        pull(address_of(there), path, episodes="2:9", say=said.append)
    with pytest.raises(CacheNotFoundError, match=r"expected a cache, found no zarr.json: check the address"):
        pull(address_of(tmp_path / "none"), path, say=said.append)
    (part / "manifest.json").unlink()
    with pytest.raises(CacheIncompleteError, match="it was not pushed to its end"):
        pull(address_of(part), path, say=said.append)
    assert not path.parent.exists()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutOfSpaceError, match=r"expected room for .* found 1.0 kB"):
        pull(address_of(there), path, say=said.append)


def test_what_is_at_the_path_is_not_lost(there: Path, path: Path, tmp_path: Path, said: list[str]) -> None:
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(CacheExistsError, match="found something else: choose another path"):
        pull(address_of(there), path, say=said.append)
    assert contents(path) == {"thesis.tex": b"mine"}
    for name, other, message in (
        ("other", make_store(tmp_path / "other"), "found a cache with"),
        (
            "shifted",
            make_small_store(tmp_path / "shifted", shift=1000),
            "found 6 shards that are not as they are there",
        ),
    ):
        before = contents(other)
        with pytest.raises(CacheExistsError, match=message):
            pull(address_of(there), tmp_path / name, say=said.append)
        assert contents(other) == before


def test_a_compressed_cache_comes_in_part_and_whole(tmp_path: Path, path: Path, said: list[str]) -> None:
    there = make_small_store(tmp_path / "there", codec="zstd")
    (there / "lock").unlink()
    part = pull(address_of(there), path, episodes="1", say=said.append)
    assert (part.fetched, part.frames) == (BEGIN_FILES + 2 * 3, 48)
    assert part.nbytes_fetched == sum(len(content) for content in contents(path).values()) - control_nbytes(path)
    assert verify(path).problems == ()
    assert_reads(path, list(range(16, 64)))
    assert GeometryStore.open(path).codec == "zstd"
    pull(address_of(there), path, say=said.append)
    assert contents(path) == contents(there)


def control_nbytes(path: Path) -> int:
    return sum((path / name).stat().st_size for name in ("journal.jsonl", "zarr.json", "manifest.json"))


def test_another_process_that_pulls_the_same_is_waited_for(
    there: Path, path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = path.with_name(".cache.zarr.geomcache-pull")
    draft.mkdir(parents=True)
    other = locks.LockFile(draft / "lock")
    assert other.claim(module._CLAIM)
    finished: list[float] = []

    def wait(seconds: float) -> None:
        finished.append(seconds)
        other.close()

    monkeypatch.setattr(module, "sleep", wait)
    assert pull(address_of(there), path, say=said.append).fetched == FILES
    assert len(finished) == 1
    assert said[0] == f"{path}: another process is pulling it: waiting"


def test_training_uses_a_copy_and_makes_it_once(
    there: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOMCACHE_HOME", str(tmp_path / "home"))
    assert local_copy("libero.zarr", say=said.append) == Path("libero.zarr")
    assert said == []
    copy = local_copy(address_of(there), say=said.append)
    with GeometryStore.open(there) as store:
        assert copy == tmp_path / "home" / f"there-{store.fingerprint[:16]}.zarr"
    assert f"{FILES} of {FILES} files fetched" in said[-1]
    assert "set GEOMCACHE_HOME for another place" in said[0]
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    said.clear()
    monkeypatch.setenv("RANK", "1")
    assert local_copy(address_of(there), say=said.append) == copy
    assert said == []
    assert before == {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    monkeypatch.setenv("RANK", "0")
    (copy / RAY / "c.0.0.0.0").write_bytes(b"short")
    local_copy(address_of(there), say=said.append)
    assert f"1 of {FILES} files fetched" in said[-1]


def test_copies_are_kept_beside_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEOMCACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert home() == Path("/caches/geomcache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home() == Path.home() / ".cache" / "geomcache"
