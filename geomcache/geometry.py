"""The contract between stage one, stage two and inference: what geometry is, and what it was made from.

Legend of shapes, here and everywhere:  B batch   V views   h, w grid   C channels   N frames of the dataset

    images                          uint8    [B, V, H, W, 3]   what the encoder takes
    observation.geometry.ray        float16  [B, V, h, w, 6]   direction (3) and origin (3), as DA3 defines them, in
                                                               the first view's coordinates (joint views)
    observation.geometry.ray_conf   float16  [B, V, h, w]      >= 1
    observation.geometry.depth      float16  [B, V, h, w]      > 0, the main head's, where asked for
    observation.geometry.depth_conf float16  [B, V, h, w]      >= 1, where asked for

An item of a dataset has the same keys without B. Both roads, the cache and the online encoder, end in `Geometry`
with these dtypes: rounding to float16 belongs to the encoder, so that training and inference see the same numbers.
This file imports nothing heavier than NumPy.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from geomcache.errors import CacheFormatError, GeometryError, UserInputError

BATCH_KEY_PREFIX = "observation.geometry."
PATCH_SIZE = 14  # DINOv2's; DA3 has no other
RAYS_PER_PATCH = 8  # native grid cells a patch side: DualDPT's auxiliary pyramid ends at 8 cells a patch
FLOAT16_MAX = 65504.0

Views = Literal["joint", "independent"]
ComputeDtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of DA3's heads, and the channels that the adapter sees of it."""

    name: str
    channels: tuple[str, ...]
    """Names of the channels, in order."""
    log: bool
    """Whether the adapter and the statistics see the natural logarithm of the value: confidences are exponentials."""

    @property
    def trailing(self) -> tuple[int, ...]:
        """Shape behind the grid: (6,) for rays, () for maps of one number a cell."""
        return (len(self.channels),) if len(self.channels) > 1 else ()


OUTPUTS: dict[str, Output] = {
    output.name: output
    for output in (
        Output(name="ray", channels=("ray_dx", "ray_dy", "ray_dz", "ray_ox", "ray_oy", "ray_oz"), log=False),
        Output(name="ray_conf", channels=("log_ray_conf",), log=True),
        Output(name="depth", channels=("depth",), log=False),
        Output(name="depth_conf", channels=("log_depth_conf",), log=True),
    )
}
DEFAULT_OUTPUTS = ("ray", "ray_conf")


def batch_key(output: str) -> str:
    """The batch key of an output: ``ray`` -> ``observation.geometry.ray``."""
    return BATCH_KEY_PREFIX + output


