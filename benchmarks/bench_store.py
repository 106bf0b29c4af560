"""Measure what an object store and a long way to it cost: writing a cache there, and training from it without a pull.

    python benchmarks/bench_store.py [--frames 4096] [--grid 36x36] [--latency-ms 50] [--cut-mb 40] [--workers 8]
                                     [--epochs 2] [--seed 0] [--root DATASET]

Two tables. An S3 server (moto) runs in a process of its own, behind a wire that delivers everything so much later and
breaks each connection after a random number of bytes. Made-up maps of two cameras are written there shard by shard as
`geomcache extract` writes them, and the objects are compared with the files of a cache in a folder. Then a DataLoader
with that many processes draws every frame in a random order, as LeRobot does, from the local cache and the address,
with room for the whole cache and for half of it; the sampler looks ahead as in `geomcache train`. Every map of every
item is compared with what was written, and the bytes on the disk are counted all the time.

Items are maps alone: as fast as they can be, so that the store is what is measured. With --root they are what training
draws: LeRobot decodes the pictures of the same frame of that dataset too.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.common import table
from geomcache.cache.header import LOCK
from geomcache.cache.layout import crc32c
from geomcache.cache.locks import LockFile
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.geometry import OUTPUTS
from geomcache.sharing.address_writer import AddressWriter
from geomcache.sharing.fetching_store import FetchingGeometryStore, open_for_training
from tests.support.stores import as_lengths, claim_rows, make_dataset_spec, make_identities, make_signatures, make_spec

BUCKET = "bucket"
BATCH = 32


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=os.environ.get("GEOMCACHE_HOME")) as name, serving(arguments) as url:
        folder = Path(name)
        os.environ |= environment(url)
        made = write_both(folder / "local.zarr", f"s3://{BUCKET}/cache.zarr", arguments)
        way = f"{arguments.latency_ms} ms later, each connection cut after {arguments.cut_mb} MB on average"
        table(
            "Writing to an object store",
            f"{arguments.frames} frames, two cameras, {arguments.grid}; S3 by moto on loopback, {way}.",
            ["to", "s", "MB/s", "objects that differ"],
            made,
        )
        rows = train_all(folder / "local.zarr", f"s3://{BUCKET}/cache.zarr", arguments)
        table(
            "Items from an object store",
            f"A DataLoader with {arguments.workers} processes, batches of {BATCH}, every frame once an epoch; {way}."
            f" {f'With the pictures of {arguments.root.name}.' if arguments.root else 'Maps alone.'}",
            ["from", "epoch", "items/s", "of local", "most on disk, MB", "bound, MB", "wrong items"],
            rows,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=4096)
    parser.add_argument("--grid", default="36x36")
    parser.add_argument("--latency-ms", type=int, default=50)
    parser.add_argument("--cut-mb", type=float, default=40.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="folder of a LeRobotDataset with at least as many frames")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
    return arguments


def serve(arguments: argparse.Namespace) -> None:
    """Run the server and the wire, print the port, and end when standard input is closed."""
    import logging

    from moto.server import ThreadedMotoServer

    from tests.support.servers import Wire

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port()[1])
    wire.latency_s = arguments.latency_ms / 1000
    wire.cut_at_random(int(arguments.cut_mb * 1e6), arguments.seed)
    print(server.get_host_and_port()[1], wire.port, flush=True)
    sys.stdin.read()
    print(wire.cuts, flush=True)
    os._exit(0)


@contextlib.contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[str]:
    """Give the address of a server that is far away."""
    from importlib import import_module

    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    direct, far = process.stdout.readline().split()
    os.environ |= environment(f"http://127.0.0.1:{direct}")
    client = import_module("botocore.session").get_session().create_client("s3")
    client.create_bucket(Bucket=BUCKET)
    client.close()
    try:
        yield f"http://127.0.0.1:{far}"
    finally:
        out, _ = process.communicate()
        print(f"connections that were cut: {out.strip()}")


def environment(url: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }


def write_both(path: Path, address: str, arguments: argparse.Namespace) -> list[list[str]]:
    """Write the same cache to a folder and to the address; rows of the first table."""
    cells = tuple(map(int, arguments.grid.split("x")))
    spec, lengths = make_spec(grid_hw=(cells[0], cells[1])), [128] * (arguments.frames // 128)
    dataset, rows = make_dataset_spec(lengths), []
    for kind, place in ((StoreWriter, path), (AddressWriter, address)):
        began = time.perf_counter()
        with kind.create_or_open(
            place, spec, dataset, as_lengths(lengths), [(0, dataset.frames)], identities=make_identities(lengths)
        ) as writer:
            nbytes = 0
            while (claim := writer.claim()) is not None:
                nbytes += writer.commit(claim, maps_of(writer, claim), make_signatures(spec, claim_rows(claim)))
            assert writer.seal()
        seconds = time.perf_counter() - began
        differing = "" if kind is StoreWriter else str(count_differing(path, address))
        rows.append(
            [str((kind is StoreWriter and "a folder") or "S3"), f"{seconds:.1f}", f"{nbytes / 1e6 / seconds:.0f}"]
        )
        rows[-1].append(differing)
    return rows


def maps_of(writer: StoreWriter, claim: Claim) -> dict[str, dict[str, NDArray[np.float16]]]:
    """Return random maps of a claim's rows, which depend on the shard alone."""
    generator, count = np.random.default_rng(claim.shard), len(claim_rows(claim))
    maps: dict[str, dict[str, NDArray[np.float16]]] = {}
    for camera in writer.spec.camera_keys:
        for output in writer.spec.outputs:
            values = generator.standard_normal((count, *writer.spec.map_shape(output)), np.float32)
            maps.setdefault(camera, {})[output] = (1 + np.abs(values) if OUTPUTS[output].log else values).astype("f2")
    return maps


