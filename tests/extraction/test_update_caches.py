"""`geomcache update` of caches in every state: partial, unfinished, damaged, of version 1, interrupted, in use."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache import create, durable
from geomcache.cache.commands import run_config_path
from geomcache.cache.header import LOCK, Header
from geomcache.cache.locks import LockFile
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.cache.writer import StoreWriter
from geomcache.errors import CacheExistsError, CacheLockedError, CacheMismatchError, CacheNotFoundError, UserInputError
from geomcache.extraction import update as update_module
from geomcache.extraction.options import recorded_options
from geomcache.extraction.run_config import read_run_config
from geomcache.frames.source import open_dataset
from geomcache.sharing.push import push
from tests.support.edits import (
    CAMERAS,
    Episode,
    StoppedError,
    TinyEncoder,
    Workshop,
    committed_rows,
    interrupt,
    largest_difference,
    picture_of,
    tiny_spec,
    workshop,
    write_dataset,
)
from tests.support.sharing import contents

KEYS = tuple(CAMERAS)


def episode(first: int, length: int) -> Episode:
    """Of pictures that no other episode has."""
    return Episode(tuple((number, number + 1000) for number in range(first, first + length)), first + 1)


BEFORE = [episode(0, 32), episode(100, 20), episode(200, 16), episode(300, 20)]  # 88 rows: shards of 16
AFTER = [BEFORE[0], BEFORE[3], BEFORE[2], episode(400, 25)]


@pytest.fixture
def shop() -> Iterator[Workshop]:
    with workshop() as shop:
        yield shop


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets before and after, and a cache of the one before."""
    folder = tmp_path_factory.mktemp("update-caches")
    write_dataset(folder / "before", BEFORE)
    write_dataset(folder / "after", AFTER)
    with workshop() as shop:
        shop.extract(folder / "cache.zarr", folder / "before")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "here"))


def frames_of(episodes: list[Episode]) -> list[tuple[NDArray[np.uint8], ...]]:
    return [tuple(map(picture_of, frame)) for each in episodes for frame in each.frames]


def assert_follows(cache: Path, episodes: list[Episode]) -> None:
    """The cache is sealed, has all rows, each the encoder's, and everything is as it was written."""
    frames = frames_of(episodes)
    with GeometryStore.open(cache) as store:
        assert store.sealed
        assert store.rows == ((0, len(frames)),)
        assert (store.schema_version, store.dataset.episodes) == (2, len(episodes))
    assert largest_difference(cache, frames) == 0
    assert verify(cache).problems == ()
    assert not list(cache.parent.glob(".*"))


def test_what_lines_up_is_linked_and_the_rest_is_copied_or_encoded(here: Path, shop: Workshop) -> None:
    before = {file: file.stat().st_ino for file in (here / "cache.zarr").glob("*/ray/c.*")}
    report = shop.update(here / "cache.zarr", here / "after")
    # The two shards of the first episode stay where they are.
    assert (report.frames, report.frames_encoded, report.frames_carried) == (93, 25, 68)
    assert report.frames_linked >= 32
    for shard in (0, 1):
        file = here / "cache.zarr" / KEYS[0] / "ray" / f"c.{shard}.0.0.0"
        assert file.stat().st_ino == before[file]
    assert_follows(here / "cache.zarr", AFTER)
    recorded = read_run_config(run_config_path(here / "cache.zarr"), recorded_options())
    assert recorded["root"] == str(here / "after")
    # Whoever names no dataset gets the one that the cache was made of last.
    assert shop.update(here / "cache.zarr", root=None, dataset=None).frames == 0  # type: ignore[arg-type]
    assert any(str(here / "after") in line for line in shop.lines)


def test_it_works_where_files_cannot_be_linked_or_names_exchanged(
    here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "link", lambda _source, _target: False)
    monkeypatch.setattr(durable, "exchange", lambda _one, _other: False)
    assert shop.update(here / "cache.zarr", here / "after").frames_linked >= 32
    assert_follows(here / "cache.zarr", AFTER)


def half_a_swap(target: Path, _draft: Path) -> None:
    """The first of two renames, where a file system cannot exchange names."""
    target.rename(target.with_name(f".{target.name}.00000000.geomcache-tmp"))
    raise RuntimeError("killed")


