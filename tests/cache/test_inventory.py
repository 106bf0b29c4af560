"""The inventory of a sealed cache lists the files on disk, and refuses control files that contradict each other."""

import re
from hashlib import sha256
from pathlib import Path

import pytest

from geomcache.cache.inventory import CONTROL_LIMITS, Inventory
from geomcache.errors import CacheCorruptError, CacheIncompleteError
from tests.support.sharing import contents, make_small_store


def test_it_lists_every_file_with_bytes_and_hash(tmp_path: Path) -> None:
    path = make_small_store(tmp_path / "cache", [(0, 20), (50, 90)])
    inventory = Inventory.read(path)
    on_disk = contents(path)
    assert inventory.control == {name: on_disk.pop(name) for name in CONTROL_LIMITS}
    assert inventory.files() == {name: (len(data), sha256(data).hexdigest()) for name, data in on_disk.items()}
    of_shards = {name for name in on_disk if re.match(r"(frame_crc32c|picture_\w+|observation.*/ray)/c\.", name)}
    of_one = {name for name in of_shards if "/c.1." in name}
    assert len(of_one) == 4
    assert inventory.files([1]).keys() == on_disk.keys() - of_shards | of_one
    assert inventory.rows([0, 1]) == ((0, 20),)
    assert inventory.rows_of(3) == ((50, 64),)


def test_a_cache_that_is_not_sealed_or_was_mixed_is_refused(tmp_path: Path) -> None:
    path = make_small_store(tmp_path / "cache")
    journal = (path / "journal.jsonl").read_bytes()
    for damaged in (journal + b"torn", journal[: journal[:-1].rindex(b"\n") + 1]):
        (path / "journal.jsonl").write_bytes(damaged)
        with pytest.raises(CacheCorruptError, match=r"/journal.jsonl: "):
            Inventory.read(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CacheIncompleteError, match=r"manifest.json"):
        Inventory.read(path)


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json", "journal.jsonl"])
def test_a_control_file_of_another_cache_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Of the same dataset and settings with other shards: each file is whole in itself."""
    path = make_small_store(tmp_path / "cache")
    other = make_small_store(tmp_path / "other", [(0, 20)])
    (path / name).write_bytes((other / name).read_bytes())
    with pytest.raises(CacheCorruptError, match=r"zarr.json|journal.jsonl"):
        Inventory.read(path)
