"""What a cache says of itself: the attributes of its root group, and the files that every cache has."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from geomcache.cache.codecs import RAW, Codec
from geomcache.cache.layout import (
    MAX_SHARD_FRAMES,
    MIN_SHARD_FRAMES,
    SCHEMA_VERSIONS,
    Layout,
    choose_shard_frames,
)
from geomcache.cache.records import Statistics, describe_statistics
from geomcache.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError, UserInputError
from geomcache.geometry import DatasetSpec, GeometrySpec, fingerprint

GROUP = "zarr.json"
LOCK = "lock"
COORDINATES = ("episode_index", "frame_index")
COORDINATE_CHUNK = 1 << 20  # rows
EPISODES = "episodes"  # the group of the episode table
EPISODE_IDENTITY = f"{EPISODES}/identity"
FEATURE_BASIS = "feature_basis"  # the array of the basis, in a cache with features
_MAX_SHARD_FRAMES_V1 = 4096
_MAX_FRAMES = 1 << 40  # ten million hours at 30 Hz; sums of so many stay far from int64's end


@dataclass(frozen=True, kw_only=True)
class Header:
    """The attributes of a cache's root group."""

    spec: GeometrySpec
    dataset: DatasetSpec
    shard_frames: int
    codec: Codec = RAW

    @classmethod
    def new(cls, spec: GeometrySpec, dataset: DatasetSpec, codec: Codec = RAW, shard_frames: int | None = None) -> Self:
        """Return the header of a new cache; without `shard_frames`, with a shard size that suits it."""
        chosen = choose_shard_frames(spec, dataset.frames) if shard_frames is None else shard_frames
        return cls(spec=spec, dataset=dataset, shard_frames=chosen, codec=codec)

    @property
    def schema_version(self) -> int:
        """Return the version of the format."""
        return self.dataset.schema_version

    @functools.cached_property
    def layout(self) -> Layout:
        """Return the layout of the shards."""
        return Layout.of(self.spec, self.dataset.frames, self.shard_frames, self.codec, self.schema_version)

    @property
    def episode_table(self) -> tuple[str, ...]:
        """Return the paths of the arrays with a number for each episode: start, length, and from version 2 identity."""
        table = (f"{EPISODES}/start", f"{EPISODES}/length")
        return table if self.schema_version == 1 else (*table, EPISODE_IDENTITY)

    @property
    def small_chunks(self) -> tuple[str, ...]:
        """Return the paths of the chunks that everybody compares who opens the cache: episode table and basis."""
        basis = () if self.spec.feature is None else (f"{FEATURE_BASIS}/c.0.0",)
        return (*(f"{name}/c.0" for name in self.episode_table), *basis)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the identity of the content."""
        return fingerprint(self.spec, self.dataset)

    def attributes(self, statistics: Statistics | None = None) -> dict[str, Any]:
        """Return the root group's attributes; with statistics for a cache that is sealed."""
        content: dict[str, Any] = {
            "schema_version": self.schema_version,
            "fingerprint": self.fingerprint,
            "shard_frames": self.shard_frames,
            "codec": self.codec.name,
            "spec": self.spec.to_dict(),
            "dataset": self.dataset.to_dict(),
        }
        if statistics:
            content["statistics"] = describe_statistics(statistics)
        return {"geomcache": content}

    def encode(self, statistics: Statistics | None = None) -> bytes:
        """Return the content of the root group's ``zarr.json``."""
        group = {"zarr_format": 3, "node_type": "group", "attributes": self.attributes(statistics)}
        return json.dumps(group, indent=2).encode()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the header of the cache in a folder.

        Raises:
            CacheNotFoundError: nothing is there.
            CacheFormatError: it is no cache, malformed, or another version's.
            CacheCorruptError: the fingerprint is not that of the settings.
        """
        path = folder / GROUP
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if not folder.exists():
                raise CacheNotFoundError(
                    f"{folder}: expected a cache, found nothing: make one with `geomcache extract --output {folder}`"
                ) from None
            raise CacheFormatError(
                f"{folder}: expected a cache, found no {GROUP} in it: name the cache's folder"
            ) from None
        try:
            data = json.loads(content)["attributes"]["geomcache"]
            version = data["schema_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CacheFormatError(
                f"{path}: expected a Zarr group with the attribute 'geomcache', found another file: name a cache that"
                " `geomcache extract` made"
            ) from None
        if version not in SCHEMA_VERSIONS or type(version) is not int:
            raise CacheFormatError(
                f"{path}: expected schema version {' or '.join(map(str, SCHEMA_VERSIONS))}, found {version!r:.80}:"
                " another version of geomcache wrote it; install that one"
            )
        return cls._parse(data, version, path)

    @classmethod
    def _parse(cls, data: dict[str, Any], version: int, path: Path) -> Self:
        frames, most_frames = data.get("shard_frames"), _MAX_SHARD_FRAMES_V1 if version == 1 else MAX_SHARD_FRAMES
        try:
            codec = Codec.of(data.get("codec"))
        except UserInputError as error:
            raise CacheFormatError(f"{path}: {error}: install a newer geomcache") from None
        if type(frames) is not int or not MIN_SHARD_FRAMES <= frames <= most_frames or frames & (frames - 1):
            raise CacheFormatError(
                f"{path}: shard_frames: expected a power of two from {MIN_SHARD_FRAMES} to {most_frames}, found"
                f" {frames!r:.80}: restore the file from a copy"
            )
        try:
            spec, dataset = GeometrySpec.from_dict(data.get("spec", {})), DatasetSpec.from_dict(data.get("dataset", {}))
            if dataset.schema_version != version:
                raise UserInputError(f"dataset: expected the fields of schema version {version}, got others")
            if version == 1 and spec.feature is not None:
                raise UserInputError("outputs: expected no features in schema version 1, got some")
            header = cls(spec=spec, dataset=dataset, shard_frames=frames, codec=codec)
            header.layout  # noqa: B018 - checks the cameras' keys
            if (most := max(dataset.frames, dataset.episodes, dataset.fps)) > _MAX_FRAMES:
                raise UserInputError(f"dataset: expected at most {_MAX_FRAMES} frames, episodes and fps, got {most}")
        except (CacheFormatError, UserInputError) as error:
            raise CacheFormatError(f"{path}: {error}: restore the file from a copy") from None
        if data.get("fingerprint") != header.fingerprint:
            raise CacheCorruptError(
                f"{path}: fingerprint: expected {header.fingerprint}, that of its spec and dataset, found"
                f" {data.get('fingerprint')!r:.80}: the file was changed; restore it from a copy"
            )
        return header

    def chunks(self) -> Iterator[str]:
        """Yield the paths of the chunks that are written when the cache is created."""
        for name in COORDINATES:
            yield from (f"{name}/c.{chunk}" for chunk in range(-(-self.dataset.frames // COORDINATE_CHUNK)))
        yield from self.small_chunks

    def metadata(self) -> tuple[str, ...]:
        """Return the paths of the metadata except the root group's."""
        basis = () if self.spec.feature is None else (FEATURE_BASIS,)
        arrays = (*self.layout.keys, *COORDINATES, *self.episode_table, *basis)
        return tuple(f"{node}/{GROUP}" for node in (*self.spec.camera_keys, EPISODES, *arrays))