def test_a_kill_between_two_renames_is_repaired(here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = here / "cache.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(create, "_swap", half_a_swap)
        with pytest.raises(RuntimeError, match="killed"):
            shop.update(cache, here / "after")
    assert not cache.exists()
    report = shop.update(cache, here / "after")
    assert (report.frames, report.frames_total) == (0, 93)
    assert_follows(cache, AFTER)


def test_an_update_that_was_interrupted_is_resumed(here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    done = interrupt_update(shop, monkeypatch, here)
    assert_follows_not_yet(here)
    report = shop.update(here / "cache.zarr", here / "after")
    assert any("frames are done already" in line for line in shop.lines)
    assert report.frames < 93
    assert report.frames_encoded == shop.frames_encoded == 25 - done
    assert_follows(here / "cache.zarr", AFTER)


def test_what_an_interrupted_update_encoded_is_kept_although_the_dataset_changed_again(
    here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = interrupt_update(shop, monkeypatch, here)
    again = [*AFTER, episode(500, 8)]
    write_dataset(here / "again", again)
    report = shop.update(here / "cache.zarr", here / "again")
    assert report.frames_encoded == shop.frames_encoded == 25 + 8 - done
    assert_follows(here / "cache.zarr", again)


def interrupt_update(shop: Workshop, monkeypatch: pytest.MonkeyPatch, here: Path) -> int:
    """Let an update fail when it has committed some of the new episode; return how many of its frames."""
    new_rows = (68, 93)
    with monkeypatch.context() as patch:
        interrupt(patch, here / "cache.zarr", encoded=12, committed=new_rows)
        with pytest.raises(StoppedError):
            shop.update(here / "cache.zarr", here / "after")
    done = committed_rows(here / "cache.zarr", new_rows)
    assert 0 < done < 25
    return done


def assert_follows_not_yet(here: Path) -> None:
    assert largest_difference(here / "cache.zarr", frames_of(BEFORE)) == 0
    assert verify(here / "cache.zarr").problems == ()


@pytest.mark.parametrize("damage", ["map", "missing file", "hashes", "means", "checksums"])
def test_damaged_shards_are_encoded_anew_and_said(here: Path, shop: Workshop, damage: str) -> None:
    cache = here / "cache.zarr"
    names = {
        "map": f"{KEYS[0]}/ray/c.1.0.0.0",
        "missing file": f"{KEYS[1]}/ray_conf/c.1.0.0",
        "hashes": "picture_hash/c.1.0",
        "means": "picture_means/c.1.0.0.0.0",
        "checksums": "frame_crc32c/c.1.0",
    }
    file = cache / names[damage]
    if damage == "missing file":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[8] ^= 1  # of the first row of shard 1
        file.write_bytes(content)
    report = shop.update(cache, here / "after")
    expected = 1 if damage == "map" else 16
    assert report.frames_encoded == shop.frames_encoded == 25 + expected
    assert [line for line in shop.lines if names[damage] in line]
    assert_follows(cache, AFTER)


def test_an_unfinished_cache_is_finished(here: Path, shop: Workshop) -> None:
    cache = here / "unfinished.zarr"
    shop.extract(cache, here / "before", episodes="0")
    (cache / "manifest.json").unlink()
    report = shop.update(cache, here / "after")
    assert report.frames_encoded == 93 - 32
    assert_follows(cache, AFTER)


def test_a_partial_cache_stays_one(here: Path, shop: Workshop) -> None:
    cache = here / "partial.zarr"
    shop.extract(cache, here / "before", episodes="1,3")
    report = shop.update(cache, here / "after")
    assert (report.frames_encoded, report.frames_carried) == (0, 20)
    with GeometryStore.open(cache) as store:
        assert store.rows == ((32, 52),)  # the one episode of the two that the dataset still has
        assert store.episodes() == ((1, 2),)
    assert largest_difference(cache, frames_of(AFTER)) == 0
    assert verify(cache).problems == ()
    shop.update(cache, here / "after", episodes="0:4")
    assert_follows(cache, AFTER)
    shop.extract(here / "gone.zarr", here / "before", episodes="1")
    with pytest.raises(UserInputError, match="--episodes"):
        shop.update(here / "gone.zarr", here / "after")


def make_version_1(cache: Path, root: Path) -> None:
    """A cache as the first release made it."""
    dataset, _ = open_dataset("geomcache/test", root=root)
    spec = tiny_spec(dataset.cameras)
    encoder = TinyEncoder(spec)
    with StoreWriter.create_or_open(
        cache, spec, dataset.describe(1), dataset.reader.episode_length, [(0, dataset.spec.frames)]
    ) as writer:
        while (claim := writer.claim()) is not None:
            ((start, stop),) = claim.rows
            geometry = dict(encoder.encode(dataset.reader.read(start, stop).images).items())
            by_camera = {
                key: {name: values[:, view].numpy() for name, values in geometry.items()}
                for view, key in enumerate(spec.camera_keys)
            }
            writer.commit(claim, by_camera)
        assert writer.seal()
    assert Header.read(cache).schema_version == 1


def test_version_1_becomes_version_2_without_the_encoder(here: Path, shop: Workshop) -> None:
    cache = here / "old.zarr"
    make_version_1(cache, here / "before")
    report = shop.update(cache, here / "before")
    assert (shop.loads, report.frames_encoded, report.frames_linked) == (0, 0, 88)
    assert any("--parity" in line for line in shop.lines)
    assert_follows(cache, BEFORE)
    assert shop.update(cache, here / "after").frames_encoded == 25  # now it follows
    assert_follows(cache, AFTER)


def test_version_1_is_not_taken_for_another_dataset(here: Path, shop: Workshop) -> None:
    cache = here / "old.zarr"
    make_version_1(cache, here / "before")
    with pytest.raises(CacheMismatchError) as caught:
        shop.update(cache, here / "after")
    assert caught.value.field == "dataset.frames"
    assert (caught.value.cached, caught.value.wanted) == (88, 93)
    assert Header.read(cache).schema_version == 1


def test_a_cache_in_use_is_not_replaced_and_the_same_command_finishes(
    here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = here / "cache.zarr"
    monkeypatch.setattr(update_module, "_ALONE_S", 0.1)
    other = LockFile(cache / LOCK)  # as a writer of another process has it
    with pytest.raises(CacheLockedError, match="same command"):
        shop.update(cache, here / "after")
    assert_follows_not_yet(here)
    other.close()
    shop.update(cache, here / "after")
    assert shop.frames_encoded == 0
    assert_follows(cache, AFTER)


def test_a_pushed_copy_gets_what_changed(here: Path, shop: Workshop, tmp_path: Path) -> None:
    cache, address = here / "cache.zarr", f"file://{tmp_path}/place.zarr"
    whole, old = push(cache, address), contents(cache)
    shop.update(cache, here / "after")
    with pytest.raises(CacheExistsError, match="--overwrite"):
        push(cache, address)
    report = push(cache, address, overwrite=True)
    new = contents(cache)
    assert report.sent == sum(old.get(name) != content for name, content in new.items())
    assert report.sent < whole.sent
    assert not [name for name in old if name.startswith(f"{KEYS[0]}/ray/c.0") and old[name] != new[name]]
    assert contents(tmp_path / "place.zarr") == new
    assert push(cache, address).sent == 0


def test_nothing_to_do_is_said_without_a_write(here: Path, shop: Workshop) -> None:
    cache = here / "cache.zarr"
    shop.update(cache, here / "after")
    inodes = {file: file.stat().st_ino for file in cache.rglob("*")}
    report = shop.update(cache, here / "after")
    (line,) = report.lines()
    assert line.startswith(f"{cache}: complete, 93 frames; nothing to do")
    assert {file: file.stat().st_ino for file in cache.rglob("*")} == inodes


def test_pictures_that_changed_under_the_same_statistics_are_found(here: Path, shop: Workshop) -> None:
    cache = here / "cache.zarr"
    shutil.rmtree(here / "before")
    changed = [BEFORE[0], Episode(((7, 8), *BEFORE[1].frames[1:]), BEFORE[1].statistics), *BEFORE[2:]]
    write_dataset(here / "before", changed)
    assert Header.read(cache).fingerprint  # the metadata tell no difference
    report = shop.update(cache, here / "before")
    assert (report.frames_encoded, report.frames_carried) == (1, 87)
    assert_follows(cache, changed)


def test_a_dry_run_tells_what_is_kept_moved_and_encoded(here: Path, shop: Workshop) -> None:
    cache = here / "cache.zarr"
    before = sorted(here.rglob("*"))
    shop.update(cache, here / "after", dry_run=True)
    plan = {line.split()[0]: line for line in shop.lines}
    assert int(plan["kept"].split()[1]) == 32 + 16  # the third episode begins where it did
    assert int(plan["moved"].split()[1]) == 20
    assert int(plan["encode"].split()[1]) == 25
    assert "of 4 episodes" in plan["by"]
    assert "encoding" in plan["time"]
    assert sorted(here.rglob("*")) == before
    assert_follows_not_yet(here)


def test_a_plan_believes_pictures_and_not_statistics(here: Path, shop: Workshop) -> None:
    lying = [Episode(BEFORE[3].frames, BEFORE[0].statistics), Episode(BEFORE[0].frames, BEFORE[3].statistics)]
    write_dataset(here / "lying", [*lying, Episode(episode(700, 9).frames, BEFORE[2].statistics)])
    shop.update(here / "cache.zarr", here / "lying", dry_run=True)
    plan = {
        line.split()[0]: int(line.split()[1]) for line in shop.lines if line.split()[0] in ("kept", "moved", "encode")
    }
    assert plan == {"kept": 0, "moved": 52, "encode": 9}


def test_a_path_without_a_cache_is_refused(here: Path, shop: Workshop) -> None:
    with pytest.raises(CacheNotFoundError):
        shop.update(here / "none.zarr", here / "after")
