"""The inventory of a sealed cache lists the files on disk, and refuses control files that contradict each other."""

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
    shards = {"c.1.0.0.0", "c.1.0"}
    of_one = {name for name in on_disk if "frame" in name or "/ray/c." in name} - {"frame_index/c.0"}
    of_one = {name for name in of_one if name.rpartition("/")[2] in shards}
    others = {name for name in on_disk if name not in of_one and not name.startswith(("frame_crc32c/c", "observation"))}
    assert of_one | others <= inventory.files([1]).keys()
    assert len(inventory.files([1])) == 12 + 2
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
