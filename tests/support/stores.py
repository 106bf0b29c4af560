"""Specs, datasets and caches of made-up numbers. Imports neither torch nor LeRobot."""

import functools
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.cache import durable
from geomcache.cache.codecs import Codec
from geomcache.cache.signatures import BLOCKS, Signatures
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.geometry import FEATURE, OUTPUTS, Camera, DatasetSpec, GeometrySpec
from tests.support.geometry import example_basis, example_feature_spec

CAMERAS = ("observation.images.front", "observation.images.wrist")
LENGTHS = (20, 30, 25, 15)  # 90 rows: five shards of 16 and one of 10

MadeUpMaps = dict[str, dict[str, NDArray[np.float16]]]
"""Camera -> output -> [n, h, w, 6] or [n, h, w]."""


def make_spec(
    *,
    grid_hw: tuple[int, int] = (3, 4),
    outputs: tuple[str, ...] = ("ray", "ray_conf"),
    cameras: Sequence[str] = CAMERAS,
    **fields: Any,
) -> GeometrySpec:
    """A spec that names a model nobody has."""
    values: dict[str, Any] = {
        "model_id": "made-up",
        "model_revision": None,
        "model_name": "da3-small",
        "weights_sha256": "00" * 32,
        "da3_version": "0.1.1",
        "views": "joint",
        "cameras": tuple(Camera(key=key, height=48, width=64) for key in cameras),
        "process_res": 56,
        "grid": f"{grid_hw[0]}x{grid_hw[1]}",
        "grid_hw": grid_hw,
        "outputs": outputs,
        "compute_dtype": "fp32",
        "feature": example_feature_spec() if FEATURE in outputs else None,
    }
    return GeometrySpec(**(values | fields))


