"""The manifest: it comes back as it was written, and damage and contradictions are reported."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from geomcache.cache.layout import Layout, ShardFiles
from geomcache.cache.manifest import Manifest
from geomcache.errors import CacheCorruptError, CacheFormatError
from geomcache.ranges import count_rows
from geomcache.statistics import Moments
from tests.support.records import FILES, FINGERPRINT, LAYOUT, SPEC, commit, sizes


def manifest() -> Manifest:
    state = {0: commit(0, ((3, 9),)), 1: commit(1), 5: commit(5)}
    moments = {
        camera: {name: Moments.from_dict(value, name) for name, value in outputs.items()}
        for camera, outputs in state[5].statistics.items()
    }
    return Manifest(
        rows=((3, 9), (16, 32), (80, 90)),
        files=FILES,
        shards={shard: each.files for shard, each in state.items()},
        statistics=moments,
    )


def test_manifest_comes_back_and_reads_as_json() -> None:
    content = manifest().encode(LAYOUT, FINGERPRINT)
    assert Manifest.parse(content, Path("manifest"), LAYOUT, FINGERPRINT) == manifest()
    data = json.loads(content)
    assert data["sha256"] == hashlib.sha256(content[: content.index(b',\n"sha256":"')]).hexdigest()
    assert data["rows"] == [[3, 9], [16, 32], [80, 90]]
    assert [(shard, sizes) for shard, sizes, _ in data["shards"]] == [
        (0, [*sizes(6)]),
        (1, [*sizes(16)]),
        (5, [*sizes(10)]),
    ]
    pooled = data["statistics"]["pooled"]["ray"]
    assert pooled["count"] == sum(of["ray"].count for of in manifest().statistics.values())


def test_every_flipped_bit_and_every_cut_of_a_manifest_is_told() -> None:
    content = bytearray(manifest().encode(LAYOUT, FINGERPRINT))
    for bit in range(0, 8 * len(content), 3):
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheCorruptError, match="^manifest: "):
            Manifest.parse(bytes(content), Path("manifest"), LAYOUT, FINGERPRINT)
        content[bit // 8] ^= 1 << bit % 8
    for length in range(len(content)):
        with pytest.raises(CacheCorruptError):
            Manifest.parse(bytes(content[:length]), Path("manifest"), LAYOUT, FINGERPRINT)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [[0, 9], [16, 32], [80, 90]]},
        {"rows": [[3, 9], [16, 32], [80, 91]]},
        {"rows": [[3, 9], [16, 32]]},
        {"rows": [[0, 2**62]]},
        {"shards": []},
        {"shards": [[0, [], []]]},
        {"statistics": {"cameras": {}}},
        {"files": {"../x": 1}},
        {"files": {"x": [-1, "cd" * 32]}},
        {"files": {"x": [10**300, "cd" * 32]}},
        {"files": {"x": [1, "cd"]}},
        {"shards": [[True, [], []]]},
        {"shards": [[10**300, [], []]]},
        {"rows": [[3, 10**300]]},
        {"rows": [[float("nan"), 9]]},
        {"statistics": []},
        {"statistics": {"cameras": []}},
        {"files": []},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change: dict[str, object]) -> None:
    data = json.loads(manifest().encode(LAYOUT, FINGERPRINT)) | change
    del data["sha256"]
    content = json.dumps(data).encode()[:-1]
    content += b',\n"sha256":"%s"\n}\n' % hashlib.sha256(content).hexdigest().encode()
    with pytest.raises(CacheFormatError, match="manifest: .*version 1"):
        Manifest.parse(content, Path("manifest"), LAYOUT, FINGERPRINT)


def test_manifest_of_another_cache_is_refused() -> None:
    content = manifest().encode(LAYOUT, "ff" * 32)
    with pytest.raises(CacheCorruptError, match="ff" * 32):
        Manifest.parse(content, Path("manifest"), LAYOUT, FINGERPRINT)


def test_a_manifest_of_thirty_million_frames_stays_small() -> None:
    layout = Layout.of(SPEC, frames=30_000_000, shard_frames=4096)
    shards = {
        shard: ShardFiles(
            tuple(low for low, _ in layout.size_bounds(stop - start)), tuple(bytes([n]) * 32 for n in range(7))
        )
        for shard in range(layout.shards)
        for start, stop in [layout.shard_rows(shard)]
    }
    big = Manifest(rows=((0, layout.frames),), files=FILES, shards=shards, statistics=manifest().statistics)
    content = big.encode(layout, FINGERPRINT)
    tracemalloc.start()
    try:
        parsed = Manifest.parse(content, Path("manifest"), layout, FINGERPRINT)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parsed.shards == shards
    assert count_rows(parsed.rows) == 30_000_000
    assert (len(content), kept, peak) < (4 << 20, 8 << 20, 30 << 20)
