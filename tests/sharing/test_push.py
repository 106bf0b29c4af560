"""What `push` does to a place: nothing half sent is whole, nothing of another's is lost, nothing is sent twice."""

import functools
import operator
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from geomcache.cache import durable
from geomcache.cache.header import Header
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import (
    CacheCorruptError,
    CacheExistsError,
    CacheIncompleteError,
    CacheLockedError,
    CacheNotFoundError,
    RemoteError,
    UserInputError,
)
from geomcache.sharing.limits import HUB_FILE_NBYTES, check_hub_limits
from geomcache.sharing.object_store import FsspecRemote
from geomcache.sharing.pull import pull
from geomcache.sharing.push import UNSEALED, push
from tests.support.sharing import CONTROL, FILES, RAY, SHARD_FILES, SPEC, contents, make_small_store, said
from tests.support.stores import fill, make_dataset_spec, make_spec, make_store, open_writer

__all__ = ["said"]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return make_small_store(tmp_path / "here.zarr")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "places" / "there.zarr"


def address_of(folder: Path) -> str:
    return f"file://{folder}"


def stop_before(monkeypatch: pytest.MonkeyPatch, stop: Callable[[str], bool]) -> list[str]:
    """Make sending fail at the first such name, for good; what was sent before."""
    sent: list[str] = []
    put = FsspecRemote._put

    def failing(self: FsspecRemote, name: str, source: Path | bytes) -> None:
        if stop(name):
            raise RemoteError(f"{name}: stopped")
        put(self, name, source)
        sent.append(name)

    monkeypatch.setattr(FsspecRemote, "_put", failing)
    return sent


def test_all_files_are_sent_and_none_twice(here: Path, there: Path) -> None:
    report = push(here, address_of(there))
    assert (report.files, report.sent) == (FILES + CONTROL, FILES + CONTROL)
    assert report.nbytes_sent == sum(map(len, contents(here).values()))
    assert contents(there) == contents(here)
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    assert push(here, address_of(there)).sent == 0
    assert before == {path: path.stat().st_mtime_ns for path in there.rglob("*")}


