"""The contract between stage one, stage two and inference: what geometry is, and what produced it.

Legend of shapes, here and everywhere:  B batch   V views   h, w grid   C channels   N frames of the dataset

    images                          uint8    [B, V, H, W, 3]   what the encoder takes
    observation.geometry.ray        float16  [B, V, h, w, 6]   direction (3) and origin (3), as DA3 defines them, in
                                                               the first view's coordinates (joint views)
    observation.geometry.ray_conf   float16  [B, V, h, w]      >= 1
    observation.geometry.depth      float16  [B, V, h, w]      > 0, from the main head; optional
    observation.geometry.depth_conf float16  [B, V, h, w]      >= 1; optional
    observation.geometry.feature    float16  [B, V, h, w, D]   of the backbone, in D numbers; optional, for alignment
    observation.geometry.valid      bool     [B, V, h, w]      false for cells that augmentation moved in from outside
                                                               of the picture; only with such augmentation

An item of a dataset has the same keys without B. Both sources, the cache and the online encoder, produce `Geometry`
with these dtypes: the encoder rounds to float16, so training and inference see the same numbers.
This file imports nothing heavier than NumPy.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, Self, get_args

import msgspec
import numpy as np

from geomcache.errors import CacheFormatError, GeometryError, UserInputError

BATCH_KEY_PREFIX = "observation.geometry."
VALID = "valid"  # the mask's name in a batch
FEATURE = "feature"  # the output that is no geometry: the backbone's, for alignment alone
PATCH_SIZE = 14  # pixels, of DINOv2; DA3 has no other
RAYS_PER_PATCH = 8  # native grid cells per patch side: DualDPT's auxiliary pyramid ends at 8 cells per patch
FLOAT16_MAX = 65504.0
DA3, ORACLE = "da3", "oracle:mujoco"  # sources of geometry
MAX_FEATURE_DIM = 1024  # so that a basis has at most 64 MiB, whoever made the cache
_MAX_FEATURE_WIDTH = 16384  # that of DA3-GIANT is 3072
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates

Views = Literal["joint", "independent"]
ComputeDtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of DA3, and its channels in the statistics, of which the adapter sees those of the heads."""

    name: str
    channels: tuple[str, ...]
    """Names of the channels, in order."""
    log: bool
    """True if the adapter and the statistics take the natural logarithm: confidences are exponentials."""

    @property
    def trailing(self) -> tuple[int, ...]:
        """Return the shape after the grid: (6,) for rays, () for maps with one number per cell.

        That of ``feature`` is in the spec.
        """
        return (len(self.channels),) if len(self.channels) > 1 else ()


OUTPUTS: dict[str, Output] = {
    output.name: output
    for output in (
        Output(name="ray", channels=("ray_dx", "ray_dy", "ray_dz", "ray_ox", "ray_oy", "ray_oz"), log=False),
        Output(name="ray_conf", channels=("log_ray_conf",), log=True),
        Output(name="depth", channels=("depth",), log=False),
        Output(name="depth_conf", channels=("log_depth_conf",), log=True),
        Output(name=FEATURE, channels=(FEATURE,), log=False),  # statistics of all its numbers together
    )
}
DEFAULT_OUTPUTS = ("ray", "ray_conf")
HEAD_OUTPUTS = tuple(name for name in OUTPUTS if name != FEATURE)


def batch_key(output: str) -> str:
    """Return the batch key of an output: ``ray`` -> ``observation.geometry.ray``."""
    return BATCH_KEY_PREFIX + output


