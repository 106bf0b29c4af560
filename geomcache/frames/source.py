"""Find a LeRobotDataset (v3.0), in a folder or on the Hub, and say what it is.

`open_dataset` gives stage one its frames; `describe_dataset` gives both stages the identity caches are compared by.
Both forms of pictures are read: `video` features, and `image` features embedded in the data files.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import DatasetError, DatasetNotFoundError, did_you_mean, one_line
from geomcache.frames.reader import DECODER, FrameReader, VideoColumn
from geomcache.geometry import Camera, DatasetSpec, canonical_json, check_camera_key
from geomcache.ranges import parse_episodes

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata


@dataclass(frozen=True, kw_only=True)
class FrameDataset:
    """A dataset that is there, and what it is."""

    spec: DatasetSpec
    reader: FrameReader

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The cameras asked for, in order."""
        return self.reader.cameras

    def rows(self, episodes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges of rows of ranges of episodes, both half open."""
        ends = self.reader.episode_start + self.reader.episode_length
        return [(int(self.reader.episode_start[first]), int(ends[last - 1])) for first, last in episodes]


def open_dataset(
    repo_id: str,
    *,
    root: Path | None = None,
    revision: str | None = None,
    cameras: Sequence[str] | None = None,
    episodes: str | None = None,
) -> tuple[FrameDataset, list[tuple[int, int]]]:
    """Find a dataset, in a folder or on the Hub, with the files that the asked episodes need.

    Args:
        repo_id: its name; where `root` is given, a label only.
        root: a local folder; nothing is downloaded then.
        revision: branch, tag or commit on the Hub.
        cameras: keys in the order of the views; all of the dataset's, in its order, where None.
        episodes: such as ``0:100`` or ``0,3,5:8``; all where None.

    Returns:
        The dataset and the ranges of episodes asked for.

    Raises:
        DatasetNotFoundError: no such folder, or no such dataset or no way to the Hub.
        DatasetError: no dataset, another version, no such camera, files missing.
        UserInputError: episodes that are malformed or out of range.
    """
    meta = open_metadata(repo_id, root, revision)
    known = [key for key in meta.camera_keys if key not in meta.depth_keys]
    keys = list(cameras) if cameras else known
    for key in keys:
        check_camera_key(key)
        if key not in known:
            raise DatasetError(
                f"dataset {repo_id}: {did_you_mean(key, known)}expected a camera, got {key!r}; it has"
                f" {', '.join(known) or 'none'}"
            )
    if not keys:
        raise DatasetError(f"dataset {repo_id}: expected at least one camera (a video or image feature), found none")
    wanted = parse_episodes(episodes, int(meta.total_episodes))
    _require_files(meta, repo_id, keys, wanted, local=root is not None)
    return FrameDataset(spec=describe_dataset(meta, keys), reader=_make_reader(meta, keys)), wanted


def episode_lengths(meta: "LeRobotDatasetMetadata") -> NDArray[np.int64]:
    """Frames of every episode, int64 [E]."""
    starts, stops = _column(meta, "dataset_from_index"), _column(meta, "dataset_to_index")
    lengths: NDArray[np.int64] = stops - starts
    expected = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    if len(lengths) != meta.total_episodes or not np.array_equal(starts, expected) or stops[-1] != meta.total_frames:
        raise DatasetError(
            f"dataset {meta.repo_id}: expected episodes that follow each other from index 0 to {meta.total_frames},"
            " found gaps or overlaps in meta/episodes: the dataset is damaged"
        )
    return lengths


def describe_dataset(meta: "LeRobotDatasetMetadata", camera_keys: Sequence[str], decoder: str = DECODER) -> DatasetSpec:
    """What a cache records of the dataset it is of; see `DatasetSpec`. Reads metadata only, no picture.

    Args:
        meta: the dataset's metadata.
        camera_keys: the cameras that matter.
        decoder: what turns video into pixels; ``image`` is recorded where no camera is a video.
    """
    lengths = episode_lengths(meta)
    content = hashlib.sha256()
    for key in camera_keys:
        feature = meta.features[key]
        content.update(canonical_json([key, feature["dtype"], list(feature["shape"])]))
        if key in meta.video_keys:
            content.update(_column(meta, f"videos/{key}/from_timestamp", np.float64).tobytes())
        for name, values in sorted((meta.stats or {}).get(key, {}).items()):
            content.update(name.encode() + np.asarray(values, np.float64).tobytes())
    has_video = any(key in meta.video_keys for key in camera_keys)
    return DatasetSpec(
        repo_id=meta.repo_id,
        revision=_resolved_revision(meta),
        frames=int(meta.total_frames),
        episodes=int(meta.total_episodes),
        fps=int(meta.fps) if float(meta.fps).is_integer() else float(meta.fps),
        episodes_sha256=hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
        images_sha256=content.hexdigest(),
        decoder=decoder if has_video else "image",
    )


def describe_cameras(meta: "LeRobotDatasetMetadata") -> dict[str, Camera]:
    """The dataset's colour cameras by key, in its order.

    Raises:
        DatasetError: a camera has not three channels.
    """
    return {key: _camera(meta, key) for key in meta.camera_keys if key not in meta.depth_keys}


def open_metadata(repo_id: str, root: Path | None = None, revision: str | None = None) -> "LeRobotDatasetMetadata":
    """Metadata of a dataset, in a folder or on the Hub; no data file is needed.

    Raises:
        DatasetNotFoundError: no such folder, or no such dataset or no way to the Hub.
        DatasetError: no dataset, or another version.
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
            raise DatasetError(_version_message(repo_id, str(version)))
        for pattern in ("meta/episodes/*/*.parquet", "meta/tasks.parquet"):
            if not any(root.glob(pattern)):
                raise DatasetError(f"dataset folder {root}: expected {pattern}, found none: the dataset is incomplete")

    import httpx
    import pyarrow as pa
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.datasets.utils import BackwardCompatibilityError, ForwardCompatibilityError

    try:
        return LeRobotDatasetMetadata(repo_id, root=root, revision=revision)
    except (BackwardCompatibilityError, ForwardCompatibilityError) as error:
        raise DatasetError(_version_message(repo_id, str(getattr(error, "version", "another version")))) from error
    except (OSError, httpx.HTTPError, RuntimeError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        if root is not None:
            raise DatasetError(f"dataset folder {root}: its metadata cannot be read: {one_line(error)}") from error
        hint = f"; {repo_id} is a folder: give --dataset NAME --root {repo_id}" if Path(repo_id).is_dir() else ""
        raise DatasetNotFoundError(
            f"dataset {repo_id}: not to be had from the Hub ({one_line(error)}): check the name, the network and"
            f" `hf auth login`, or give a local copy with --root DIR{hint}"
        ) from error


def _version_message(repo_id: str, version: str) -> str:
    return (
        f"dataset {repo_id}: expected LeRobotDataset v3.0, found {version}: convert it with"
        f" `python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={repo_id}`"
    )


def _column(meta: "LeRobotDatasetMetadata", name: str, dtype: type = np.int64) -> NDArray[Any]:
    """A column of the episode table, [E], in the order of the episodes."""
    table = meta.episodes.data
    order = table.column("episode_index").to_numpy()
    if not np.array_equal(order, np.arange(len(order))):
        raise DatasetError(f"dataset {meta.repo_id}: expected episodes 0 to {len(order) - 1} in order in meta/episodes")
    if name not in table.column_names:
        raise DatasetError(f"dataset {meta.repo_id}: expected a column {name} in meta/episodes, found none")
    column: NDArray[Any] = table.column(name).to_numpy().astype(dtype)
    return column


def _resolved_revision(meta: "LeRobotDatasetMetadata") -> str | None:
    """The commit, which is the name of the Hub cache's snapshot folder."""
    return meta.root.name if meta.root.parent.name == "snapshots" else None


def _file_table(
    template: str, chunk: NDArray[Any], file: NDArray[Any], **names: str
) -> tuple[tuple[str, ...], NDArray[Any]]:
    """Paths of distinct files, and each episode's place among them."""
    pairs, places = np.unique(np.stack((chunk, file)), axis=1, return_inverse=True)
    paths = tuple(template.format(chunk_index=int(c), file_index=int(f), **names) for c, f in pairs.T)
    return paths, places.reshape(-1)


def _make_reader(meta: "LeRobotDatasetMetadata", keys: Sequence[str]) -> FrameReader:
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
        episode_start=np.concatenate(([0], np.cumsum(lengths)[:-1])).astype(np.int64),
        episode_length=lengths,
        data_paths=data_paths,
        data_file=data_file,
        videos=videos,
    )


def _camera(meta: "LeRobotDatasetMetadata", key: str) -> Camera:
    shape, names = tuple(meta.shapes[key]), meta.names[key]
    channels_first = bool(names) and names[0] in ("channel", "channels")
    height, width, channels = (shape[1], shape[2], shape[0]) if channels_first else shape
    if channels != 3:
        raise DatasetError(f"dataset {meta.repo_id}: camera {key}: expected 3 channels, got {channels}")
    return Camera(key=key, height=int(height), width=int(width))


def _require_files(
    meta: "LeRobotDatasetMetadata", repo_id: str, keys: Sequence[str], wanted: list[tuple[int, int]], *, local: bool
) -> None:
    """See that the files of the wanted episodes are there; fetch them where the dataset is the Hub's."""
    reader = _make_reader(meta, keys)
    episodes = np.concatenate([np.arange(first, last) for first, last in wanted])
    files = {reader.data_paths[i] for i in np.unique(reader.data_file[episodes])}
    for column in reader.videos.values():
        files |= {column.paths[i] for i in np.unique(column.file[episodes])}
    missing = sorted(name for name in files if not (reader.root / name).is_file())
    if not missing:
        return
    revision = _resolved_revision(meta)
    if local or revision is None:
        raise DatasetError(
            f"dataset {repo_id}: {len(missing)} of {len(files)} files are not there, first {reader.root / missing[0]}:"
            " complete the copy, or leave --root out to use the Hub's"
        )
    import httpx
    from huggingface_hub import snapshot_download
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    try:  # where LeRobotDataset itself would put them, so that training finds them
        snapshot_download(
            repo_id, repo_type="dataset", revision=revision, cache_dir=HF_LEROBOT_HUB_CACHE, allow_patterns=missing
        )
    except (OSError, httpx.HTTPError) as error:
        raise DatasetError(f"dataset {repo_id}: {len(missing)} files not to be had: {one_line(error)}") from error