@pytest.mark.parametrize("last", ["journal.jsonl", "manifest.json", UNSEALED, f"{RAY}/zarr.json", "zarr.json"])
def test_what_is_half_sent_is_no_cache_and_is_finished(
    here: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    with monkeypatch.context() as patch:
        sent = stop_before(patch, lambda name: name == last)
        with pytest.raises(RemoteError, match="stopped"):
            push(here, address_of(there))
    with pytest.raises(CacheIncompleteError if sent else CacheNotFoundError):
        pull(address_of(there), tmp_path / "copy.zarr")
    report = push(here, address_of(there))
    assert report.sent == FILES + CONTROL - len({*sent} - {UNSEALED})
    assert contents(there) == contents(here)


def test_half_of_one_extraction_is_not_mixed_with_half_of_another(
    here: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal settings, equal sizes, other numbers: only hashes tell the two apart, and the place tells none."""
    other = make_small_store(tmp_path / "other.zarr", shift=1000)
    for path, last in ((here, f"{RAY}/c.4.0.0.0"), (other, f"{RAY}/c.2.0.0.0"), (here, f"{RAY}/c.1.0.0.0")):
        with monkeypatch.context() as patch:
            stop_before(patch, functools.partial(operator.eq, last))
            with pytest.raises(RemoteError, match="stopped"):
                push(path, address_of(there))
    push(other, address_of(there))
    assert contents(there) == contents(other)
    push(here, address_of(there))
    assert contents(there) == contents(here)


def test_a_cache_that_has_grown_sends_what_is_new(tmp_path: Path, there: Path) -> None:
    path = make_small_store(tmp_path / "cache.zarr", [(0, 50)])
    push(path, address_of(there))
    with open_writer(path, [(50, 90)], spec=SPEC) as writer:
        fill(writer)
        assert writer.seal()
    report = push(path, address_of(there))
    # shard 3 was made again with more rows, 4 and 5 are new: their files and the control files
    assert report.sent == 3 * SHARD_FILES + CONTROL
    assert contents(there) == contents(path)


def test_another_cache_is_replaced_only_when_asked(here: Path, there: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr")
    push(other, address_of(there))
    (there / "mine.txt").write_text("mine")
    with pytest.raises(CacheExistsError, match=f"{address_of(there)}: .*made-up.*--overwrite"):
        push(here, address_of(there))
    assert contents(there) == contents(other) | {"mine.txt": b"mine"}
    push(here, address_of(there), overwrite=True)
    assert contents(there) == contents(here) | {"mine.txt": b"mine"}


def test_frames_that_only_the_place_has_are_not_lost(here: Path, there: Path, tmp_path: Path) -> None:
    push(here, address_of(there))
    part = make_small_store(tmp_path / "part.zarr", [(0, 50)])
    with pytest.raises(CacheExistsError, match=rf"{address_of(there)}: .*{part} .* 40: .*--overwrite"):
        push(part, address_of(there))
    push(part, address_of(there), overwrite=True)
    assert contents(there) == contents(part)


def test_something_else_is_never_replaced(here: Path, there: Path) -> None:
    there.mkdir(parents=True)
    (there / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CacheExistsError, match=rf"{address_of(there)}: .* 1 .*zarr.json.*thesis.tex"):
            push(here, address_of(there), overwrite=overwrite)
    assert contents(there) == {"thesis.tex": b"mine"}


def test_reading_back_finds_what_sizes_do_not_tell(here: Path, there: Path) -> None:
    push(here, address_of(there))
    name = f"{RAY}/c.3.0.0.0"
    content = (there / name).read_bytes()
    (there / name).write_bytes(content[::-1])
    assert push(here, address_of(there)).sent == 0
    with pytest.raises(
        CacheCorruptError, match=rf"{name}: .*{sha256(content).hexdigest()}.*{sha256(content[::-1]).hexdigest()}"
    ):
        push(here, address_of(there), verify=True)
    assert push(here, address_of(there), verify=True).sent == 1
    assert contents(there) == contents(here)


def test_what_is_not_whole_here_is_not_sent(here: Path, there: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished.zarr"
    with open_writer(unfinished, spec=SPEC) as writer:
        fill(writer, 2)
    with pytest.raises(CacheIncompleteError, match=rf"{unfinished}: .*manifest.json.*geomcache extract"):
        push(unfinished, address_of(there))
    with pytest.raises(CacheNotFoundError, match=f"{tmp_path}/none.zarr: "):
        push(tmp_path / "none.zarr", address_of(there))
    name = f"{RAY}/c.3.0.0.0"
    (here / name).write_bytes((here / name).read_bytes()[::-1])
    with pytest.raises(CacheCorruptError, match=rf"{here}/{name}: .*manifest.json.*geomcache verify {here}"):
        push(here, address_of(there))
    assert not there.exists()


def test_a_cache_that_is_written_meanwhile_is_told(here: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = FsspecRemote._put

    def growing(self: FsspecRemote, name: str, source: Path | bytes) -> None:
        put(self, name, source)
        if name == "journal.jsonl":
            durable.replace_file(here / "manifest.json", b"another")

    monkeypatch.setattr(FsspecRemote, "_put", growing)
    with pytest.raises(CacheLockedError, match=f"{here}: "):
        push(here, address_of(there))
    assert "manifest.json" not in contents(there)


def test_an_address_is_no_path_and_a_bucket_has_no_privacy(here: Path, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=f"{tmp_path}/copy.zarr: "):
        push(here, str(tmp_path / "copy.zarr"))
    with pytest.raises(UserInputError, match="--revision: .*memory://cache.zarr.*'main'"):
        push(here, "memory://cache.zarr", revision="main")
    with pytest.raises(RemoteError, match="memory://cache.zarr: --private"):
        push(here, "memory://cache.zarr", private=True)


def test_paths_of_this_machine_are_not_published(there: Path, tmp_path: Path) -> None:
    """Labels are no part of the fingerprint: what is published has the folders' names, the cache itself the paths."""
    spec = make_spec(cameras=("observation.images.front",), outputs=("ray",), model_id="/home/alice/secret/da3")
    dataset = make_dataset_spec(repo_id="../secret/libero")
    path = tmp_path / "cache.zarr"
    with open_writer(path, spec=spec, dataset=dataset) as writer:
        fill(writer)
        assert writer.seal()
    before = contents(path)
    push(path, address_of(there), verify=True)
    assert contents(path) == before
    published = contents(there)
    assert not any(b"secret" in content or b"alice" in content for content in published.values())
    assert {name for name in before if published[name] != before[name]} == {"zarr.json", "manifest.json"}
    with GeometryStore.open(there) as store, GeometryStore.open(path) as local:
        assert (store.spec.model_id, store.dataset.repo_id) == ("da3", "libero")
        assert local.spec.model_id == "/home/alice/secret/da3"
        assert store.fingerprint == local.fingerprint
    assert verify(there).problems == ()
    assert push(path, address_of(there)).sent == 0
    copy = tmp_path / "copy.zarr"
    pull(address_of(there), copy, episodes="1")
    pull(address_of(there), copy)
    assert contents(copy) == published
    assert push(copy, address_of(there)).sent == 0


def test_more_files_in_a_folder_than_the_hub_takes_are_counted_before_anything_is_sent(tmp_path: Path) -> None:
    """16 frames a shard: 160,000 of them make 10,000 files, and zarr.json is one more."""
    names = Header.new(make_spec(), make_dataset_spec([1_000] * 160)).layout.files
    shards = 9_999
    inside = [f"{RAY}/zarr.json", *(names(shard)[0] for shard in range(shards))]
    folder = inside[1].rpartition("/")[0]
    inside[0] = f"{folder}/zarr.json"
    check_hub_limits(tmp_path / "cache.zarr", dict.fromkeys(inside, 1))
    with pytest.raises(UserInputError, match=rf"cache.zarr/{folder}: .* 10000 .* 10001"):
        check_hub_limits(tmp_path / "cache.zarr", dict.fromkeys([*inside, names(shards)[0]], 1))
    folders = [f"{number}/zarr.json" for number in range(10_000)]
    check_hub_limits(tmp_path / "cache.zarr", dict.fromkeys(folders, 1))
    with pytest.raises(UserInputError, match="10001"):
        check_hub_limits(tmp_path / "cache.zarr", dict.fromkeys([*folders, "zarr.json"], 1))


def test_a_file_that_is_too_large_for_the_hub_is_named(tmp_path: Path) -> None:
    assert HUB_FILE_NBYTES == 500_000_000_000
    files = {"zarr.json": 1, f"{RAY}/c.0.0.0.0": HUB_FILE_NBYTES}
    check_hub_limits(tmp_path, files)
    with pytest.raises(UserInputError, match=rf"{RAY}/c.0.0.0.0: .*500.0 GB"):
        check_hub_limits(tmp_path, files | {f"{RAY}/c.0.0.0.0": HUB_FILE_NBYTES + 1})


def test_more_files_than_the_hub_recommends_are_said(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geomcache.sharing.limits.HUB_FILES", 3)
    check_hub_limits(tmp_path, dict.fromkeys("abc", 1))
    assert said == []
    check_hub_limits(tmp_path, dict.fromkeys("abcd", 1))
    assert "4 files" in said[0]


def test_files_that_have_no_place_in_the_cache_are_removed(here: Path, there: Path) -> None:
    push(here, address_of(there))
    stale = there / RAY / "c.99.0.0.0"
    stale.write_bytes(b"of a cache that was replaced")
    (there / "mine.txt").write_text("mine")
    assert push(here, address_of(there)).sent == 0
    assert contents(there) == contents(here) | {"mine.txt": b"mine"}


def test_zarr_json_of_another_push_is_not_taken_for_this_ones(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is overwritten before the manifest that has its hash: after a kill in between only its content tells."""
    here, other = (make_small_store(tmp_path / f"{shift}.zarr", shift=shift) for shift in (500, 700))
    assert (here / "zarr.json").stat().st_size == (other / "zarr.json").stat().st_size
    for path, last in ((here, f"{RAY}/c.4.0.0.0"), (other, UNSEALED)):
        with monkeypatch.context() as patch:
            stop_before(patch, functools.partial(operator.eq, last))
            with pytest.raises(RemoteError, match="stopped"):
                push(path, address_of(there))
    assert (there / "zarr.json").read_bytes() == (other / "zarr.json").read_bytes()
    push(here, address_of(there))
    assert contents(there) == contents(here)