def count_differing(path: Path, address: str) -> int:
    """Return how many objects are missing, too many, or differ from the files of the local cache."""
    import fsspec

    driver, root = fsspec.url_to_fs(address)
    driver.invalidate_cache()
    there = {name.removeprefix(f"{root}/"): sha256(driver.cat_file(name)).digest() for name in driver.find(root)}
    files = {each.relative_to(path).as_posix(): each for each in path.rglob("*") if each.is_file()}
    here = {name: sha256(each.read_bytes()).digest() for name, each in files.items() if name != "lock"}
    return sum(there.get(name) != here.get(name) for name in there.keys() | here.keys())


class Items(Dataset[tuple[int, int]]):
    """A frame's row, and the checksum of its maps: reading and checking, without the cost of handing them over.

    With the root of a dataset, LeRobot reads and decodes the frame's own item too.
    """

    def __init__(self, store: GeometryStore, root: Path | None = None) -> None:
        self.store, self.dataset = store, None
        if root is not None:
            from lerobot.datasets import LeRobotDataset

            self.dataset = LeRobotDataset(root.name, root=root, video_backend="pyav")

    def __getitems__(self, rows: list[int]) -> list[tuple[int, int]]:
        if self.dataset is not None:
            for row in rows:
                self.dataset[row]
        maps = dict(self.store.batch(rows).items())
        return [
            (row, crc32c(b"".join(np.ascontiguousarray(values[number]).tobytes() for values in maps.values())))
            for number, row in enumerate(rows)
        ]

    def __len__(self) -> int:
        return self.store.dataset.frames


class Shuffled(Sampler[int]):
    """Every row once, in an order of its own each epoch, looked ahead where the store fetches."""

    def __init__(self, store: GeometryStore) -> None:
        self.store, self.epoch = store, 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = torch.randperm(self.store.dataset.frames, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        if isinstance(self.store, FetchingGeometryStore):
            return self.store.expect(iter(order), int)
        return iter(order)

    def __len__(self) -> int:
        return self.store.dataset.frames


@dataclass
class Disk:
    """Counts the bytes of shards in a folder, again and again."""

    folder: Path
    most: int = 0
    ended: bool = False

    def run(self) -> None:
        with contextlib.closing(LockFile(self.folder / LOCK)) as lock:
            while not self.ended:
                with lock.exclusive():  # nothing is removed meanwhile: what is there at one moment
                    self.most = max(self.most, sum(self._sizes().values()))
                time.sleep(0.05)

    def _sizes(self) -> dict[int, int]:
        """Return the bytes of each file of a shard, by its inode: one that gets its name meanwhile counts once."""
        sizes: dict[int, int] = {}
        for parent, _, names in os.walk(self.folder):
            if "observation" in parent or "frame_crc32c" in parent or "picture_" in parent:
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        status = (Path(parent) / name).stat()
                        sizes[status.st_ino] = status.st_size if name.startswith("c.") else 0
        return sizes


def train_all(path: Path, address: str, arguments: argparse.Namespace) -> list[list[str]]:
    """Draw epochs from the local cache and from the address; rows of the second table."""
    local = GeometryStore.open(path)
    right = dict(Items(local).__getitems__(list(range(local.dataset.frames))))
    rows, speeds = list[list[str]](), list[float]()
    for epoch, seconds, wrong in draw(local, right, arguments):
        speeds.append(len(right) / seconds)
        rows.append(["the local cache", str(epoch), f"{speeds[-1]:.0f}", "1.00", "", "", str(wrong)])
    for share in (1.2, 0.5):
        bound = int(local.nbytes * share)
        os.environ["GEOMCACHE_HOME"] = str(path.parent / f"home-{share}")  # nothing is here yet
        store = open_for_training(address, bound)
        disk = Disk(store.path)
        counter = threading.Thread(target=disk.run)
        counter.start()
        for epoch, seconds, wrong in draw(store, right, arguments):
            speed = len(right) / seconds
            ratio = f"{speed / speeds[min(epoch, len(speeds)) - 1]:.2f}"
            disk_mb = [f"{disk.most / 1e6:.1f}", f"{bound / 1e6:.1f}"]
            rows.append([f"S3, room for {share:.0%}", str(epoch), f"{speed:.0f}", ratio, *disk_mb, str(wrong)])
        disk.ended = True
        counter.join()
        store.close()
    return rows


def draw(
    store: GeometryStore, right: dict[int, int], arguments: argparse.Namespace
) -> Iterator[tuple[int, float, int]]:
    """Yield number, seconds and wrong items of each epoch, from the first batch asked for to the last that came."""
    options: dict[str, Any] = {"persistent_workers": True, "multiprocessing_context": "fork", "prefetch_factor": 4}
    loader = DataLoader(
        Items(store, arguments.root),
        batch_size=BATCH,
        sampler=Shuffled(store),
        num_workers=arguments.workers,
        collate_fn=list,
        **(options if arguments.workers else {}),
    )
    for epoch in range(1, arguments.epochs + 1):
        began, seen, wrong = time.perf_counter(), 0, 0
        for batch in loader:
            seen += len(batch)
            wrong += sum(right[row] != checksum for row, checksum in batch)
        assert seen == len(right)
        yield epoch, time.perf_counter() - began, wrong


if __name__ == "__main__":
    main()