def as_lengths(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(lengths, dtype=np.int64)


def make_dataset_spec(lengths: Sequence[int] | NDArray[np.int64] = LENGTHS, **fields: Any) -> DatasetSpec:
    """A dataset of episodes of these lengths."""
    array = as_lengths(lengths)
    values: dict[str, Any] = {
        "repo_id": "tests/made-up",
        "revision": None,
        "frames": int(array.sum()),
        "episodes": len(array),
        "fps": 10,
        "episodes_sha256": hashlib.sha256(array.astype("<i8").tobytes()).hexdigest(),
        "decoder": "image",
    }
    if "images_sha256" not in fields:
        values["identities_sha256"] = hashlib.sha256(make_identities(array).tobytes()).hexdigest()
    return DatasetSpec(**(values | fields))


def make_identities(lengths: Sequence[int] | NDArray[np.int64] = LENGTHS) -> NDArray[np.uint64]:
    """An identity of every episode that depends on its number and length alone."""
    seeds = [f"{number} {length}".encode() for number, length in enumerate(lengths)]
    return np.array([int.from_bytes(hashlib.sha256(seed).digest()[:8], "little") for seed in seeds], "<u8")


def make_signatures(spec: GeometrySpec, rows: Iterable[int]) -> Signatures:
    """Random signatures that depend on the row and the number of views alone."""
    parts = []
    for row in rows:
        generator = np.random.default_rng((int(row), 77))
        parts.append(
            Signatures(
                hashes=generator.integers(0, 2**64, size=(1, len(spec.cameras)), dtype=np.uint64),
                means=generator.integers(0, 256, size=(1, len(spec.cameras), BLOCKS, BLOCKS, 3), dtype=np.uint8),
            )
        )
    return Signatures(
        hashes=np.concatenate([part.hashes for part in parts]), means=np.concatenate([part.means for part in parts])
    )


def commit(writer: StoreWriter, claim: Claim, maps: Mapping[str, Mapping[str, NDArray[np.float16]]]) -> int:
    """Commit maps with `make_signatures`; the bytes of the shard's files."""
    return writer.commit(claim, maps, make_signatures(writer.spec, claim_rows(claim)))


def make_maps(spec: GeometrySpec, rows: Iterable[int]) -> MadeUpMaps:
    """Random maps that depend on row, camera and output alone."""
    maps: MadeUpMaps = {}
    for view, camera in enumerate(spec.camera_keys):
        for number, output in enumerate(spec.outputs):
            values = [_map(spec, output, (int(row), view, number)) for row in rows]
            maps.setdefault(camera, {})[output] = np.stack(values)
    return maps


@functools.lru_cache(maxsize=10_000)
def _map(spec: GeometrySpec, output: str, seed: tuple[int, ...]) -> NDArray[np.float16]:
    values = np.random.default_rng(seed).normal(size=spec.map_shape(output))
    return (1.0 + np.exp(values) if OUTPUTS[output].log else values).astype(np.float16)


def claim_rows(claim: Claim) -> list[int]:
    return [row for start, stop in claim.rows for row in range(start, stop)]


def fill(writer: StoreWriter, shards: int | None = None) -> list[int]:
    """Commit what can be claimed, at most so many shards; which."""
    made: list[int] = []
    while (shards is None or len(made) < shards) and (claim := writer.claim()) is not None:
        commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
        made.append(claim.shard)
    return made


def open_writer(
    path: Path,
    wanted: Iterable[tuple[int, int]] | None = None,
    *,
    spec: GeometrySpec | None = None,
    lengths: Sequence[int] = LENGTHS,
    dataset: DatasetSpec | None = None,
    identities: NDArray[np.uint64] | None = None,
    codec: str = "raw",
    overwrite: bool = False,
) -> StoreWriter:
    spec, dataset = spec or make_spec(), dataset or make_dataset_spec(lengths)
    rows = [(0, dataset.frames)] if wanted is None else wanted
    return StoreWriter.create_or_open(
        path,
        spec,
        dataset,
        as_lengths(lengths),
        rows,
        identities=make_identities(lengths) if identities is None else identities,
        feature_basis=None if spec.feature is None else example_basis(),
        codec=Codec.of(codec),
        overwrite=overwrite,
    )


def make_store(path: Path, wanted: Iterable[tuple[int, int]] | None = None, **options: Any) -> Path:
    """A sealed cache of `make_maps`."""
    with open_writer(path, wanted, **options) as writer:
        fill(writer)
        assert writer.seal()
    return path


def expected(spec: GeometrySpec, rows: Sequence[int]) -> dict[str, NDArray[np.float16]]:
    """What `GeometryStore.batch` gives: [n, V, h, w(, 6)] by output."""
    maps = make_maps(spec, rows)
    return {output: np.stack([maps[camera][output] for camera in spec.camera_keys], axis=1) for output in spec.outputs}


class Killed(BaseException):
    """Ends a process in the middle of a file operation, as far as that can be played in one process."""


class Faults:
    """Counts the file operations of `durable`, and makes one of them fail."""

    OPERATIONS = ("open_file", "write", "fsync", "truncate", "rename", "exchange", "link", "unlink", "remove_tree")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.at: int | None = None
        """Which operation fails, from 0 on."""
        self.error: BaseException = Killed()
        self.dead = False
        """After a kill every operation fails: a dead process cleans nothing up."""
        patch.setattr(durable, "fsync", lambda descriptor: None)  # no test cuts the power
        for name in self.OPERATIONS:
            patch.setattr(durable, name, self._wrap(getattr(durable, name)))

    def _wrap(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if self.dead or self.count == self.at:
                self.dead = isinstance(self.error, Killed)
                self.count += 1
                raise self.error
            self.count += 1
            return operation(*arguments)

        return wrapped

    def start(self, at: int | None = None, error: BaseException | None = None) -> None:
        """Count from 0 again, and fail at this operation."""
        self.count, self.at, self.error, self.dead = 0, at, error or Killed(), False


def run_python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A script in a process of its own, with the tests' helpers at hand; its output comes as text."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def output_of(process: subprocess.Popen[str], timeout: float = 120) -> str:
    """What it printed, when it has ended well."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out
