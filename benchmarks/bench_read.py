"""How fast are random frames read, compared with the alternatives, with every checksum checked?

    python benchmarks/bench_read.py [--grids 14x14,36x36,288x288] [--batches 1,32,256] [--seconds 0.6] [--folder DIR]

One table. The same made-up rays and confidences of two cameras lie on disk as a geomcache store (read by
`GeometryStore`, by zarr-python, by tensorstore, and by bare `preadv`), as one with the codec zstd (read by
`GeometryStore`), as HDF5 with gzip, as one `.pt` file a frame and as raw arrays for `numpy.memmap`. Every way gives
float16 [n, 2, h, w, 6] and [n, 2, h, w] of the same random frames; before anything is timed all are compared with what
was written.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import h5py
import numpy as np
import tensorstore
import torch
import zarr
from numpy.typing import NDArray

from benchmarks.common import table
from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.signatures import Signatures
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import StoreWriter
from geomcache.geometry import Camera, DatasetSpec, GeometrySpec

CAMERAS = ("observation.images.front", "observation.images.wrist")
OUTPUTS = ("ray", "ray_conf")
PAYLOAD = 256 << 20  # bytes of each store, so that a batch of 256 is a small part of the frames
LEAST_FRAMES, MOST_FRAMES = 320, 8192
EPISODE = 128  # frames
REPEATS = (3, 200)  # of each way and batch size, whatever the time
ROUNDS = 3

Maps = dict[str, NDArray[np.float16]]  # output -> [n, V, h, w(, 6)]
Rows = NDArray[np.int64]


class Way(ABC):
    """A format on disk and a way of reading it."""

    name: str

    def __init__(self, folder: Path, cells: tuple[int, int], frames: int) -> None:
        self.folder, self.cells, self.frames = folder, cells, frames

    def shape(self, output: str, rows: int) -> tuple[int, ...]:
        """Return the shape of an output of so many frames."""
        return (rows, len(CAMERAS), *self.cells, *((6,) if output == "ray" else ()))

    def forget(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what keeps pages of files in memory."""

    @abstractmethod
    def read(self, rows: Rows) -> Maps:
        """Read these frames, in this order."""


class Geomcache(Way):
    name = "geomcache"
    cache = "cache.zarr"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.store = GeometryStore.open(self.folder / self.cache)

    def read(self, rows: Rows) -> Maps:
        return dict(self.store.batch(rows).items())


class Compressed(Geomcache):
    name = "geomcache, zstd"
    cache = "packed.zarr"


class StockZarr(Way):
    name = "zarr-python"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        group = zarr.open_group(self.folder / "cache.zarr", mode="r")
        self.arrays: dict[str, list[Any]] = {name: [group[f"{key}/{name}"] for key in CAMERAS] for name in OUTPUTS}

    def read(self, rows: Rows) -> Maps:
        return {
            name: np.stack([array.oindex[rows] for array in arrays], axis=1) for name, arrays in self.arrays.items()
        }


class TensorStore(Way):
    """Reads all arrays at once, with a cache too small for the data and large enough for every shard's index."""

    name = "tensorstore"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 8 << 20}})
        self.arrays: dict[str, list[Any]] = {name: [] for name in OUTPUTS}
        for name in OUTPUTS:
            for key in CAMERAS:
                path = str(self.folder / "cache.zarr" / key / name)
                spec = {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": path},
                    "recheck_cached_data": "open",
                    "recheck_cached_metadata": "open",
                }
                self.arrays[name].append(tensorstore.open(spec, context=context, read=True).result())

    def read(self, rows: Rows) -> Maps:
        reads = {name: [array[rows].read() for array in arrays] for name, arrays in self.arrays.items()}
        return {name: np.stack([read.result() for read in of_views], axis=1) for name, of_views in reads.items()}


