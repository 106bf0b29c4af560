"""Caches that the first release wrote, which had schema version 1: tests/cache/data/version-1.zip has three of them."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.header import Header
from geomcache.cache.inventory import Inventory
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.cache.writer import StoreWriter
from geomcache.errors import CacheMismatchError, UserInputError
from geomcache.geometry import DatasetSpec
from tests.cache.test_cache_format import load_reader
from tests.support.stores import LENGTHS, as_lengths, expected, fill, make_dataset_spec, make_spec, open_writer

SPEC = make_spec()
V1 = make_dataset_spec(images_sha256="11" * 32)
ROWS = {"sealed": [*range(37), *range(70, 90)], "compressed": [*range(90)], "unfinished": [*range(32)]}


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    with zipfile.ZipFile(Path(__file__).parent / "data" / "version-1.zip") as archive:
        archive.extractall(tmp_path)
    for name in ROWS:
        (tmp_path / name / "lock").touch()
    return tmp_path


def reopen(path: Path, dataset: DatasetSpec = V1) -> StoreWriter:
    return StoreWriter.create_or_open(path, SPEC, dataset, as_lengths(LENGTHS), [(0, 90)])


@pytest.mark.parametrize("name", ROWS)
def test_it_opens_and_reads(caches: Path, name: str) -> None:
    with GeometryStore.open(caches / name) as store:
        assert (store.schema_version, store.episode_identity) == (1, None)
        assert store.sealed == (name != "unfinished")
        rows = ROWS[name]
        for read in (store.batch, store.batch_plain):
            for output, values in expected(SPEC, rows).items():
                np.testing.assert_array_equal(getattr(read(rows), output), values)
        with pytest.raises(UserInputError):
            store.signatures(rows)
        assert store.array_nbytes.keys() == {*(f"{key}/{out}" for key in SPEC.camera_keys for out in SPEC.outputs)} | {
            "frame_crc32c"
        }
    cache = load_reader()["Cache"](caches / name)
    np.testing.assert_array_equal(
        cache.read(rows[-1])[f"{SPEC.camera_keys[0]}/ray"], expected(SPEC, rows[-1:])["ray"][0, 0]
    )


def test_it_verifies_and_has_an_inventory(caches: Path) -> None:
    path = caches / "compressed"
    assert verify(path).problems == ()
    files = Inventory.read(path).files()
    assert len(files) > 30
    assert all((path / file).stat().st_size == stored.size for file, stored in files.items())
    damaged = path / "frame_crc32c" / "c.0.0"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    assert [problem.shard for problem in verify(path).problems] == [0]


def test_an_unfinished_one_is_continued_as_it_was_begun(caches: Path) -> None:
    with reopen(caches / "unfinished") as writer:
        assert fill(writer) == [2, 3, 4, 5]
        assert writer.seal()
    assert Header.read(caches / "unfinished").schema_version == 1
    assert not list((caches / "unfinished").glob("picture_*"))
    assert verify(caches / "unfinished").problems == ()
    with GeometryStore.open(caches / "unfinished") as store:
        np.testing.assert_array_equal(store.batch(range(90)).ray, expected(SPEC, range(90))["ray"])


def test_what_is_written_as_version_1_has_the_first_releases_bytes(caches: Path, tmp_path: Path) -> None:
    with StoreWriter.create_or_open(tmp_path / "again", SPEC, V1, as_lengths(LENGTHS), [(0, 37), (70, 90)]) as writer:
        fill(writer)
        assert writer.seal()
    files = [file.relative_to(caches / "sealed") for file in (caches / "sealed").rglob("*") if file.is_file()]
    assert len(files) > 30
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (caches / "sealed" / file).read_bytes(), file


def test_a_version_1_dataset_does_not_continue_a_version_2_cache(tmp_path: Path) -> None:
    open_writer(tmp_path / "cache").close()
    with pytest.raises(CacheMismatchError) as caught:
        reopen(tmp_path / "cache")
    assert caught.value.field in ("dataset.identities_sha256", "dataset.images_sha256")