def parse_grid(grid: str) -> tuple[int, int] | None:
    """Check a grid's name: None for ``patch`` and ``native``, (h, w) for ``HxW``.

    Raises:
        UserInputError: it is none of them.
    """
    if grid in ("patch", "native"):
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", grid)
    if match is None:
        raise UserInputError(f"grid: expected 'patch', 'native' or HxW such as 14x14, got {grid!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One view of a frame: a feature of the dataset and the size of its pictures."""

    key: str
    """LeRobot's feature name, such as ``observation.images.image``."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class GeometrySpec:
    """All that the numbers depend on, beside the pixels. Written into the cache and the checkpoint, and compared."""

    model_id: str
    """As given by the user: a DA3 name, a Hub id or a folder's name. A label: `weights_sha256` is the identity."""
    model_revision: str | None
    """Resolved commit on the Hub; None for a local folder."""
    model_name: str
    """Upstream's preset, such as ``da3-small``: the architecture."""
    weights_sha256: str
    """Of ``model.safetensors``, hexadecimal."""
    da3_version: str
    """Version of the ``depth-anything-3`` package."""
    views: Views
    """``joint``: the cameras of a frame are the views of one scene. ``independent``: each camera alone."""
    cameras: tuple[Camera, ...]
    """In the order of the views; the first is the reference."""
    process_res: int
    """Longest side, in pixels, of what the network sees, before rounding to multiples of 14."""
    resize_method: str = "upper_bound_resize"
    """Upstream's ``process_res_method``."""
    reference_view: str = "first"
    """Upstream's ``ref_view_strategy``. Any other could change from frame to frame."""
    grid: str
    """``patch``, ``native`` or ``HxW``."""
    grid_hw: tuple[int, int]
    """Cells (h, w) of every map."""
    outputs: tuple[str, ...]
    """Which of `OUTPUTS`, in their order there."""
    compute_dtype: ComputeDtype
    """``fp32``, or ``bf16`` for the backbone under autocast."""
    storage_dtype: str = "float16"
    """Maps are rounded to this by the encoder, saturating."""

    def __post_init__(self) -> None:
        if not self.cameras:
            raise UserInputError("cameras: expected at least one, got none")
        keys = [camera.key for camera in self.cameras]
        if len(set(keys)) != len(keys):
            raise UserInputError(f"cameras: expected each once, got {', '.join(keys)}")
        for camera in self.cameras:
            check_camera_key(camera.key)
            if not (1 <= camera.height <= 16384 and 1 <= camera.width <= 16384):
                raise UserInputError(
                    f"camera {camera.key}: expected 1 to 16384 pixels a side, got {camera.height}x{camera.width}"
                )
        if self.views not in ("joint", "independent"):
            raise UserInputError(f"views: expected 'joint' or 'independent', got {self.views!r}")
        if self.compute_dtype not in ("fp32", "bf16"):
            raise UserInputError(f"dtype: expected 'fp32' or 'bf16', got {self.compute_dtype!r}")
        if self.storage_dtype != "float16":
            raise UserInputError(f"storage_dtype: expected 'float16', got {self.storage_dtype!r}")
        if not PATCH_SIZE <= self.process_res <= 8192:
            raise UserInputError(f"process-res: expected {PATCH_SIZE} to 8192 pixels, got {self.process_res}")
        parse_grid(self.grid)
        if len(self.grid_hw) != 2 or not all(1 <= cells <= 9999 for cells in self.grid_hw):
            raise UserInputError(f"grid: expected 1 to 9999 cells a side, got {self.grid_hw}")
        object.__setattr__(self, "outputs", parse_outputs(self.outputs))

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """Keys of the cameras, in the order of the views."""
        return tuple(camera.key for camera in self.cameras)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that the adapter sees, in order."""
        return tuple(channel for name in self.outputs for channel in OUTPUTS[name].channels)

    def map_shape(self, output: str) -> tuple[int, ...]:
        """Shape of one view's map of one frame: [h, w, 6] for ``ray``, [h, w] for the others."""
        return (*self.grid_hw, *OUTPUTS[output].trailing)

    @property
    def frame_nbytes(self) -> int:
        """Bytes of one frame's maps, all views and outputs, without checksums."""
        cells = self.grid_hw[0] * self.grid_hw[1]
        return len(self.cameras) * cells * len(self.channels) * np.dtype(self.storage_dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return _json_object(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from `to_dict`.

        Raises:
            CacheFormatError: a field is missing, unknown or of the wrong type or value.
        """
        return _from_json(cls, data, "spec")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Which frames a cache is of: the dataset's identity, and what tells that the frames are the same."""

    repo_id: str
    """A label: two copies of one dataset under two names have the same frames."""
    revision: str | None
    """Resolved commit on the Hub; None for a local folder that does not tell."""
    frames: int
    """N: all frames of the dataset, also when only some episodes are cached."""
    episodes: int
    """All episodes of the dataset."""
    fps: int | float
    """An int if it is whole, so that the canonical JSON of such datasets stays what it was."""
    episodes_sha256: str
    """Of the episodes' lengths, little-endian int64, in order."""
    images_sha256: str
    """Of what the dataset's metadata says of the cameras' pictures: features, where each episode's frames lie, and
    statistics. It needs no picture, so that a run on a part of the dataset can compare it."""
    decoder: str
    """What turned stored pictures into pixels: ``pyav``, ``torchcodec`` or ``image``. Decoders round differently."""

    def __post_init__(self) -> None:
        for name in ("frames", "episodes", "fps"):
            if getattr(self, name) < 1:
                raise UserInputError(f"dataset {self.repo_id}: expected {name} >= 1, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return _json_object(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Back from `to_dict`.

        Raises:
            CacheFormatError: a field is missing, unknown or of the wrong type or value.
        """
        return _from_json(cls, data, "dataset")


def fingerprint(spec: GeometrySpec, dataset: DatasetSpec) -> str:
    """Identity of a cache's content: sha256, hexadecimal, of the canonical JSON of what the numbers depend on.

    Labels (`model_id`, `repo_id`) are left out: the same weights and frames under other names give the same numbers.
    """
    content = {"spec": spec.to_dict(), "dataset": dataset.to_dict()}
    del content["spec"]["model_id"], content["dataset"]["repo_id"]
    return hashlib.sha256(canonical_json(content)).hexdigest()


def differences(
    cached: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Fields in which two specs (as dictionaries) differ: (dotted name, value there, value here), in order."""
    for key in dict.fromkeys((*cached, *wanted)):
        here, there = wanted.get(key), cached.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from differences(there, here, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}", there, here


def canonical_json(data: object) -> bytes:
    """JSON with sorted keys and no white space, ASCII: the same bytes for the same content."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_outputs(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Check output names and bring them into the order of `OUTPUTS`.

    Raises:
        UserInputError: a name is unknown or there twice, or ``ray`` is missing.
    """
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or len(set(names)) != len(names) or "ray" not in names:
        raise UserInputError(
            f"outputs: expected 'ray' and any of {', '.join(OUTPUTS)}, each once, got {','.join(names)!r}"
        )
    return tuple(name for name in OUTPUTS if name in names)


def check_camera_key(key: str) -> None:
    """A camera key becomes a folder of the cache: refuse what could lead elsewhere.

    Raises:
        UserInputError: the key is not made of letters, digits, '.', '_' and '-', or starts with a dot or dash.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", key):
        raise UserInputError(f"camera key: expected letters, digits, '.', '_' and '-', got {key!r}")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What DA3 says of a batch of frames. Arrays are NumPy's or torch's, all of one kind, dtype and device."""

    ray: Any  # [B, V, h, w, 6]
    ray_conf: Any | None = None  # [B, V, h, w]
    depth: Any | None = None  # [B, V, h, w]
    depth_conf: Any | None = None  # [B, V, h, w]

    def __post_init__(self) -> None:
        if self.ray.ndim != 5 or self.ray.shape[-1] != 6:
            raise GeometryError(f"ray: expected shape [B, V, h, w, 6], got {list(self.ray.shape)}")
        for name, array in self.items():
            expected = (*self.ray.shape[:4], *OUTPUTS[name].trailing)
            if tuple(array.shape) != expected:
                raise GeometryError(f"{name}: expected shape {list(expected)} beside this ray, got {list(array.shape)}")
            if array.dtype != self.ray.dtype:
                raise GeometryError(f"{name}: expected ray's dtype {self.ray.dtype}, got {array.dtype}")

    def items(self) -> Iterator[tuple[str, Any]]:
        """(name, array) of the outputs that are there, in the order of `OUTPUTS`."""
        for name in OUTPUTS:
            array = getattr(self, name)
            if array is not None:
                yield name, array

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.ray.shape[0])

    def to_batch(self) -> dict[str, Any]:
        """As entries of a LeRobot batch."""
        return {batch_key(name): array for name, array in self.items()}

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Self:
        """The geometry in a LeRobot batch.

        Raises:
            GeometryError: there is none, or its shapes do not fit each other.
        """
        if batch_key("ray") not in batch:
            raise GeometryError(
                f"batch: expected {batch_key('ray')}, found no geometry among {', '.join(sorted(batch))}: train with"
                " `geomcache train --cache PATH`, or wrap the dataset in GeometryDataset"
            )
        return cls(**{name: batch[batch_key(name)] for name in OUTPUTS if batch_key(name) in batch})

    def check(self, spec: GeometrySpec) -> None:
        """Compare with what a spec promises.

        Raises:
            GeometryError: outputs, views or grid differ.
        """
        found = tuple(name for name, _ in self.items())
        if found != spec.outputs:
            raise GeometryError(f"geometry: expected outputs {', '.join(spec.outputs)}, got {', '.join(found)}")
        expected = (len(spec.cameras), *spec.grid_hw)
        if tuple(self.ray.shape[1:4]) != expected:
            raise GeometryError(f"geometry: expected [V, h, w] = {list(expected)}, got {list(self.ray.shape[1:4])}")

    @classmethod
    def example(
        cls,
        batch: int = 1,
        views: int = 2,
        grid_hw: tuple[int, int] = (14, 14),
        outputs: tuple[str, ...] = DEFAULT_OUTPUTS,
    ) -> Self:
        """Plausible geometry for tests and documentation: float16 NumPy arrays, the same at every call."""
        generator = np.random.default_rng(0)
        shape = (batch, views, *grid_hw)
        arrays: dict[str, Any] = {}
        for name in parse_outputs(outputs):
            values = generator.normal(size=(*shape, *OUTPUTS[name].trailing))
            arrays[name] = (values if name == "ray" else 1.0 + np.exp(values)).astype(np.float16)
        return cls(**arrays)


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _json_object(value: Any) -> dict[str, Any]:
    data = _to_json(value)
    assert isinstance(data, dict)
    return data


# How a JSON value becomes each annotated type of the specs; anything else is malformed.
_PLAIN: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    int | float: (int, float),
    str | None: (str, type(None)),
    Views: (str,),
    ComputeDtype: (str,),
}


def _from_json[T](cls: type[T], data: object, where: str) -> T:
    if not isinstance(data, Mapping):
        raise CacheFormatError(f"{where}: expected an object, got {type(data).__name__}")
    assert dataclasses.is_dataclass(cls)
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if set(data) != set(fields):
        odd = sorted(set(data) ^ set(fields))
        raise CacheFormatError(
            f"{where}: expected the fields {', '.join(fields)}, differs in {', '.join(map(repr, odd))}"
        )
    values: dict[str, Any] = {}
    for name, kind in fields.items():
        value = data[name]
        if kind in _PLAIN:
            fits = isinstance(value, _PLAIN[kind]) and not isinstance(value, bool)
        else:
            fits = isinstance(value, list)
            if fits and kind == tuple[Camera, ...]:
                value = tuple(_from_json(Camera, item, f"{where}.{name}") for item in value)
            elif fits:
                item_type = str if kind == tuple[str, ...] else int
                fits = all(type(item) is item_type for item in value)
                value = tuple(value)
        if not fits:
            raise CacheFormatError(f"{where}.{name}: expected {kind}, got {value!r:.80}")
        values[name] = value
    try:
        return cls(**values)
    except UserInputError as error:
        raise CacheFormatError(f"{where}: {error}") from None
