"""Bits flipped, files cut off, missing and swapped: found when read, found by verify, and never a wrong number."""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import CacheCorruptError, CacheError
from tests.faults.common import SHORT, Figure, few_or_many, flip_bit, held_rows
from tests.support.stores import CAMERAS, make_spec, make_store

SMALL = make_spec(cameras=CAMERAS[:1], outputs=("ray",), grid_hw=(1, 2))
RAY = f"{CAMERAS[0]}/ray"


def small_store(path: Path, codec: str) -> Path:
    """32 frames in two shards, one array: every bit of its files can be tried."""
    return make_store(path, spec=SMALL, lengths=SHORT, codec=codec)


of_every_codec = pytest.mark.parametrize("codec", ["raw", "zstd"])


def read_offsets(file: Path) -> list[int]:
    """Where the 16 maps of a shard file begin, and where the last one ends, by the index at its end."""
    index = np.frombuffer(file.read_bytes()[-260:-4], "<u8").reshape(16, 2)
    present = index[index[:, 1] < 2**63].tolist()
    return [start for start, _ in present] + [sum(present[-1])]


def read_all(path: Path) -> str:
    """``refused``, ``missing`` or ``whole``. A wrong number, or an error that is not ours, fails the test."""
    try:
        rows = held_rows(path)
    except CacheError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
        return "refused"
    return "whole" if len(rows) == sum(SHORT) else "missing"


def is_clean(path: Path) -> bool:
    try:
        return verify(path).problems == ()
    except CacheError:
        return False


# The files that our reader needs, and what a flipped bit there leads to. Without a manifest the journal is read; damage
# in its last line, which a kill may have cut off, reads as a shard that was never made.
FILES = {
    "manifest.json": {"refused"},
    "journal.jsonl": {"refused", "missing"},
    "zarr.json": {"refused"},
    f"{RAY}/zarr.json": {"refused"},
    "frame_index/zarr.json": {"refused"},
    "episodes/start/c.0": {"refused"},
    "episodes/length/c.0": {"refused"},
    "frame_crc32c/c.0.0": {"refused"},
    "frame_crc32c/c.1.0": {"refused"},
    "index": {"refused"},
}


@few_or_many("step", 97, 1)
@pytest.mark.parametrize("name", FILES)
@of_every_codec
def test_every_flipped_bit_outside_the_maps_is_found(
    tmp_path: Path, name: str, codec: str, step: int, figure: Figure
) -> None:
    path = small_store(tmp_path / "cache", codec)
    if name == "journal.jsonl":
        (path / "manifest.json").unlink()
    file = path / (f"{RAY}/c.1.0.0.0" if name == "index" else name)
    bits = range(8 * (file.stat().st_size - 260 if name == "index" else 0), 8 * file.stat().st_size, step)
    found = {"refused": 0, "missing": 0, "whole": 0}
    for bit in bits:
        flip_bit(file, bit)
        found[read_all(path)] += 1
        flip_bit(file, bit)
    assert read_all(path) == "whole"
    assert {what for what, count in found.items() if count} <= FILES[name], found
    figure(f"{len(bits)} bits tried: {found}")


@few_or_many("step", 997, 16)
@of_every_codec
def test_verify_finds_a_flipped_bit_in_every_file(tmp_path: Path, codec: str, step: int, figure: Figure) -> None:
    """In all files of the cache, also in those that only other readers use."""
    path = small_store(tmp_path / "cache", codec)
    tried = 0
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != "lock":
            for bit in range(tried % step, 8 * file.stat().st_size, step):
                flip_bit(file, bit)
                assert not is_clean(path), (file, bit)
                flip_bit(file, bit)
                tried += 1
    assert is_clean(path)
    figure(f"{tried} bits tried, {tried} found")


@few_or_many("places", 500, 100_000)
@of_every_codec
def test_a_flipped_bit_in_a_map_is_found_when_its_frame_is_read(
    tmp_path: Path, codec: str, places: int, figure: Figure
) -> None:
    path = make_store(tmp_path / "cache", spec=make_spec(grid_hw=(14, 14)), codec=codec)
    generator, spec = random.Random(0), make_spec(grid_hw=(14, 14))
    offsets = {file: read_offsets(file) for camera in CAMERAS for file in (path / camera).rglob("c.*")}
    # Of a compressed map the four bytes behind it count too: they keep damage from the decompressor.
    unread = 4 if codec == "raw" else 0
    with GeometryStore.open(path) as store:
        whole = store.batch(range(90))
        for _ in range(places):
            row, camera, output = generator.randrange(90), generator.choice(CAMERAS), generator.choice(spec.outputs)
            file = path / camera / output / (f"c.{row // 16}" + ".0" * (3 if output == "ray" else 2))
            start, stop = offsets[file][row % 16 : row % 16 + 2]
            bit = generator.randrange(8 * start, 8 * (stop - unread))
            flip_bit(file, bit)
            episode, frame = store.locate(row)
            with pytest.raises(CacheCorruptError) as caught:
                store.batch([row])
            assert str(caught.value).startswith(f"{file}: episode {episode} frame {frame}: ")
            assert "checksum" in str(caught.value)
            flip_bit(file, bit)
        again = store.batch(range(90))
    assert all(np.array_equal(one, other) for (_, one), (_, other) in zip(whole.items(), again.items(), strict=True))
    figure(f"{places} places tried, {places} found, each by file, episode and frame")


