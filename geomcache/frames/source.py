"""Find a LeRobotDataset (v3.0), in a folder or on the Hub, and describe it.

`open_dataset` opens the frames for stage one; `describe_dataset` returns the identity by which both stages compare
caches. Both kinds of images are read: `video` features, and `image` features embedded in the data files.
"""

import hashlib
import json
import logging
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.layout import SCHEMA_VERSION
from geomcache.errors import DatasetError, DatasetNotFoundError, did_you_mean, one_line
from geomcache.frames.reader import DECODER, TOLERANCE_S, FrameReader, VideoColumn
from geomcache.geometry import Camera, DatasetSpec, canonical_json, check_camera_key
from geomcache.progress import human_bytes
from geomcache.ranges import parse_episodes, rows_of
from geomcache.waits import hub_call

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

logger = logging.getLogger(__name__)

IDENTITY_STATISTICS = ("count", "max", "mean", "min", "std")
"""Columns of the episode table that tell a camera's pictures of one episode from others. Not the quantiles: a script of
LeRobot adds them to a dataset later."""


@dataclass(frozen=True, kw_only=True)
class FrameDataset:
    """A dataset whose files are on this machine, and its description."""

    spec: DatasetSpec
    spec_v1: DatasetSpec
    """The same as schema version 1 of the cache format describes it."""
    identities: NDArray[np.uint64]  # [E], see `episode_identities`
    reader: FrameReader
    without_quantiles: tuple[str, ...] = ()
    """Of state and actions, those whose quantiles the dataset's statistics lack: Pi0.5 normalises by them."""
    root: Path | None
    """Its folder; None for a dataset of the Hub."""

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The cameras asked for, in order."""
        return self.reader.cameras

    def describe(self, schema_version: int) -> DatasetSpec:
        """Return the description for a cache of this schema version."""
        return self.spec_v1 if schema_version == 1 else self.spec

    def rows(self, episodes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Convert ranges of episodes to ranges of rows, both half open."""
        ends = self.reader.episode_start + self.reader.episode_length
        return [(int(self.reader.episode_start[first]), int(ends[last - 1])) for first, last in episodes]


def open_dataset(
    repo_id: str,
    *,
    root: Path | None = None,
    revision: str | None = None,
    cameras: Sequence[str] | None = None,
    episodes: str | None = None,
    tolerance_s: float = TOLERANCE_S,
    meta: "LeRobotDatasetMetadata | None" = None,
) -> tuple[FrameDataset, list[tuple[int, int]]]:
    """Find a dataset, in a folder or on the Hub, with the files that the requested episodes need.

    Args:
        repo_id: its name; only a label if `root` is given.
        root: a folder on this machine; nothing is downloaded then.
        revision: branch, tag or commit on the Hub.
        cameras: keys in the order of the views; None for all colour cameras of the dataset, in its order.
        episodes: such as ``0:100`` or ``0,3,5:8``; None for all.
        tolerance_s: how far the time stamp of a video's frame may be off, in seconds; LeRobot's option of that name.
        meta: what `open_metadata` returned for it; None to read that here.

    Returns:
        The dataset and the ranges of episodes that were asked for.

    Raises:
        DatasetNotFoundError: there is no such folder or Hub dataset, or the Hub cannot be reached.
        DatasetError: it is not a dataset, has another version, lacks a camera, or misses files.
        UserInputError: the episodes are malformed or out of range.
    """
    meta = meta or open_metadata(repo_id, root, revision)
    keys = _choose_cameras(meta, cameras)
    wanted = parse_episodes(episodes, int(meta.total_episodes))
    reader = _make_reader(meta, keys, tolerance_s)
    _require_files(meta, reader, wanted, local=root is not None)
    identities = episode_identities(meta, keys)
    dataset = FrameDataset(
        spec=_describe(meta, keys, DECODER, identities_sha256=hash_identities(identities)),
        spec_v1=describe_dataset(meta, keys, schema_version=1),
        identities=identities,
        reader=reader,
        without_quantiles=tuple(
            key
            for key in ("observation.state", "action")
            if key in meta.features and not {"q01", "q99"} <= {*(meta.stats or {}).get(key, {})}
        ),
        root=local_root(meta),
    )
    return dataset, wanted