class H5py(Way):
    name = "h5py, gzip"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        path = self.folder / "maps.h5"
        if not path.exists():
            with h5py.File(path, "w") as file, GeometryStore.open(self.folder / "cache.zarr") as store:
                for name in OUTPUTS:
                    file.create_dataset(
                        name, self.shape(name, self.frames), "f2", chunks=self.shape(name, 1), compression="gzip"
                    )
                for row in range(self.frames):
                    for name, values in store.batch([row]).items():
                        file[name][row] = values[0]
        self.file = h5py.File(path, "r")

    def read(self, rows: Rows) -> Maps:
        maps = {name: np.empty(self.shape(name, len(rows)), np.float16) for name in OUTPUTS}
        for name, values in maps.items():
            data = self.file[name]
            for at, row in enumerate(rows.tolist()):  # faster than an index list, which h5py wants sorted
                data.read_direct(values, np.s_[row], np.s_[at])
        return maps


class PtFiles(Way):
    name = "one .pt a frame"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.files = self.folder / "pt"
        if not self.files.exists():
            self.files.mkdir()
            with GeometryStore.open(self.folder / "cache.zarr") as store:
                for row in range(self.frames):
                    maps = {name: torch.from_numpy(values[0].copy()) for name, values in store.batch([row]).items()}
                    torch.save(maps, self.files / f"{row}.pt")

    def read(self, rows: Rows) -> Maps:
        frames = [torch.load(self.files / f"{row}.pt") for row in rows.tolist()]
        return {name: torch.stack([frame[name] for frame in frames]).numpy() for name in OUTPUTS}


class Memmap(Way):
    name = "numpy.memmap"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name in OUTPUTS:
            path = self.folder / f"{name}.raw"
            if not path.exists():
                with GeometryStore.open(self.folder / "cache.zarr") as store, path.open("wb") as file:
                    for row in range(self.frames):
                        file.write(getattr(store.batch([row]), name).tobytes())
        self.forget()

    def forget(self) -> None:
        self.arrays: Maps = {}  # mapped pages would stay
        for name in OUTPUTS:
            self.arrays[name] = np.memmap(
                self.folder / f"{name}.raw", np.float16, "r", shape=self.shape(name, self.frames)
            )

    def read(self, rows: Rows) -> Maps:
        return {name: np.asarray(array[rows]) for name, array in self.arrays.items()}


class BarePreadv(Way):
    """The least that positioned reads of the store's own bytes can take: offsets computed before, nothing checked."""

    name = "bare preadv"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        store = self.folder / "cache.zarr"
        self.frames_of_shard = GeometryStore.open(store).shard_frames
        self.buffers: dict[int, Maps] = {}
        self.descriptors: dict[tuple[str, str, int], int] = {}
        for key in CAMERAS:
            for name in OUTPUTS:
                for file in (store / key / name).glob("c*"):
                    self.descriptors[key, name, int(file.name.split(".")[1])] = os.open(file, os.O_RDONLY)

    def prepare(self, rows: Rows) -> tuple[Maps, list[tuple[int, list[memoryview], int]]]:
        """Return the maps to fill, and (descriptor, place, offset) of each read."""
        maps = self.buffers.setdefault(
            len(rows), {name: np.zeros(self.shape(name, len(rows)), np.float16) for name in OUTPUTS}
        )
        reads = []
        for name, values in maps.items():
            places = values.view(np.uint8).reshape(len(rows), len(CAMERAS), -1)
            stride = places.shape[2] + 4  # the crc32c after each map
            for view, key in enumerate(CAMERAS):
                for at, row in enumerate(rows.tolist()):
                    shard, slot = divmod(row, self.frames_of_shard)
                    reads.append((self.descriptors[key, name, shard], [places[at, view]], slot * stride))
        return maps, reads

    def read(self, rows: Rows) -> Maps:
        maps, reads = self.prepare(rows)
        self.run(reads)
        return maps

    @staticmethod
    def run(reads: Sequence[tuple[int, list[memoryview], int]]) -> None:
        """Run the reads, which is all that is timed."""
        for descriptor, place, offset in reads:
            os.preadv(descriptor, place, offset)


WAYS = (Geomcache, Compressed, StockZarr, TensorStore, H5py, PtFiles, Memmap, BarePreadv)