def parse_grid(grid: str) -> tuple[int, int] | None:
    """Return None for the grids ``patch`` and ``native``, and (h, w) for ``HxW``.

    Raises:
        UserInputError: the text is none of these.
    """
    if grid in ("patch", "native"):
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", grid)
    if match is None:
        raise UserInputError(f"grid: expected 'patch', 'native' or HxW such as 14x14, got {grid!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One view of a frame: a feature of the dataset and the size of its images in pixels."""

    key: str
    """LeRobot's feature name, such as ``observation.images.image``."""
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """How the backbone's features became the numbers that are cached: by a basis, which the cache holds."""

    width: int
    """Numbers of a patch, as the backbone gives them."""
    dim: int
    """D, columns of the basis: numbers that are cached."""
    basis_sha256: str
    """sha256 of the basis, little-endian float32 [width, D]."""


@dataclass(frozen=True, kw_only=True)
class GeometrySpec:
    """Everything that the numbers depend on except the pixels. Stored in the cache and the checkpoint, and compared."""

    model_id: str
    """What the user typed: a DA3 name, a Hub id or a folder's name. A label: `weights_sha256` is the identity."""
    model_revision: str | None
    """Resolved commit on the Hub; None for a local folder."""
    model_name: str
    """Upstream's preset, which fixes the architecture, such as ``da3-small``; ``oracle:mujoco`` for true geometry."""
    weights_sha256: str
    """sha256 of ``model.safetensors``, hexadecimal."""
    da3_version: str
    """Version of the ``depth-anything-3`` package."""
    views: Views
    """``joint``: the cameras of a frame are views of one scene. ``independent``: DA3 sees each camera alone."""
    cameras: tuple[Camera, ...]
    """The cameras in view order; the first is the reference."""
    process_res: int
    """Longest side of the network's input in pixels, before rounding to multiples of 14."""
    resize_method: str = "upper_bound_resize"
    """Upstream's ``process_res_method``."""
    reference_view: str = "first"
    """Upstream's ``ref_view_strategy``. Any other one could choose differently for each frame."""
    grid: str
    """``patch``, ``native`` or ``HxW``."""
    grid_hw: tuple[int, int]
    """Cells (h, w) of every map."""
    outputs: tuple[str, ...]
    """Names from `OUTPUTS`, in the order given there."""
    compute_dtype: ComputeDtype
    """``fp32``, or ``bf16`` for the backbone under autocast."""
    storage_dtype: str = "float16"
    """The encoder rounds maps to this dtype and saturates values outside its range."""
    feature: FeatureSpec | None = None
    """Of the output ``feature``; None, and no member of the JSON, without it."""

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
        self._check_feature()

    def _check_feature(self) -> None:
        if (self.feature is None) == (FEATURE in self.outputs):
            raise UserInputError(
                f"feature: expected its width, dim and basis with the output {FEATURE!r}, and only then, got"
                f" {self.feature} with outputs {','.join(self.outputs)}"
            )
        if self.feature is None:
            return
        width, dim = self.feature.width, self.feature.dim
        if not (1 <= dim <= width <= _MAX_FEATURE_WIDTH and dim <= MAX_FEATURE_DIM):
            raise UserInputError(
                f"feature-dim: expected 1 to {min(width, MAX_FEATURE_DIM)}, of the {width} numbers that the backbone"
                f" gives a patch, got {dim}"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.feature.basis_sha256):
            raise UserInputError(f"feature: expected a sha256, got {self.feature.basis_sha256!r:.80}")

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """Return the keys of the cameras in view order."""
        return tuple(camera.key for camera in self.cameras)

    @property
    def source(self) -> str:
        """Return what made the geometry: ``da3``, or the name of another source, which has a colon."""
        return self.model_name if ":" in self.model_name else DA3

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of the channels that the adapter sees, in order."""
        return tuple(channel for name in self.outputs if name != FEATURE for channel in OUTPUTS[name].channels)

    def without_feature(self) -> Self:
        """Return the spec of the geometry alone."""
        geometry = tuple(name for name in self.outputs if name != FEATURE)
        return dataclasses.replace(self, outputs=geometry, feature=None)

    def map_shape(self, output: str) -> tuple[int, ...]:
        """Return the shape of one map: [h, w, 6] for ``ray``, [h, w, D] for ``feature``, [h, w] for the others."""
        if output == FEATURE:
            assert self.feature is not None
            return (*self.grid_hw, self.feature.dim)
        return (*self.grid_hw, *OUTPUTS[output].trailing)

    @property
    def frame_nbytes(self) -> int:
        """Return the bytes of one frame's maps over all views and outputs, without checksums."""
        numbers = sum(prod(self.map_shape(name)) for name in self.outputs)
        return len(self.cameras) * numbers * np.dtype(self.storage_dtype).itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON types."""
        data = _to_json(self)
        if self.feature is None:
            del data["feature"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the spec from what `to_dict` returned.

        Raises:
            CacheFormatError: a field is missing, unknown or of the wrong type or value.
        """
        return _from_json(cls, data, "spec")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The dataset that a cache belongs to: its name, and the hashes that tell whether the frames are the same."""

    repo_id: str
    """A label: two copies of one dataset under two names have the same frames."""
    revision: str | None
    """Resolved commit on the Hub; None for a local folder without one. A label from schema version 2 on: what the
    frames are is told by the episodes."""
    frames: int
    """N, all frames of the dataset, even if only some episodes are cached."""
    episodes: int
    """E, all episodes of the dataset."""
    fps: int | float
    """An int if it is whole, so that the canonical JSON of such datasets stays what it was."""
    episodes_sha256: str
    """sha256 of the episodes' lengths in order, little-endian int64."""
    identities_sha256: str | None = None
    """sha256 of the episodes' identities in order, little-endian uint64. In schema version 2 only."""
    images_sha256: str | None = None
    """sha256 of what the dataset's metadata says about the cameras' images: features, the place of each episode's
    frames, and statistics. In schema version 1 only."""
    decoder: str
    """The decoder of the stored images: ``pyav``, ``torchcodec`` or ``image``. Decoders round differently."""

    def __post_init__(self) -> None:
        if (self.identities_sha256 is None) == (self.images_sha256 is None):
            raise UserInputError(
                f"dataset {self.repo_id}: expected either identities_sha256 or images_sha256, got"
                f" {'both' if self.images_sha256 else 'none'}"
            )
        for name in ("frames", "episodes", "fps"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UserInputError(f"dataset {self.repo_id}: expected {name} >= 1, got {getattr(self, name)}")

    @property
    def schema_version(self) -> int:
        """Return the version of the cache format that describes a dataset by these fields."""
        return 1 if self.identities_sha256 is None else 2

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON types, without the field of the other schema version."""
        data = _to_json(self)
        del data["identities_sha256" if self.schema_version == 1 else "images_sha256"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build the spec from what `to_dict` returned.

        Raises:
            CacheFormatError: a field is missing, unknown or of the wrong type or value.
        """
        return _from_json(cls, data, "dataset")


def fingerprint(spec: GeometrySpec, dataset: DatasetSpec) -> str:
    """Return the identity of a cache's content: the sha256, hexadecimal, of the canonical JSON of both specs.

    Labels (`model_id`, `repo_id`, and `revision` from schema version 2 on) are left out: the same weights and frames
    under other names give the same numbers.
    """
    content = {"spec": spec.to_dict(), "dataset": dataset.to_dict()}
    del content["spec"]["model_id"], content["dataset"]["repo_id"]
    if dataset.schema_version >= 2:
        del content["dataset"]["revision"]
    return hashlib.sha256(canonical_json(content)).hexdigest()


def differences(
    cached: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, cached value, wanted value) of each field in which two specs, as dictionaries, differ."""
    for key in dict.fromkeys((*cached, *wanted)):
        cached_value, wanted_value = cached.get(key), wanted.get(key)
        if isinstance(cached_value, Mapping) and isinstance(wanted_value, Mapping):
            yield from differences(cached_value, wanted_value, f"{prefix}{key}.")
        elif cached_value != wanted_value:
            yield f"{prefix}{key}", cached_value, wanted_value


def canonical_json(data: object) -> bytes:
    """Return ASCII JSON with sorted keys and no white space: the same bytes for the same content."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse_outputs(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Check output names and return them in the order of `OUTPUTS`.

    Raises:
        UserInputError: a name is unknown or given twice, or ``ray`` is missing.
    """
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or len(set(names)) != len(names) or "ray" not in names:
        raise UserInputError(
            f"outputs: expected 'ray' and any of {', '.join(OUTPUTS)}, each once, got {','.join(names)!r}"
        )
    return tuple(name for name in OUTPUTS if name in names)


def check_camera_key(key: str) -> None:
    """Refuse a camera key that could lead outside the cache, in which it names a folder.

    Raises:
        UserInputError: the key is not made of letters, digits, '.', '_' and '-', or starts with a dot or dash.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", key):
        raise UserInputError(f"camera key: expected letters, digits, '.', '_' and '-', got {key!r}")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """DA3's outputs for a batch of frames. All arrays are NumPy's or all torch's; maps have one dtype and device."""

    ray: Any  # [B, V, h, w, 6]
    ray_conf: Any | None = None  # [B, V, h, w]
    depth: Any | None = None  # [B, V, h, w]
    depth_conf: Any | None = None  # [B, V, h, w]
    feature: Any | None = None  # [B, V, h, w, D]
    valid: Any | None = None  # [B, V, h, w] bool: cells that hold a value; None: all of them

    def __post_init__(self) -> None:
        if self.ray.ndim != 5 or self.ray.shape[-1] != 6:
            raise GeometryError(f"ray: expected shape [B, V, h, w, 6], got {list(self.ray.shape)}")
        for name, array in self.items():
            expected = (*self.ray.shape[:4], *(array.shape[-1:] if name == FEATURE else OUTPUTS[name].trailing))
            if tuple(array.shape) != expected:
                raise GeometryError(f"{name}: expected shape {list(expected)}, as ray has, got {list(array.shape)}")
            if array.dtype != self.ray.dtype:
                raise GeometryError(f"{name}: expected ray's dtype {self.ray.dtype}, got {array.dtype}")
        if self.valid is not None and tuple(self.valid.shape) != tuple(self.ray.shape[:4]):
            raise GeometryError(f"valid: expected shape {list(self.ray.shape[:4])}, got {list(self.valid.shape)}")

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, array) of the outputs that are present, in the order of `OUTPUTS`."""
        for name in OUTPUTS:
            array = getattr(self, name)
            if array is not None:
                yield name, array

    @property
    def batch_size(self) -> int:
        """Return B."""
        return int(self.ray.shape[0])

    def without_feature(self) -> Self:
        """Return the geometry alone."""
        return dataclasses.replace(self, feature=None)

    def to_batch(self) -> dict[str, Any]:
        """Return the arrays as entries of a LeRobot batch."""
        mask = {} if self.valid is None else {batch_key(VALID): self.valid}
        return {batch_key(name): array for name, array in self.items()} | mask

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Self:
        """Take the geometry out of a LeRobot batch.

        Raises:
            GeometryError: the batch has none, or its shapes do not fit each other.
        """
        if batch_key("ray") not in batch:
            raise GeometryError(
                f"batch: expected {batch_key('ray')}, found no geometry among {', '.join(sorted(batch))}: train with"
                " `geomcache train --cache PATH`, or wrap the dataset in GeometryDataset"
            )
        return cls(**{name: batch[batch_key(name)] for name in (*OUTPUTS, VALID) if batch_key(name) in batch})

    def check(self, spec: GeometrySpec) -> None:
        """Compare the arrays with what a spec promises.

        Raises:
            GeometryError: outputs, views or grid differ.
        """
        outputs = tuple(name for name, _ in self.items())
        if outputs != spec.outputs:
            raise GeometryError(f"geometry: expected outputs {', '.join(spec.outputs)}, got {', '.join(outputs)}")
        expected = (len(spec.cameras), *spec.grid_hw)
        if tuple(self.ray.shape[1:4]) != expected:
            raise GeometryError(f"geometry: expected [V, h, w] = {list(expected)}, got {list(self.ray.shape[1:4])}")
        if spec.feature is not None and self.feature is not None and self.feature.shape[-1] != spec.feature.dim:
            raise GeometryError(f"{FEATURE}: expected {spec.feature.dim} numbers, got {self.feature.shape[-1]}")


def _to_json(spec: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))  # tuples become lists
    return data


class _Spec(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def _from_json[T: _Spec](cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build a spec from JSON types of unknown origin; `where` names it in messages."""
    try:
        spec = msgspec.convert(data, cls)
    except msgspec.ValidationError as error:  # a value of another type, or one that `__post_init__` refuses
        text, _, path = str(error).replace("`", "").partition(" - at $")
        field = re.match(r"\.(\w+)", path)
        if field is not None:
            choices = ", ".join(map(str, get_args(cls.__annotations__[field[1]])))
            text = text.replace("Invalid enum value", f"expected one of {choices}, got")
        text = re.sub("^Expected", "expected", text)
        raise CacheFormatError(f"{where}{path}: {text:.200}") from None
    # msgspec passes over fields that it does not know, and takes the default of one that is missing.
    fields = spec.to_dict()
    for name, expected, found in differences(fields, data):
        wanted = repr(expected) if name in fields else "no such field"
        raise CacheFormatError(f"{where}.{name}: expected {wanted:.200}, got {found!r:.200}")
    for name, value in data.items():
        if name not in fields:
            raise CacheFormatError(f"{where}.{name}: expected no such field, got {value!r:.200}")
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise CacheFormatError(f"{where}.{name}: expected text without control characters, got {value!r:.200}")
    return spec