def _choose_cameras(meta: "LeRobotDatasetMetadata", cameras: Sequence[str] | None) -> list[str]:
    """Check the requested cameras, or choose all colour ones; log which are left out."""
    others = _describe_other_cameras(meta)
    known = [key for key in meta.camera_keys if key not in others]
    for key in cameras or ():
        check_camera_key(key)
        if key in others:
            raise DatasetError(
                f"dataset {meta.repo_id}: camera {key}: expected 3 channels, got {others[key]}: choose among"
                f" {', '.join(known) or 'none'}"
            )
        if key not in known:
            raise DatasetError(
                f"dataset {meta.repo_id}: {did_you_mean(key, known)}expected a camera, got {key!r}; it has"
                f" {', '.join(known) or 'none'}"
            )
    if cameras:
        if len({*cameras}) < len(cameras):
            raise DatasetError(f"dataset {meta.repo_id}: cameras: expected each once, got {', '.join(cameras)}")
        return list(cameras)
    if others:
        left_out = ", ".join(f"{key} ({kind})" for key, kind in others.items())
        logger.info("dataset %s: left out, as DA3 takes colour images: %s", meta.repo_id, left_out)
    if not known:
        raise DatasetError(
            f"dataset {meta.repo_id}: expected at least one colour camera (a video or image feature), found none"
        )
    return known


def _describe_other_cameras(meta: "LeRobotDatasetMetadata") -> dict[str, str]:
    """Return the cameras that DA3 cannot take, by key, each with what it is instead."""
    others = {}
    for key in meta.camera_keys:
        channels = _image_shape(meta, key)[2]
        if key in meta.depth_keys:
            others[key] = "a depth map"
        elif channels != 3:
            others[key] = f"{channels} channel{'s' if channels != 1 else ''}"
    return others


def episode_lengths(meta: "LeRobotDatasetMetadata") -> NDArray[np.int64]:
    """Return the number of frames of every episode, int64 [E].

    Raises:
        DatasetError: the episodes do not follow each other in the episode table.
    """
    starts, stops = _column(meta, "dataset_from_index"), _column(meta, "dataset_to_index")
    lengths: NDArray[np.int64] = stops - starts
    expected = np.cumsum(lengths) - lengths
    if len(lengths) != meta.total_episodes or not np.array_equal(starts, expected) or stops[-1] != meta.total_frames:
        raise DatasetError(
            f"dataset {meta.repo_id}: expected episodes that follow each other from index 0 to {meta.total_frames},"
            " found gaps or overlaps in meta/episodes: the dataset is damaged"
        )
    return lengths


def episode_identities(meta: "LeRobotDatasetMetadata", camera_keys: Sequence[str]) -> NDArray[np.uint64]:
    """Return what tells each episode's pictures from those of others, as far as the dataset's metadata say it.

    It is a hash of the episode's length, the cameras with their dtypes and shapes, and the statistics of their pictures
    in the episode table, which LeRobot computes when it records an episode and keeps when it copies one. Equal pictures
    may have different identities: the pictures' signatures decide.

    Returns:
        uint64 [E]: the first 8 bytes, little-endian, of the sha256 of the canonical JSON that docs/cache-format.md
        shows; 0 for an episode whose statistics are missing.
    """
    lengths = episode_lengths(meta).tolist()
    statistics = _picture_statistics(meta, camera_keys)
    if statistics is None:
        return np.zeros(len(lengths), np.uint64)
    cameras = [[key, meta.features[key]["dtype"], list(meta.features[key]["shape"])] for key in camera_keys]
    identities = np.zeros(len(lengths), np.uint64)
    for episode, length in enumerate(lengths):
        values = {
            key: {name: [value.hex() for value in column[episode].tolist()] for name, column in columns.items()}
            for key, columns in statistics.items()
        }
        content = canonical_json({"length": length, "cameras": cameras, "statistics": values})
        identities[episode] = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    return identities


def hash_identities(identities: NDArray[np.uint64]) -> str:
    """Return the sha256 of identities, hexadecimal, as `DatasetSpec` has it."""
    return hashlib.sha256(identities.astype("<u8").tobytes()).hexdigest()