def made_up_spec(cells: tuple[int, int], cameras: int = len(CAMERAS)) -> GeometrySpec:
    """Return a spec that names a model nobody has."""
    return GeometrySpec(
        model_id="made-up",
        model_revision=None,
        model_name="da3-small",
        weights_sha256="00" * 32,
        da3_version="0.1.1",
        views="joint",
        cameras=tuple(Camera(key=key, height=256, width=256) for key in CAMERAS[:cameras]),
        process_res=504,
        grid="x".join(map(str, cells)),
        grid_hw=cells,
        outputs=OUTPUTS,
        compute_dtype="fp32",
    )


@dataclass(frozen=True)
class MadeUpDataset:
    """A dataset that nobody has, as a cache describes it."""

    spec: DatasetSpec
    lengths: NDArray[np.int64]
    """[E] frames of each episode."""
    identities: NDArray[np.uint64]
    """[E]."""


def made_up_dataset(frames: int, episode: int) -> MadeUpDataset:
    """Return a dataset of episodes of this length, the last one perhaps shorter."""
    lengths = np.diff(np.r_[np.arange(0, frames, episode), frames]).astype(np.int64)
    identities = np.arange(1, len(lengths) + 1, dtype=np.uint64)
    spec = DatasetSpec(
        repo_id="bench",
        revision=None,
        frames=frames,
        episodes=len(lengths),
        fps=10,
        episodes_sha256=hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
        identities_sha256=hashlib.sha256(identities.astype("<u8").tobytes()).hexdigest(),
        decoder="image",
    )
    return MadeUpDataset(spec, lengths, identities)


def made_up_signatures(rng: np.random.Generator, frames: int, cameras: int = len(CAMERAS)) -> Signatures:
    """Return signatures that fit no picture."""
    signatures = Signatures.empty(frames, cameras)
    signatures.hashes[:] = rng.integers(0, 1 << 63, signatures.hashes.shape, np.uint64)
    signatures.means[:] = rng.integers(0, 256, signatures.means.shape, np.uint8)
    return signatures


def write_store(path: Path, cells: tuple[int, int], frames: int, codec: Codec = RAW) -> GeometryStore:
    """Write a cache of made-up maps, smooth as rays are, with noise."""
    dataset = made_up_dataset(frames, EPISODE)
    rng = np.random.default_rng(0)
    with StoreWriter.create_or_open(
        path,
        made_up_spec(cells),
        dataset.spec,
        dataset.lengths,
        [(0, frames)],
        identities=dataset.identities,
        codec=codec,
    ) as writer:
        while (claim := writer.claim()) is not None:
            count = sum(stop - start for start, stop in claim.rows)
            maps = {key: _made_up(rng, cells, count) for key in CAMERAS}
            writer.commit(claim, maps, made_up_signatures(rng, count))
        writer.seal()
    return GeometryStore.open(path)


def _made_up(rng: np.random.Generator, cells: tuple[int, int], count: int) -> Maps:
    y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in cells), indexing="ij")
    smooth = np.stack([x, y, np.ones_like(x), 0 * x, 0 * x, 0 * x], axis=-1)
    move = rng.normal(size=(count, 1, 1, 6)).astype(np.float32)
    noise = rng.standard_normal((count, *cells, 6), np.float32) * 0.01
    conf = 1 + np.abs(rng.standard_normal((count, *cells), np.float32))
    return {"ray": (smooth + move + noise).astype(np.float16), "ray_conf": conf.astype(np.float16)}


def compare(ways: Sequence[Way], batches: Sequence[Rows]) -> None:
    """Exit where the ways do not all give the same values."""
    for rows in batches:
        expected = ways[0].read(rows)
        for way in ways[1:]:
            for name, values in way.read(rows).items():
                if not np.array_equal(values.view(np.uint16), expected[name].view(np.uint16)):
                    raise SystemExit(f"{way.name}: other values than {ways[0].name}'s: nothing is timed")


def seconds(way: Way, rows: Rows) -> float:
    if isinstance(way, BarePreadv):
        reads = way.prepare(rows)[1]
        began = time.perf_counter()
        way.run(reads)
        return time.perf_counter() - began
    began = time.perf_counter()
    way.read(rows)
    return time.perf_counter() - began


