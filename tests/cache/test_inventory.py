"""What a sealed cache consists of is what lies on disk, and what its control files say of each other."""

from hashlib import sha256
from pathlib import Path

import pytest

from geomcache.cache.inventory import CONTROL_LIMITS, Inventory, named_as
from geomcache.errors import CacheCorruptError, CacheIncompleteError
from tests.support.sharing import contents, make_small_store


def test_it_names_every_file_with_bytes_and_hash(tmp_path: Path) -> None:
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
        with pytest.raises(CacheCorruptError, match=r"journal.jsonl: expected the shards, hashes and files"):
            Inventory.read(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CacheIncompleteError, match="expected a sealed cache"), named_as(path, "s3://bucket/cache"):
        Inventory.read(path)
    with (
        pytest.raises(CacheIncompleteError, match=r"^s3://bucket/cache: expected"),
        named_as(path, "s3://bucket/cache"),
    ):
        Inventory.read(path)
