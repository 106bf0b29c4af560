"""What `--codec zstd` writes: the same numbers in fewer bytes, as zarr's own Blosc codec, and no bit of it trusted."""

import json
import shutil
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.layout import Layout
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.cache.writer import StoreWriter
from geomcache.errors import CacheCorruptError, CacheMismatchError, UserInputError
from tests.support.stores import (
    CAMERAS,
    LENGTHS,
    as_lengths,
    claim_rows,
    commit,
    expected,
    fill,
    make_dataset_spec,
    make_identities,
    make_maps,
    make_spec,
    make_store,
    open_writer,
)

SPEC = make_spec()
ZSTD = Codec("zstd")
RAY = f"{CAMERAS[1]}/ray"


def smooth(rows: list[int], shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Directions that change slowly over the picture, as rays of a camera do."""
    ramp = np.linspace(-0.5, 0.5, int(np.prod(shape))).reshape(shape)
    return np.stack([ramp + row / 100 for row in rows]).astype(np.float16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("codecs") / "cache", codec="zstd")


def read_index(file: Path) -> list[list[int]]:
    """(offset, length) of the 16 inner chunks of a shard file."""
    entries: list[list[int]] = np.frombuffer(file.read_bytes()[-260:-4], "<u8").reshape(16, 2).tolist()
    return entries


def test_a_shard_file_holds_blosc_buffers_their_checksums_and_the_index() -> None:
    layout = Layout.of(make_spec(grid_hw=(8, 8)), frames=90, shard_frames=16, codec=ZSTD)
    column, local = layout.columns[0], np.array([1, 2, 7])
    maps = smooth([1, 2, 7], column.shape)
    parts, checksums = layout.encode(column, local, maps)
    content = b"".join(bytes(part) for part in parts)
    low, high = layout.size_bounds(3)[0]
    assert low <= len(content) <= high
    index = np.frombuffer(content[-260:-4], "<u8").reshape(16, 2)
    assert content[-4:] == google_crc32c.value(content[-260:-4]).to_bytes(4, "little")
    place = 0
    for slot, row in enumerate(local):
        offset, length = index[row].tolist()
        assert offset == place
        packed, stored = content[offset : offset + length - 4], content[offset + length - 4 : offset + length]
        assert stored == google_crc32c.value(packed).to_bytes(4, "little")
        assert numcodecs.Blosc().decode(packed) == maps[slot].tobytes()
        assert checksums[slot] == google_crc32c.value(maps[slot].tobytes())  # of the numbers, whatever the codec
        place += length
    assert place == len(content) - 260
    assert (np.delete(index, local, axis=0) == 2**64 - 1).all()
    assert layout.read_index(column, local, content[-260:], place).tolist() == [*index[local, 0], place]


@pytest.mark.parametrize("values", ["random bits", "one number"])
@pytest.mark.parametrize("cells", [(1, 1), (14, 14), (300, 300)])
def test_no_map_leaves_the_bounds(values: str, cells: tuple[int, int]) -> None:
    layout = Layout.of(make_spec(grid_hw=cells), frames=90, shard_frames=16, codec=ZSTD)
    local = np.arange(16)
    for column, (low, high) in zip(layout.columns, layout.size_bounds(16), strict=False):
        bits = np.random.default_rng(0).integers(0, 1 << 16, (16, *column.shape), dtype=np.uint16)
        maps = bits.view(np.float16) if values == "random bits" else np.ones((16, *column.shape), np.float16)
        parts, _ = layout.encode(column, local, maps)
        assert low <= sum(memoryview(part).nbytes for part in parts) <= high


def test_smooth_maps_take_fewer_bytes(tmp_path: Path) -> None:
    spec = make_spec(grid_hw=(36, 36), outputs=("ray",), cameras=CAMERAS[:1])
    sizes = {}
    for codec in ("raw", "zstd"):
        with open_writer(tmp_path / codec, spec=spec, codec=codec) as writer:
            while (claim := writer.claim()) is not None:
                rows = claim_rows(claim)
                nbytes = commit(writer, claim, {CAMERAS[0]: {"ray": smooth(rows, (36, 36, 6))}})
                files = [file for file in (tmp_path / codec).rglob(f"c.{claim.shard}.0*") if "epis" not in str(file)]
                assert nbytes == sum(file.stat().st_size for file in files)
            assert writer.seal()
        with GeometryStore.open(tmp_path / codec) as store:
            sizes[codec] = store.nbytes
            assert np.array_equal(store.batch([5, 77]).ray[:, 0], smooth([5, 77], (36, 36, 6)))
            assert store.fingerprint == GeometryStore.open(tmp_path / "raw").fingerprint  # the same numbers
    assert sizes["zstd"] < 0.8 * sizes["raw"]


def test_other_readers_are_told_the_codec(whole: Path) -> None:
    metadata = json.loads((whole / RAY / "zarr.json").read_bytes())
    (sharding,) = metadata["codecs"]
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert sharding["configuration"]["codecs"][1]["configuration"] == {
        "typesize": 2,
        "cname": "zstd",
        "clevel": 3,
        "shuffle": "shuffle",
        "blocksize": 0,
    }
    assert zarr.open_group(whole, mode="r").attrs["geomcache"]["codec"] == "zstd"  # type: ignore[call-overload, index]


def test_a_cache_goes_on_in_its_own_codec_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open_writer(path, [(0, 37)], codec="zstd") as writer:
        fill(writer, 2)
    with pytest.raises(CacheMismatchError, match="codec: .*zstd.* raw.*--codec"):
        open_writer(path)
    with open_writer(path, [(0, 37)], codec="zstd") as writer:
        assert fill(writer) == [2]
        assert writer.seal()
    with open_writer(path, codec="zstd") as writer:  # shard 2 is made again, with more rows
        assert fill(writer) == [2, 3, 4, 5]
        assert writer.seal()
    store = GeometryStore.open(path)
    wanted = expected(SPEC, [*range(90)])
    assert all(np.array_equal(values, wanted[name]) for name, values in store.batch(np.arange(90)).items())
    assert verify(path).problems == ()


def test_a_raw_cache_is_not_gone_on_with_compressed(tmp_path: Path) -> None:
    make_store(tmp_path / "cache", [(0, 16)])
    with pytest.raises(CacheMismatchError, match="raw.* zstd.*--codec raw"):
        open_writer(tmp_path / "cache", codec="zstd")


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(UserInputError, match="codec: .*raw.* zstd.* 'lzma'"):
        Codec.of("lzma")
    assert Codec.of("raw") == RAW


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("map", "checksum"),
        ("its checksum", "checksum"),
        ("index", "index of 16"),
        ("table", "sha256"),
    ],
)
def test_a_flipped_bit_is_told_when_read_and_when_verified(
    tmp_path: Path, whole: Path, place: str, message: str
) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    file = path / ("frame_crc32c/c.1.0" if place == "table" else f"{RAY}/c.1.0.0.0")
    offset, length = read_index(path / f"{RAY}/c.1.0.0.0")[3]
    at = {"map": offset + 20, "its checksum": offset + length - 1, "index": -30, "table": 9}[place]
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    with GeometryStore.open(path) as store:
        assert np.array_equal(store.batch([0, 89]).ray, expected(SPEC, [0, 89])["ray"])
        for _ in range(2):
            with pytest.raises(CacheCorruptError, match=f"{file}: episode 0 frame 19: .*{message}"):
                store.batch([0, 19])
    (problem,) = verify(path).problems
    assert (problem.file, problem.shard) == (str(file.relative_to(path)), 1)
    assert problem.rows == (((19, 20),) if place in ("map", "its checksum") else ((16, 32),))


def _reseal(path: Path) -> None:
    """Make hashes and sizes in the journal fit the files, as somebody who wants a reader to choke would."""
    (path / "manifest.json").unlink()
    lines = (path / "journal.jsonl").read_bytes().splitlines()
    sealed = []
    for line in lines:
        record = json.loads(line)
        del record["crc32c"]
        if record["record"] == "commit":
            names = [f"{camera}/{output}/c.{record['shard']}" for camera in CAMERAS for output in SPEC.outputs]
            names += [f"{table}/c.{record['shard']}" for table in ("frame_crc32c", "picture_hash", "picture_means")]
            files = [next(path.glob(f"{name}.0*")) for name in names]
            record["bytes"] = [file.stat().st_size for file in files]
        text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()[:-1]
        sealed.append(text + b',"crc32c":"%08x"}\n' % google_crc32c.value(text))
    (path / "journal.jsonl").write_bytes(b"".join(sealed))


OTHER = numcodecs.Blosc(cname="zstd", clevel=3, shuffle=1)  # as zarr's own codec is set up


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"\x02\x01\x21\x02" + b"\xff" * 60, "compressed map.*Blosc header"),
        (b"\0" * 20, "compressed map.*Blosc header"),
        (OTHER.encode(np.zeros(300, np.float16)), "compressed map.*144 bytes.*600"),  # of more bytes
        (OTHER.encode(np.zeros(8, np.float16)), "compressed map.*144 bytes.*16"),  # of too few bytes
        (numcodecs.Blosc("lz4").encode(np.zeros(72, np.float16)), "compressed map.*zstd"),
        (OTHER.encode(np.zeros(72, np.float16)), "checksum"),  # of other numbers
    ],
    ids=["no buffer", "zeros", "too large", "too small", "another compressor", "other numbers"],
)
def test_a_hostile_buffer_with_good_checksums_is_refused(
    tmp_path: Path, whole: Path, packed: bytes, message: str
) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    file = path / f"{RAY}/c.1.0.0.0"
    content, index = file.read_bytes(), read_index(file)
    maps = [content[offset : offset + length] for offset, length in index]
    maps[3] = packed + google_crc32c.value(packed).to_bytes(4, "little")
    stops = np.cumsum([len(each) for each in maps])
    entries = np.array([(stop - len(each), len(each)) for each, stop in zip(maps, stops, strict=True)], "<u8").tobytes()
    file.write_bytes(b"".join(maps) + entries + google_crc32c.value(entries).to_bytes(4, "little"))
    _reseal(path)
    with GeometryStore.open(path) as store, pytest.raises(CacheCorruptError, match=f"frame 19: .*{message}"):
        store.batch([19])
    (problem,) = (each for each in verify(path).problems if each.shard is not None)
    assert (problem.file, problem.rows) == (f"{RAY}/c.1.0.0.0", ((19, 20),))


def test_lengths_that_no_map_has_are_refused(tmp_path: Path, whole: Path) -> None:
    """An index with a good checksum that promises terabytes, or maps that overlap."""
    file = f"{RAY}/c.1.0.0.0"
    for number, change in enumerate(([2**40, 2**41], [0, 100], [2**64 - 1, 2**64 - 1])):
        path = shutil.copytree(whole, tmp_path / str(number))
        entries = read_index(path / file)
        entries[3] = change
        index = np.array(entries, "<u8").tobytes()
        checksum = google_crc32c.value(index).to_bytes(4, "little")
        (path / file).write_bytes((path / file).read_bytes()[:-260] + index + checksum)
        with GeometryStore.open(path) as store:
            with pytest.raises(CacheCorruptError, match=" 16 frames"):
                store.batch([17])
            assert np.array_equal(store.batch([40]).ray, expected(SPEC, [40])["ray"])
        assert {problem.rows for problem in verify(path).problems} == {((16, 32),)}


def test_a_writer_takes_its_codec_by_object(tmp_path: Path) -> None:
    dataset = make_dataset_spec()
    with StoreWriter.create_or_open(
        tmp_path / "cache", SPEC, dataset, as_lengths(LENGTHS), [(0, 16)], identities=make_identities(), codec=ZSTD
    ) as writer:
        claim = writer.claim()
        assert claim is not None
        commit(writer, claim, make_maps(SPEC, range(16)))
    assert GeometryStore.open(tmp_path / "cache").codec == "zstd"