def measure(ways: Sequence[Way], batches: Sequence[Rows], budget_s: float, cold: Path | None) -> list[float]:
    """Return the median seconds of each way; `cold` is a folder whose files leave the page cache before each read.

    One way after the other, so that another way's memory traffic is not in a way's time, and that in rounds, so that a
    slow minute of the machine is not one way's alone.
    """
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(ROUNDS):
        for way, found in zip(ways, times, strict=True):
            if cold is None:
                for rows in batches[:3]:
                    seconds(way, rows)
            began, least = len(found), REPEATS[0] * (turn + 1) // ROUNDS
            while len(found) < least or (
                sum(found[began:]) < budget_s / ROUNDS and len(found) < REPEATS[1] * (turn + 1) // ROUNDS
            ):
                if cold is not None:
                    way.forget()
                    drop_pages(cold)
                found.append(seconds(way, batches[len(found) % len(batches)]))
    return [statistics.median(found) for found in times]


def drop_pages(folder: Path) -> None:
    """Drop these files from the page cache. They are on disk: nothing is lost."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def grid_rows(cells: tuple[int, int], batches: Sequence[int], folder: Path, budget_s: float) -> tuple[list[Any], str]:
    """Return the table's rows for one grid, and a line on bytes."""
    frame_nbytes = len(CAMERAS) * cells[0] * cells[1] * 7 * 2
    frames = max(LEAST_FRAMES, min(PAYLOAD // frame_nbytes, MOST_FRAMES))
    raw = write_store(folder / "cache.zarr", cells, frames)
    packed = write_store(folder / "packed.zarr", cells, frames, Codec("zstd"))
    ways = [way(folder, cells, frames) for way in WAYS]
    os.sync()  # only what is on disk can leave the page cache
    rng = np.random.default_rng(1)
    name = "x".join(map(str, cells))
    rows = []
    for size in batches:
        drawn = [rng.choice(frames, size, replace=False) for _ in range(16)]
        compare(ways, drawn[:1])
        for cold in (False, True) if size == 32 else (False,):
            medians = measure(ways, drawn, budget_s, folder if cold else None)
            ratios = [f"{found / medians[0]:.2f}" for found in medians[1:]]
            rows.append([name, str(size), "cold" if cold else "warm", f"{medians[0] * 1e3:.3f}", *ratios])
    here, there = (
        sum(file.stat().st_size for part in (*CAMERAS, "frame_crc32c") for file in (path / part).rglob("c.*"))
        / (frames * frame_nbytes)
        for path in (raw.path, packed.path)
    )
    return rows, f"{name}: {here:.4f} bytes on disk for one of payload, {there:.4f} with zstd ({frames} frames)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", default="14x14,36x36,288x288")
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--seconds", type=float, default=0.6, help="for each cell of the table (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write the stores; a temporary one where none is given")
    arguments = parser.parse_args()
    parent = Path(tempfile.mkdtemp(prefix="bench-read-", dir=arguments.folder))
    rows, notes = [], []
    try:
        for text in arguments.grids.split(","):
            height, width = map(int, text.split("x"))
            folder = parent / text
            folder.mkdir()
            found, note = grid_rows(
                (height, width), [int(size) for size in arguments.batches.split(",")], folder, arguments.seconds
            )
            rows += found
            notes.append(note)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    table(
        "Random frames of two views, every checksum checked",
        "Rays and confidences, float16. Median over random batches, each way alone after a warm-up, in three rounds;"
        " for cold rows the files leave the page cache before each read (posix_fadvise). Columns after the first time:"
        " how many times as long each takes. A bare `preadv` checks nothing and has its places worked out before: that"
        " column is the share of its speed that is reached.",
        ["grid", "batch", "pages", f"{WAYS[0].name}, ms", *(f"{way.name}, times" for way in WAYS[1:])],
        rows,
    )
    for note in notes:
        print(note)


if __name__ == "__main__":
    main()
