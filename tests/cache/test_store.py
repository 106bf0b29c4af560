"""We, zarr and tensorstore read what was written, and damaged or missing frames are errors."""

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import google_crc32c
import numpy as np
import pytest
import zarr

from geomcache.cache.codecs import CodecName
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import (
    CacheCorruptError,
    CacheFormatError,
    CacheNotFoundError,
    MissingFrameError,
    UserInputError,
)
from geomcache.geometry import OUTPUTS, Geometry, GeometrySpec
from tests.support.stores import (
    CAMERAS,
    LENGTHS,
    expected,
    fill,
    make_dataset_spec,
    make_identities,
    make_signatures,
    make_spec,
    make_store,
    open_writer,
    output_of,
    run_python,
)

SPEC = make_spec()
ROWS = ((0, 37), (40, 64), (70, 90))  # shards 2 and 4 in part; episodes 0 and 3 whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("parts") / "cache", ROWS)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("packed") / "cache", codec="zstd")


@pytest.fixture(scope="module")
def packed_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("packed-parts") / "cache", ROWS, codec="zstd")


of_every_codec = pytest.mark.parametrize("codec", get_args(CodecName))
whole_of_every_codec = pytest.mark.parametrize("path", ["whole", "packed"])
parts_of_every_codec = pytest.mark.parametrize("path", ["parts", "packed_parts"])


def assert_equal(geometry: Geometry, rows: list[int], spec: GeometrySpec = SPEC) -> None:
    wanted = expected(spec, rows)
    assert [name for name, _ in geometry.items()] == list(wanted)
    for name, values in geometry.items():
        assert (values.dtype, values.shape) == (np.dtype(np.float16), wanted[name].shape)
        assert values.flags.c_contiguous
        assert values.flags.writeable
        assert np.array_equal(values, wanted[name])