def _picture_statistics(
    meta: "LeRobotDatasetMetadata", camera_keys: Sequence[str]
) -> dict[str, dict[str, NDArray[np.float64]]] | None:
    """Return the statistics of each episode's pictures by camera and name, [E, values]; None where some are missing.

    LeRobot leaves these columns out when it reads the episode table.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names = [f"stats/{key}/{name}" for key in camera_keys for name in IDENTITY_STATISTICS]
    parts = []
    try:
        for path in sorted((Path(meta.root) / "meta" / "episodes").glob("*/*.parquet")):
            if not {*names} <= {*pq.read_schema(path).names}:
                return None
            parts.append(pq.read_table(path, columns=["episode_index", *names]))
    except (OSError, pa.ArrowException) as error:  # a recording has begun another file
        raise DatasetError(f"dataset {meta.repo_id}: {path} cannot be read: {one_line(error)}") from error
    table = pa.concat_tables(parts, promote_options="permissive").combine_chunks().sort_by("episode_index")
    if not np.array_equal(table.column("episode_index").to_numpy(), np.arange(int(meta.total_episodes))):
        return None
    statistics: dict[str, dict[str, NDArray[np.float64]]] = {}
    for key in camera_keys:
        for name in IDENTITY_STATISTICS:
            column = table.column(f"stats/{key}/{name}")
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                column = pc.list_flatten(column)
            if column.null_count or len(column) == 0 or len(column) % len(table):
                return None
            values = column.to_numpy()
            statistics.setdefault(key, {})[name] = values.astype(np.float64).reshape(len(table), -1)
    return statistics


def describe_dataset(
    meta: "LeRobotDatasetMetadata",
    camera_keys: Sequence[str],
    decoder: str = DECODER,
    *,
    schema_version: int = SCHEMA_VERSION,
) -> DatasetSpec:
    """Return what a cache of these cameras records of its dataset; see `DatasetSpec`. Reads metadata only, no image.

    Where no camera is a video, ``image`` is recorded for the decoder. `schema_version` is the cache format's.
    """
    if schema_version >= 2:
        identities_sha256 = hash_identities(episode_identities(meta, camera_keys))
        return _describe(meta, camera_keys, decoder, identities_sha256=identities_sha256)
    content = hashlib.sha256()
    for key in camera_keys:
        feature = meta.features[key]
        content.update(canonical_json([key, feature["dtype"], list(feature["shape"])]))
        if key in meta.video_keys:
            content.update(_column(meta, f"videos/{key}/from_timestamp", np.float64).tobytes())
        for name, values in sorted((meta.stats or {}).get(key, {}).items()):
            content.update(name.encode() + np.asarray(values, np.float64).tobytes())
    return _describe(meta, camera_keys, decoder, images_sha256=content.hexdigest())


def _describe(meta: "LeRobotDatasetMetadata", camera_keys: Sequence[str], decoder: str, **content: str) -> DatasetSpec:
    lengths = episode_lengths(meta)
    has_video = any(key in meta.video_keys for key in camera_keys)
    return DatasetSpec(
        repo_id=meta.repo_id,
        revision=_resolved_revision(meta),
        frames=int(meta.total_frames),
        episodes=int(meta.total_episodes),
        fps=int(meta.fps) if float(meta.fps).is_integer() else float(meta.fps),
        episodes_sha256=hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
        decoder=decoder if has_video else "image",
        **content,
    )


def describe_cameras(meta: "LeRobotDatasetMetadata") -> dict[str, Camera]:
    """Return the dataset's colour cameras by key, in its order; grey and depth cameras are left out."""
    others = _describe_other_cameras(meta)
    return {key: _camera(meta, key) for key in meta.camera_keys if key not in others}