def read_everything(store: GeometryStore) -> None:
    store.batch(range(32))
    store.signatures(range(32))


def damages(path: Path, step: int) -> Iterator[tuple[str, list[Path]]]:
    """Files of the cache, one or two of them changed at a time; the caller puts them back."""
    shards = sorted({*path.rglob("c.?.0.0*"), *path.glob("frame_crc32c/c.*"), *path.glob("picture_hash/c.*")})
    for file in shards:
        content = file.read_bytes()
        for length in range(0, len(content), 4096 * step):
            file.write_bytes(content[:length])
            yield f"cut to {length}", [file]
        file.write_bytes(content + b"\0")
        yield "longer", [file]
        file.unlink()
        yield "missing", [file]
    for one, other in itertools.islice(itertools.combinations(shards, 2), 0, None, step):
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        yield "swapped files", [one, other]


@few_or_many("step", 20, 1)
@of_every_codec
def test_cut_missing_and_swapped_shards_are_found(tmp_path: Path, codec: str, step: int, figure: Figure) -> None:
    spec = make_spec(grid_hw=(40, 40))
    path = make_store(tmp_path / "cache", spec=spec, lengths=SHORT, codec=codec)
    original = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    tried: dict[str, int] = {}
    for what, files in damages(path, step):
        with (
            GeometryStore.open(path) as store,
            pytest.raises(CacheCorruptError, match=r": episode \d+ frame \d+: "),
        ):
            read_everything(store)
        named = {path / problem.file for problem in verify(path).problems}
        assert {*files} <= named, what
        for file in files:
            file.write_bytes(original[file])
        kind = what.split(" to ")[0]
        tried[kind] = tried.get(kind, 0) + 1
    assert verify(path).problems == ()
    figure(f"all found: {tried}")


@few_or_many("step", 11, 1)
@of_every_codec
def test_swapped_and_forgotten_frames_are_found(tmp_path: Path, codec: str, step: int, figure: Figure) -> None:
    """Two frames of a shard change places with their checksums; a frame vanishes from the shard's index."""
    path = make_store(tmp_path / "cache", lengths=SHORT, codec=codec)
    swaps = forgotten = 0
    for output in ("ray", "ray_conf"):
        for file in sorted((path / CAMERAS[1] / output).glob("c.*")):
            content, offsets = file.read_bytes(), read_offsets(file)
            frames = [content[start:stop] for start, stop in itertools.pairwise(offsets)]
            index = content[offsets[-1] : -4]
            for one, other in itertools.islice(itertools.combinations(range(16), 2), 0, None, step):
                changed = list(frames)
                changed[one], changed[other] = frames[other], frames[one]
                stops = list(itertools.accumulate(map(len, changed)))
                places = [(stop - len(frame), len(frame)) for frame, stop in zip(changed, stops, strict=True)]
                file.write_bytes(b"".join(changed) + _with_checksum(np.array(places, "<u8").tobytes()))
                assert read_all(path) == "refused"
                swaps += 1
            for frame in range(0, 16, step):
                forgetful = index[: 16 * frame] + b"\xff" * 16 + index[16 * frame + 16 :]
                file.write_bytes(content[: offsets[-1]] + _with_checksum(forgetful))
                assert read_all(path) == "refused"
                forgotten += 1
            file.write_bytes(content)
    assert read_all(path) == "whole"
    figure(f"all found: {swaps} pairs of frames swapped, {forgotten} inner chunks missing")


def _with_checksum(index: bytes) -> bytes:
    return index + int(google_crc32c.value(index)).to_bytes(4, "little")


@of_every_codec
def test_swapped_shards_with_all_their_checksums_are_found(tmp_path: Path, codec: str, figure: Figure) -> None:
    """Every pair of shards, each with its own checksum table: only size or hash in the manifest tells them apart."""
    path = make_store(tmp_path / "cache", codec=codec)
    pairs = [(a, b) for a, b in itertools.combinations(range(5), 2)]  # the full ones
    for sealed in (True, False):
        if not sealed:
            (path / "manifest.json").unlink()
        for one, other in pairs:
            copy = shutil.copytree(path, tmp_path / "swapped")
            for first in sorted({*copy.rglob(f"c.{one}.0.0*"), copy / f"frame_crc32c/c.{one}.0"}):
                second = first.with_name(first.name.replace(f"c.{one}.", f"c.{other}."))
                content = first.read_bytes()
                first.write_bytes(second.read_bytes())
                second.write_bytes(content)
            with GeometryStore.open(copy) as store:
                for shard in (one, other):
                    with pytest.raises(CacheCorruptError, match=r"sha256|\d+ bytes"):
                        store.batch([16 * shard])
            assert {problem.shard for problem in verify(copy).problems} - {None} == {one, other}
            shutil.rmtree(copy)
    figure(f"{2 * len(pairs)} pairs swapped, all found")