@pytest.mark.parametrize("path", ["whole", "parts", "packed", "packed_parts"])
def test_zarr_reads_every_array(path: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(path)
    group: Any = zarr.open_group(folder, mode="r")
    there = [row for start, stop in GeometryStore.open(folder).rows for row in range(start, stop)]
    missing = sorted({*range(90)} - {*there})
    wanted = expected(SPEC, there)
    for view, camera in enumerate(CAMERAS):
        for output in SPEC.outputs:
            array = group[f"{camera}/{output}"]
            assert (array.dtype, array.shape) == (np.dtype(np.float16), (90, *SPEC.map_shape(output)))
            values = array[:]
            assert np.array_equal(values[there], wanted[output][:, view])
            assert np.isnan(values[missing]).all()
    table = group["frame_crc32c"][:]
    columns = group["frame_crc32c"].attrs["columns"]
    assert columns == [f"{camera}/{output}" for camera in CAMERAS for output in SPEC.outputs]
    for column, key in enumerate(columns):
        camera, output = key.split("/")
        for at, row in enumerate(there):
            payload = wanted[output][at, CAMERAS.index(camera)].tobytes()
            assert table[row, column] == google_crc32c.value(payload)
    assert not table[missing].any()
    assert group["episode_index"][:].tolist() == [e for e, length in enumerate(LENGTHS) for _ in range(length)]
    assert group["frame_index"][:].tolist() == [frame for length in LENGTHS for frame in range(length)]
    assert group["episodes/length"][:].tolist() == list(LENGTHS)
    assert group["episodes/start"][:].tolist() == [0, 20, 50, 75]


TENSORSTORE = """
import sys
from pathlib import Path
import numpy as np
import tensorstore
folder = Path(sys.argv[1])
arrays = {}
for metadata in folder.rglob("zarr.json"):
    if '"array"' in metadata.read_text():
        key = str(metadata.parent.relative_to(folder))
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(metadata.parent)}}
        arrays[key] = tensorstore.open(spec, open=True).result().read().result()
np.savez(sys.argv[2], **arrays)
"""


@pytest.mark.parametrize("path", ["whole", "parts", "packed", "packed_parts"])
def test_tensorstore_reads_every_array_as_zarr_does(path: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(path)
    output_of(run_python(TENSORSTORE, folder, tmp_path / "arrays.npz"))  # in a child: no fork survives it here
    group: Any = zarr.open_group(folder, mode="r")
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert len(arrays) == len(CAMERAS) * len(SPEC.outputs) + 8
        for key, values in arrays.items():
            assert values.tobytes() == group[key][:].tobytes()


@parts_of_every_codec
def test_signatures_and_identities_are_what_was_written_and_what_zarr_reads(
    path: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(path)
    store, group = GeometryStore.open(folder), cast("Any", zarr.open_group(folder, mode="r"))
    rows = np.flatnonzero(store.covers(np.arange(90)))
    written = make_signatures(SPEC, rows)
    for name, values in (("picture_hash", written.hashes), ("picture_means", written.means)):
        array = group[name][:]
        assert array.dtype == values.dtype
        np.testing.assert_array_equal(array[rows], values)
        assert not np.delete(array, rows, axis=0).any()  # of missing rows
    for order in (rows, rows[::-1], [89, 3, 3, 63]):
        assert store.signatures(order).equal(make_signatures(SPEC, order)).all()
    np.testing.assert_array_equal(group["episodes/identity"][:], make_identities())
    assert store.episode_identity is not None
    np.testing.assert_array_equal(store.episode_identity, make_identities())
    with pytest.raises(MissingFrameError):
        store.signatures([0, 38])


@pytest.mark.parametrize("name", ["picture_hash/c.1.0", "picture_means/c.1.0.0.0.0"])
def test_damaged_signatures_are_told(whole: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    for damage in (_flip(name, 5), _cut(name, 8), lambda path: (path / name).unlink()):
        damage(path)
        store = GeometryStore.open(path)
        assert store.signatures([15, 32]).equal(make_signatures(SPEC, [15, 32])).all()
        with pytest.raises(CacheCorruptError, match=f"{name}: episode 0 frame 17: "):
            store.signatures([15, 17])
        assert_equal(store.batch([17]), [17])  # the maps are whole
        assert {(problem.file, problem.shard) for problem in verify(path).problems} == {(name, 1)}


@pytest.mark.parametrize(
    "rows",
    [
        [0],
        [89],
        [5, 3, 3, 89, 17, 18, 19, 20, 0, 5],
        list(range(90)),
        list(range(90))[::-1],
        [*range(10, 40), *range(12, 20)],
        [15, 16, 31, 32, 47, 48],
    ],
)
@whole_of_every_codec
def test_rows_come_in_the_order_asked_for(path: str, request: pytest.FixtureRequest, rows: list[int]) -> None:
    store = GeometryStore.open(request.getfixturevalue(path))
    assert_equal(store.batch(rows), rows)
    assert_equal(store.batch(np.array(rows, dtype=np.uint32)), rows)
    assert_equal(store.batch_plain(rows), rows)


@whole_of_every_codec
def test_no_row_gives_empty_geometry(path: str, request: pytest.FixtureRequest) -> None:
    store = GeometryStore.open(request.getfixturevalue(path))
    for geometry in (store.batch([]), store.batch_plain([])):
        assert geometry.ray.shape == (0, 2, 3, 4, 6)


@parts_of_every_codec
def test_rows_behind_gaps_are_found(path: str, request: pytest.FixtureRequest) -> None:
    store = GeometryStore.open(request.getfixturevalue(path))
    rows = [row for start, stop in ROWS for row in range(start, stop)]
    shuffled = np.random.default_rng(0).permutation(rows).tolist()
    assert_equal(store.batch(rows), rows)
    assert_equal(store.batch(shuffled), shuffled)
    assert_equal(store.batch_plain(shuffled), shuffled)


@pytest.mark.parametrize(
    ("grid_hw", "outputs", "cameras"),
    [
        ((3, 4), tuple(OUTPUTS), CAMERAS),
        ((27, 36), ("ray", "ray_conf"), CAMERAS),  # rays of more than 8 KiB, confidences of less
        ((70, 70), ("ray", "depth"), CAMERAS),  # both of more
        ((1, 1), ("ray",), ("only",)),
    ],
)
@of_every_codec
def test_every_layout_reads_as_it_was_written(
    tmp_path: Path, grid_hw: tuple[int, int], outputs: tuple[str, ...], cameras: tuple[str, ...], codec: str
) -> None:
    spec = make_spec(grid_hw=grid_hw, outputs=outputs, cameras=cameras)
    store = GeometryStore.open(make_store(tmp_path / "cache", spec=spec, lengths=(20, 20), codec=codec))
    assert store.codec == codec
    for rows in (list(range(40)), [7, 39, 7, 0, 21], [3]):
        assert_equal(store.batch(rows), rows, spec)
        assert_equal(store.batch_plain(rows), rows, spec)
    store.batch([1]).check(spec)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("descriptors", [1, 9, 16])
@pytest.mark.parametrize("grid_hw", [(3, 4), (40, 40)])
@of_every_codec
def test_few_file_descriptors_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, descriptors: int, grid_hw: tuple[int, int], codec: str
) -> None:
    spec = make_spec(grid_hw=grid_hw)
    path = make_store(tmp_path / "cache", spec=spec, codec=codec)
    monkeypatch.setattr("geomcache.cache.shard_reader.getrlimit", lambda what: (descriptors, descriptors))
    store = GeometryStore.open(path)
    before = open_files()
    rows = np.random.default_rng(0).integers(0, 90, 200).tolist()
    for _ in range(2):
        assert_equal(store.batch(rows), rows, spec)
        assert open_files() - before <= max(4, descriptors // 2)
    store.close()
    assert open_files() == before


def test_frame_index_and_locate_agree(whole: Path) -> None:
    store = GeometryStore.open(whole)
    places = [(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    assert [store.locate(row) for row in range(90)] == places
    assert [store.index(*place) for place in places] == list(range(90))
    assert_equal(store.frame(1, 3), [23])
    for wrong in ((4, 0), (-1, 0), (0, 20), (0, -1)):
        with pytest.raises(UserInputError, match=rf" {wrong[1] or wrong[0]}$"):
            store.index(*wrong)
    for row in (-1, 90):
        with pytest.raises(UserInputError, match=rf"0 to 89\b.*{row}"):
            store.locate(row)
        with pytest.raises(UserInputError, match=rf"0 to 89\b.*{row}"):
            store.batch([0, row])
        with pytest.raises(UserInputError, match=rf"0 to 89\b.*{row}"):
            store.batch_plain([0, row])


@pytest.mark.parametrize("indices", [[1.0], [[1, 2]], [True], ["1"], 3, np.zeros((1, 1), int)])
def test_only_a_row_of_integers_is_taken(whole: Path, indices: object) -> None:
    with pytest.raises(UserInputError, match=r"^indices: "):
        GeometryStore.open(whole).batch(indices)  # type: ignore[arg-type]


@parts_of_every_codec
def test_what_is_there_is_known(path: str, request: pytest.FixtureRequest) -> None:
    parts = request.getfixturevalue(path)
    store = GeometryStore.open(parts)
    assert store.sealed
    assert (store.rows, store.frames_present) == (ROWS, 81)
    assert store.episodes() == ((0, 1), (3, 4))
    assert store.missing_episodes() == ((1, 3),)
    assert store.covers([0, 36, 37, 39, 40, 63, 64, 69, 70, 89]).tolist() == [
        *(True, True, False, False, True, True, False, False, True, True)
    ]
    assert store.covers([-1, 90]).tolist() == [False, False]
    folders = (*CAMERAS, "frame_crc32c", "picture_hash", "picture_means")
    files = {file: file.stat().st_size for name in folders for file in (parts / name).rglob("c.*")}
    assert store.nbytes == sum(files.values()) == sum(store.array_nbytes.values())
    for name, nbytes in store.array_nbytes.items():
        assert nbytes == sum(size for file, size in files.items() if file.parent == parts / name)


def test_a_missing_row_is_an_error_with_the_command_that_adds_it(parts: Path) -> None:
    store = GeometryStore.open(parts)
    for read in (store.batch, store.batch_plain):
        with pytest.raises(MissingFrameError) as caught:
            read([0, 38, 5])
        for value in ("episode 1 frame 18", "81 of 90", "geomcache extract --model made-up", f"--output {parts}"):
            assert value in str(caught.value)
        assert "--episodes 1`" in str(caught.value)
    with pytest.raises(MissingFrameError, match="episode 2 frame 14"):
        store.frame(2, 14)


RAY, CONF = f"{CAMERAS[1]}/ray", f"{CAMERAS[0]}/ray_conf"
RAY_STRIDE = 3 * 4 * 6 * 2 + 4


def _edit(name: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        change(content)
        (path / name).write_bytes(content)

    return damage


def _flip(name: str, at: int) -> Callable[[Path], None]:
    def change(content: bytearray) -> None:
        content[at] ^= 16

    return _edit(name, change)


def _cut(name: str, to: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, to)


def _swap_files(one: str, other: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        first, second = (path / one).read_bytes(), (path / other).read_bytes()
        (path / one).write_bytes(second)
        (path / other).write_bytes(first)

    return damage


def _swap_frames(content: bytearray) -> None:
    first, second = slice(0, RAY_STRIDE), slice(RAY_STRIDE, 2 * RAY_STRIDE)
    content[first], content[second] = content[second], content[first]


def _forget_frame(content: bytearray) -> None:
    """The third inner chunk is not there any more, and the index says so with a good checksum."""
    index = bytearray(content[-260:-4])
    index[32:48] = b"\xff" * 16
    content[-260:] = bytes(index) + google_crc32c.value(bytes(index)).to_bytes(4, "little")


def _swap_tables(path: Path) -> None:
    """Two shards change places together with their checksums: only the journal's hash tells."""
    for name in (
        "frame_crc32c/c.{}.0",
        *(f"{c}/{o}/c.{{}}" + ".0" * len(SPEC.map_shape(o)) for c in CAMERAS for o in SPEC.outputs),
    ):
        _swap_files(name.format(0), name.format(1))(path)


# What is done, the row that is read, the file that the error names, and values in its message.
DAMAGES: dict[str, tuple[Callable[[Path], None], int, str, tuple[str, ...]]] = {
    "bit of a map": (_flip(f"{RAY}/c.1.0.0.0", 451), 19, f"{RAY}/c.1.0.0.0", ("checksum", "444")),
    "bit of a confidence": (_flip(f"{CONF}/c.5.0.0", 0), 80, f"{CONF}/c.5.0.0", ("checksum",)),
    "bit of a shard index": (_flip(f"{RAY}/c.1.0.0.0", -100), 19, f"{RAY}/c.1.0.0.0", ("index", "16 frames")),
    "bit of the index's checksum": (_flip(f"{RAY}/c.1.0.0.0", -1), 19, f"{RAY}/c.1.0.0.0", ("index", "16 frames")),
    "bit of the checksums": (_flip("frame_crc32c/c.1.0", 5), 19, "frame_crc32c/c.1.0", ("sha256",)),
    "shard cut off": (_cut(f"{RAY}/c.1.0.0.0", 2600), 19, f"{RAY}/c.1.0.0.0", ("2628 bytes", "2600")),
    "shard of no byte": (_cut(f"{RAY}/c.1.0.0.0", 0), 19, f"{RAY}/c.1.0.0.0", ("2628 bytes", "0")),
    "shard missing": (lambda path: (path / RAY / "c.1.0.0.0").unlink(), 19, f"{RAY}/c.1.0.0.0", ("none",)),
    "checksums missing": (lambda path: (path / "frame_crc32c/c.1.0").unlink(), 19, "frame_crc32c/c.1.0", ("none",)),
    "checksums of no byte": (_cut("frame_crc32c/c.1.0", 0), 19, "frame_crc32c/c.1.0", ("260 bytes", "0")),
    "inner chunk missing": (_edit(f"{RAY}/c.1.0.0.0", _forget_frame), 19, f"{RAY}/c.1.0.0.0", ("index", "16 frames")),
    "two frames swapped": (_edit(f"{RAY}/c.1.0.0.0", _swap_frames), 17, f"{RAY}/c.1.0.0.0", ("checksum",)),
    "two shards swapped": (
        _swap_files(f"{RAY}/c.1.0.0.0", f"{RAY}/c.2.0.0.0"), 19, f"{RAY}/c.1.0.0.0", ("checksum",)
    ),
    "two cameras swapped": (
        _swap_files(f"{CAMERAS[0]}/ray/c.1.0.0.0", f"{RAY}/c.1.0.0.0"), 19, f"{CAMERAS[0]}/ray/c.1.0.0.0", ("checksum",)
    ),
    "two shards swapped with checksums": (_swap_tables, 19, "frame_crc32c/c.1.0", ("sha256",)),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("sealed", [True, False])
def test_damage_is_an_error_with_file_episode_and_frame(tmp_path: Path, whole: Path, name: str, sealed: bool) -> None:
    damage, row, file, values = DAMAGES[name]
    path = shutil.copytree(whole, tmp_path / "cache")
    if not sealed:
        (path / "manifest.json").unlink()
    damage(path)
    store = GeometryStore.open(path)
    assert store.sealed == sealed
    assert_equal(store.batch([50, 70]), [50, 70])  # of other shards
    for _ in range(2):  # also when it is read again
        with pytest.raises(CacheCorruptError) as caught:
            store.batch([50, row, 70])
        episode, frame = store.locate(row)
        assert str(caught.value).startswith(f"{path / file}: episode {episode} frame {frame}: ")
        assert [value for value in values if value not in str(caught.value)] == []


def test_large_maps_are_checked_as_small_ones_are(tmp_path: Path) -> None:
    spec = make_spec(grid_hw=(40, 40))
    path = make_store(tmp_path / "cache", spec=spec, lengths=(40,))
    _flip(f"{RAY}/c.1.0.0.0", 19_204 + 19_000)(path)
    store = GeometryStore.open(path)
    assert_equal(store.batch([16, 18]), [16, 18], spec)
    with pytest.raises(CacheCorruptError, match=r"ray/c.1.0.0.0: episode 0 frame 17: .* 19204\b"):
        store.batch([16, 17, 18])


@pytest.mark.parametrize("grid_hw", [(3, 4), (40, 40)])
@pytest.mark.parametrize("rows", [[3, 30, 17], list(range(40))])
@of_every_codec
def test_short_reads_are_finished_and_failing_ones_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid_hw: tuple[int, int], rows: list[int], codec: str
) -> None:
    spec = make_spec(grid_hw=grid_hw)
    store = GeometryStore.open(make_store(tmp_path / "cache", spec=spec, lengths=(40,), codec=codec))
    store.batch(range(40))
    pread, preadv = os.pread, os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 23), at))
        patch.setattr(os, "preadv", lambda file, buffers, at, flags=0: preadv(file, [buffers[0][:23]], at, flags))
        assert_equal(store.batch(rows), rows, spec)

    def fails(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fails)
        patch.setattr(os, "preadv", fails)
        for reader in (store, GeometryStore.open(store.path)):  # at a map, and when a shard is opened
            with pytest.raises(CacheCorruptError, match=r"/c\.\d.*: episode 0 frame \d+: .*Input/output error"):
                reader.batch(rows)
    assert_equal(store.batch(rows), rows, spec)


def test_a_file_cut_off_while_it_is_open_is_told(tmp_path: Path, whole: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    store = GeometryStore.open(path)
    store.batch([19])
    _cut(f"{RAY}/c.1.0.0.0", 3 * RAY_STRIDE + 50)(path)
    with pytest.raises(CacheCorruptError, match=r"frame 19: .*144 bytes at 444.* 50\b"):
        store.batch([19])


def test_shards_that_change_places_after_they_were_read_are_told(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geomcache.cache.shard_reader.getrlimit", lambda what: (8, 8))  # one shard is open at a time
    path = shutil.copytree(whole, tmp_path / "cache")
    store = GeometryStore.open(path)
    assert_equal(store.batch([3, 19, 50]), [3, 19, 50])
    _swap_tables(path)
    with pytest.raises(CacheCorruptError, match=r"frame_crc32c/c.1.0: episode 0 frame 19: .*sha256"):
        store.batch([19])


@pytest.mark.parametrize(
    "name", ["episodes/start/c.0", "episodes/length/c.0", f"{RAY}/zarr.json", "frame_index/zarr.json", "zarr.json"]
)
def test_changed_metadata_is_told_at_once(tmp_path: Path, whole: Path, name: str) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    original = (path / name).read_bytes()
    for at in (0, 15, -9, -1):
        _flip(name, at)(path)
        with pytest.raises((CacheCorruptError, CacheFormatError), match=name):
            GeometryStore.open(path)
        (path / name).write_bytes(original)
    (path / name).unlink()
    with pytest.raises((CacheCorruptError, CacheFormatError)):
        GeometryStore.open(path)


def test_the_episode_table_of_another_dataset_is_told(tmp_path: Path) -> None:
    """Damage that every hash agrees with: the table contradicts the dataset's identity."""
    import hashlib

    path = tmp_path / "cache"
    open_writer(path).close()
    other = np.array([30, 20, 25, 15], dtype="<i8").tobytes()
    content = other + google_crc32c.value(other).to_bytes(4, "little")
    old = (path / "episodes/length/c.0").read_bytes()
    (path / "episodes/length/c.0").write_bytes(content)
    line = (path / "journal.jsonl").read_bytes()[: -len(',"crc32c":"00000000"}\n')]
    line = line.replace(hashlib.sha256(old).hexdigest().encode(), hashlib.sha256(content).hexdigest().encode())
    (path / "journal.jsonl").write_bytes(line + b',"crc32c":"%08x"}\n' % google_crc32c.value(line))
    with pytest.raises(CacheCorruptError, match=r"/episodes: .*90 frames"):
        GeometryStore.open(path)


def test_a_sealed_cache_does_without_its_journal_and_an_unsealed_one_does_not(tmp_path: Path, whole: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    (path / "journal.jsonl").unlink()
    assert_equal(GeometryStore.open(path).batch([3, 80]), [3, 80])
    (path / "manifest.json").unlink()
    with pytest.raises(CacheCorruptError, match=re.escape(str(path / "journal.jsonl"))):
        GeometryStore.open(path)


def test_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match=r"/none: .*`geomcache extract --output .*/none`"):
        GeometryStore.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(CacheFormatError, match=rf"/{name}: .*zarr.json"):
            GeometryStore.open(tmp_path / name)


def test_a_shard_that_is_made_again_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache", [(0, 24)])
    early, late = GeometryStore.open(path), GeometryStore.open(path)
    early.batch([20])
    with open_writer(path) as writer:
        fill(writer)
        assert writer.seal()
    assert_equal(early.batch([20]), [20])  # its files are still open
    with pytest.raises(CacheCorruptError, match=str(path)):
        late.batch([20])
    assert_equal(GeometryStore.open(path).batch([20, 30]), [20, 30])


def test_plain_reading_tells_of_a_missing_shard(tmp_path: Path, whole: Path) -> None:
    path = shutil.copytree(whole, tmp_path / "cache")
    (path / RAY / "c.1.0.0.0").unlink()
    with pytest.raises(CacheCorruptError, match=rf"{RAY}: .*`geomcache verify {path}`"):
        GeometryStore.open(path).batch_plain([3, 19])


def test_a_store_pickles_by_its_path(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole.parent)
    store = GeometryStore.open("cache")
    store.batch([3])
    monkeypatch.chdir("/")
    data = pickle.dumps(store)
    assert len(data) < 300
    assert_equal(pickle.loads(data).batch([3, 88]), [3, 88])


@whole_of_every_codec
def test_threads_read_at_once(path: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geomcache.cache.shard_reader.getrlimit", lambda what: (24, 24))  # three shards
    store = GeometryStore.open(request.getfixturevalue(path))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(40):
                rows = generator.integers(0, 90, 12).tolist()
                assert_equal(store.batch(rows), rows)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


CHILDREN = """
import multiprocessing
import sys
from geomcache.cache.store import GeometryStore
from tests.support.stores import expected

def read(store, rows, results):
    for _ in range(20):
        found = store.batch(rows)
        wanted = expected(store.spec, rows)
        if not all((values == wanted[name]).all() for name, values in found.items()):
            results.put("wrong")
            return
    results.put("right")

def main():
    store = GeometryStore.open(sys.argv[1])
    if sys.argv[3] == "read":
        store.batch([0, 20, 40, 60, 89])
    context = multiprocessing.get_context(sys.argv[2])
    results = context.Queue()
    children = [context.Process(target=read, args=(store, [at, 88 - at, 40], results)) for at in range(3)]
    for child in children:
        child.start()
    read(store, [5, 6, 7], results)
    print([results.get(timeout=100) for _ in range(4)])
    for child in children:
        child.join()
    assert "zarr" not in sys.modules

main()
"""


@pytest.mark.parametrize("parent", ["read", "not"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@whole_of_every_codec
def test_children_of_every_start_method_read(
    tmp_path: Path, path: str, request: pytest.FixtureRequest, method: str, parent: str
) -> None:
    assert method in multiprocessing.get_all_start_methods()
    script = tmp_path / "script.py"
    script.write_text(CHILDREN.replace("\nmain()\n", '\nif __name__ == "__main__":\n    main()\n'))
    process = run_python(
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')",
        script,
        request.getfixturevalue(path),
        method,
        parent,
    )
    assert output_of(process) == f"{['right'] * 4}\n"


def test_a_cache_of_millions_of_frames_opens_without_looking_at_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.full(10_000, 300)
    dataset = make_dataset_spec(lengths)
    rows = [(0, 10), (2_999_990, 3_000_000)]
    path = make_store(tmp_path / "cache", rows, lengths=lengths, dataset=dataset)
    group: Any = zarr.open_group(path, mode="r")
    some = np.random.default_rng(0).integers(0, 3_000_000, 100)
    assert np.array_equal(group["episode_index"].oindex[some], some // 300)
    assert np.array_equal(group["frame_index"].oindex[some], some % 300)
    for name in ("episode_index", "frame_index"):
        for file in (path / name).glob("c.*"):
            file.unlink()  # a reader has no use for them

    def listed(*arguments: object) -> None:
        raise AssertionError("a folder was listed")

    for function in ("listdir", "scandir", "walk"):
        monkeypatch.setattr(os, function, listed)
    store = GeometryStore.open(path)
    assert store.shard_frames == 4096
    assert (store.sealed, store.frames_present) == (True, 20)
    assert (store.episodes(), store.missing_episodes()) == ((), ((0, 10_000),))
    assert store.locate(2_999_999) == (9_999, 299)
    assert_equal(store.batch([2_999_999, 3, 2_999_990]), [2_999_999, 3, 2_999_990])
    with pytest.raises(MissingFrameError, match="episode 5000 frame 0"):
        store.frame(5_000, 0)


def test_the_header_tells_what_the_cache_is_of(whole: Path) -> None:
    attributes = json.loads((whole / "zarr.json").read_bytes())["attributes"]["geomcache"]
    store = GeometryStore.open(whole)
    assert attributes["spec"] == store.spec.to_dict() == SPEC.to_dict()
    assert attributes["dataset"] == store.dataset.to_dict() == make_dataset_spec().to_dict()
    assert attributes["fingerprint"] == store.fingerprint
    assert store.statistics.keys() == {"ray", "ray_conf"}
    assert store.camera_statistics.keys() == set(CAMERAS)