def open_metadata(repo_id: str, root: Path | None = None, revision: str | None = None) -> "LeRobotDatasetMetadata":
    """Read the metadata of a dataset, in a folder or on the Hub; no data file is needed.

    Raises:
        DatasetNotFoundError: there is no such folder or Hub dataset, or the Hub cannot be reached.
        DatasetError: it is not a dataset, or has another version.
    """
    if root is not None:
        info = root / "meta" / "info.json"
        if not info.is_file():
            raise DatasetNotFoundError(
                f"dataset folder {root}: expected a LeRobotDataset, found no meta/info.json:"
                " give the folder that holds meta/, data/ and videos/"
            )
        try:
            version = json.loads(info.read_text())["codebase_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"dataset folder {root}: meta/info.json is malformed: {one_line(error)}") from error
        if not str(version).startswith("v3."):
            raise DatasetError(_version_message(repo_id, str(version), root))
        for pattern in ("meta/episodes/*/*.parquet", "meta/tasks.parquet"):
            if not any(root.glob(pattern)):
                raise DatasetError(f"dataset folder {root}: expected {pattern}, found none: the dataset is incomplete")

    import httpx
    import pyarrow as pa
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.datasets.utils import BackwardCompatibilityError, ForwardCompatibilityError

    waits = hub_call(f"dataset {repo_id}: waiting for its metadata from the Hub") if root is None else nullcontext()
    try:
        with waits:
            return LeRobotDatasetMetadata(repo_id, root=root, revision=revision)
    except (BackwardCompatibilityError, ForwardCompatibilityError) as error:
        raise DatasetError(
            _version_message(repo_id, str(getattr(error, "version", "another version")), root)
        ) from error
    except (OSError, httpx.HTTPError, RuntimeError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        if root is not None:
            raise DatasetError(f"dataset folder {root}: its metadata cannot be read: {one_line(error)}") from error
        hint = f"; {repo_id} is a folder: give --dataset NAME --root {repo_id}" if Path(repo_id).is_dir() else ""
        raise DatasetNotFoundError(
            f"dataset {repo_id}: not available from the Hub ({one_line(error)}): check the name, the network and"
            f" `hf auth login`, or give a local copy with --root DIR{hint}"
        ) from error


def describe_statistics_command(repo_id: str, root: Path | str | None) -> str:
    """Return the command of LeRobot that computes the statistics of a dataset, quantiles included, for a message.

    It leaves the pictures and their statistics alone, so that a cache still fits, and sends nothing to the Hub, other
    than LeRobot's `augment_dataset_quantile_stats`.

    Args:
        repo_id: the dataset's name.
        root: its folder; None for a dataset on the Hub, which has to be copied first.
    """
    folder = "DIR" if root is None else str(root)
    places = [
        f"--{new}{name}={value}" for new in ("", "new_") for name, value in (("repo_id", repo_id), ("root", folder))
    ]
    options = ["--operation.type=recompute_stats", "--operation.overwrite=true"]
    command = f"`{shlex.join(['lerobot-edit-dataset', *places, *options])}`"
    if root is None:
        command += f" in a copy, which `hf download {repo_id} --repo-type=dataset --local-dir=DIR` makes"
    return command


def _version_message(repo_id: str, version: str, root: Path | None = None) -> str:
    # Without the last option LeRobot pushes what it has converted to the Hub.
    where = "" if root is None else f" --root={root}"
    command = f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={repo_id}{where} --push-to-hub=false"
    then = "" if root is not None else f", and give the copy that it makes with --root $HF_LEROBOT_HOME/{repo_id}"
    return f"dataset {repo_id}: expected LeRobotDataset v3.0, found {version}: convert it with `{command}`{then}"


def _column(meta: "LeRobotDatasetMetadata", name: str, dtype: type = np.int64) -> NDArray[Any]:
    """Return a column of the episode table, [E], in the order of the episodes."""
    table = meta.episodes.data
    order = table.column("episode_index").to_numpy()
    if not np.array_equal(order, np.arange(len(order))):
        raise DatasetError(f"dataset {meta.repo_id}: expected episodes 0 to {len(order) - 1} in order in meta/episodes")
    if name not in table.column_names:
        raise DatasetError(f"dataset {meta.repo_id}: expected a column {name} in meta/episodes, found none")
    column: NDArray[Any] = table.column(name).to_numpy().astype(dtype)
    return column


def _resolved_revision(meta: "LeRobotDatasetMetadata") -> str | None:
    """Return the commit: the name of the snapshot folder in the Hub's cache. None for any other folder."""
    is_snapshot = meta.root.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", meta.root.name)
    return meta.root.name if is_snapshot else None


def local_root(meta: "LeRobotDatasetMetadata") -> Path | None:
    """Return the folder of a dataset that is not one of the Hub's, as `--root` takes it."""
    return None if _resolved_revision(meta) else Path(meta.root)


def _file_table(
    template: str, chunk: NDArray[Any], file: NDArray[Any], **names: str
) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Return the paths of the distinct files, and each episode's index into them, int64 [E]."""
    pairs, file_of_episode = np.unique(np.stack((chunk, file)), axis=1, return_inverse=True)
    try:
        paths = tuple(template.format(chunk_index=int(c), file_index=int(f), **names) for c, f in pairs.T)
    except (LookupError, ValueError, AttributeError) as error:
        raise DatasetError(
            f"meta/info.json: expected a path with chunk_index and file_index, found {template!r:.200}:"
            f" {one_line(error)}"
        ) from error
    return paths, file_of_episode.reshape(-1)


def _make_reader(meta: "LeRobotDatasetMetadata", keys: Sequence[str], tolerance_s: float) -> FrameReader:
    lengths = episode_lengths(meta)
    data_paths, data_file = _file_table(
        meta.data_path, _column(meta, "data/chunk_index"), _column(meta, "data/file_index")
    )
    videos = {}
    for key in keys:
        if key in meta.video_keys:
            prefix = f"videos/{key}/"
            paths, file = _file_table(
                str(meta.video_path),
                _column(meta, prefix + "chunk_index"),
                _column(meta, prefix + "file_index"),
                video_key=key,
            )
            start = _column(meta, prefix + "from_timestamp", np.float64)
            videos[key] = VideoColumn(paths=paths, file=file, from_timestamp=start)
    return FrameReader(
        root=Path(meta.root),
        cameras=tuple(_camera(meta, key) for key in keys),
        episode_start=np.cumsum(lengths) - lengths,
        episode_length=lengths,
        data_paths=data_paths,
        data_file=data_file,
        videos=videos,
        tolerance_s=tolerance_s,
    )


def _camera(meta: "LeRobotDatasetMetadata", key: str) -> Camera:
    height, width, _ = _image_shape(meta, key)
    return Camera(key=key, height=height, width=width)


def _image_shape(meta: "LeRobotDatasetMetadata", key: str) -> tuple[int, int, int]:
    """Return a camera's (height, width, channels)."""
    shape, names = tuple(meta.shapes[key]), meta.names[key]
    if len(shape) == 2:
        return int(shape[0]), int(shape[1]), 1
    if len(shape) != 3:
        raise DatasetError(f"dataset {meta.repo_id}: camera {key}: expected a shape of 3 numbers, got {list(shape)}")
    channels_first = bool(names) and names[0] in ("channel", "channels")
    height, width, channels = (shape[1], shape[2], shape[0]) if channels_first else shape
    return int(height), int(width), int(channels)


def _require_files(
    meta: "LeRobotDatasetMetadata", reader: FrameReader, wanted: list[tuple[int, int]], *, local: bool
) -> None:
    """Require the files of these episodes; download those that are missing if the dataset is on the Hub."""
    episodes = rows_of(wanted)
    files = {reader.data_paths[i] for i in np.unique(reader.data_file[episodes])}
    for column in reader.videos.values():
        files |= {column.paths[i] for i in np.unique(column.file[episodes])}
    missing = sorted(name for name in files if not (reader.root / name).is_file())
    if not missing:
        return
    revision = _resolved_revision(meta)
    if local or revision is None:
        raise DatasetError(
            f"dataset {meta.repo_id}: {len(missing)} of {len(files)} files are missing, first"
            f" {reader.root / missing[0]}: complete the copy, or leave --root out to use the Hub's"
        )
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    try:
        with hub_call(f"dataset {meta.repo_id}: waiting for the list of its files from the Hub"):
            entries = HfApi().list_repo_tree(meta.repo_id, recursive=True, revision=revision, repo_type="dataset")
            sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
        total = human_bytes(sum(sizes.get(name, 0) for name in missing))
        count = len(missing)
        logger.info("dataset %s: downloading %s (files: %d) to %s", meta.repo_id, total, count, HF_LEROBOT_HUB_CACHE)
        # into the folder that LeRobotDataset itself uses, so that training finds them
        with hub_call(f"dataset {meta.repo_id}: downloading from the Hub"):
            snapshot_download(
                meta.repo_id,
                repo_type="dataset",
                revision=revision,
                cache_dir=HF_LEROBOT_HUB_CACHE,
                allow_patterns=missing,
            )
    except (OSError, httpx.HTTPError) as error:
        raise DatasetError(
            f"dataset {meta.repo_id}: {len(missing)} files cannot be downloaded: {one_line(error)}"
        ) from error
