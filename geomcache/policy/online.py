"""Encode the pictures of an observation at inference: back to uint8, then through the cache's encoder.

The encoder is no part of the policy's module tree: not in its state_dict, optimizer, copies or uploads.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geomcache.errors import GeometryError
from geomcache.geometry import DA3, Camera, Geometry, GeometrySpec

if TYPE_CHECKING:
    from geomcache.da3.encoder import DA3Encoder

# k / 255 in float32, times 255, is k to 2e-5. What is farther off never was an 8-bit picture, or was changed since.
_WHOLE = 1e-3


class OnlineEncoder:
    """Encoder of the pictures of a batch. The DA3 model is loaded at the first call, and only then imported.

    Threads may share it: one at a time loads and encodes.

    Attributes:
        encoder: None before the first call. A copy or a pickle of this object starts without it.
    """

    def __init__(self, spec: GeometrySpec, model: str | None, engine: str = "eager") -> None:
        """Keep what to load at the first call.

        Args:
            spec: spec of the geometry that the policy was trained with.
            model: a DA3 name, Hub id or folder; None: the spec's `model_id`.
            engine: ``eager``, or ``compiled`` to have torch compile the network at the first call. If that fails, the
                log has one warning, and the network runs eagerly.
        """
        self.spec = spec
        self.model = model
        self.engine = engine
        self.encoder: DA3Encoder | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type, tuple[GeometrySpec, str | None, str]]:
        return type(self), (
            self.spec,
            self.model,
            self.engine,
        )  # a copy starts without the encoder, with a lock of its own

    def __call__(self, batch: Mapping[str, Any], device: torch.device, *, allow_resize: bool) -> Geometry:
        """Encode all pictures of a batch in one call of the encoder.

        Args:
            batch: has [B, 3, H, W] uint8, or floats in [0, 1] made of uint8, of every camera of the spec.
            device: device of the encoder and of the result.
            allow_resize: accept pictures of another size than the cache was made of.

        Raises:
            GeometryError: a camera is missing, its pictures have another size, shape or content, or the policy was
                trained with geometry that no network makes.
            ModelError: the spec's DA3 is not available, or its weights are not those of the cache.
            CacheMismatchError: this installation's encoder would not compute what the cache's did.
        """
        if self.spec.source != DA3:
            raise GeometryError(
                f"batch: expected geometry of {self.spec.source}, which the policy was trained with, found pictures"
                " alone: they cannot be encoded to it; act in an environment that gives it (`geomcache eval"
                " --env.type=libero_geometry`)"
            )
        images = [self._pictures(batch, camera, allow_resize=allow_resize) for camera in self.spec.cameras]
        with self._lock:
            if self.encoder is None:
                self.encoder = self._load(images, device)
            return self.encoder.encode(images)

    def _load(self, images: Sequence[Tensor], device: torch.device) -> "DA3Encoder":
        """Load the encoder for pictures [B, H, W, 3] of these sizes."""
        from geomcache.da3.encoder import DA3Encoder

        # With the cameras' own sizes, which differ from the cache's only where that was allowed.
        cameras = tuple(
            dataclasses.replace(camera, height=image.shape[1], width=image.shape[2])
            for camera, image in zip(self.spec.cameras, images, strict=True)
        )
        spec = dataclasses.replace(self.spec, cameras=cameras)
        # Building a network draws random numbers. The policy's noise is the same whether or not it was built here.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            encoder = DA3Encoder.from_spec(spec, model=self.model, device=device)
            if self.engine == "compiled":
                encoder.compile(len(images[0]))
            return encoder

    def _pictures(self, batch: Mapping[str, Any], camera: Camera, *, allow_resize: bool) -> Tensor:
        """Return one view, [B, H, W, 3] uint8, equal to the bit to what the camera or the dataset gave."""
        if camera.key not in batch:
            pictures = ", ".join(sorted(key for key in batch if "image" in key)) or "no pictures"
            raise GeometryError(
                f"camera {camera.key}: expected in the batch, found {pictures}: the policy needs the cameras it was"
                f" trained with ({', '.join(self.spec.camera_keys)}), or geometry in the batch"
            )
        image: Tensor = batch[camera.key]
        if image.ndim != 4 or image.shape[1] != 3:
            raise GeometryError(f"camera {camera.key}: expected shape [B, 3, H, W], got {list(image.shape)}")
        height, width = image.shape[2:]
        if (height, width) != (camera.height, camera.width) and not allow_resize:
            raise GeometryError(
                f"camera {camera.key}: expected {camera.height}x{camera.width} pixels, as in the cache, got"
                f" {height}x{width}: set the environment's picture size to the cache's, or give `geomcache eval` the"
                " option --allow-resize"
            )
        return to_uint8(image, camera.key).permute(0, 2, 3, 1)


def to_uint8(image: Tensor, name: str) -> Tensor:
    """Undo LeRobot's division by 255.

    Args:
        image: uint8, which is returned as it is, or floats that are whole multiples of 1/255 from 0 to 1. In float16
            they are those rounded to it, to the bit: it tells all 256 apart, and 15,105 other numbers in between.
            bfloat16 has hardly any in between, so that a picture that was changed would pass: it is refused.
        name: name of the camera, for the message.

    Raises:
        GeometryError: the floats were not made from 8-bit pictures, or were changed since.
    """
    if image.dtype == torch.uint8:
        return image
    scaled = image.float() * 255.0
    whole = scaled.round().clamp(0, 255)
    fits = (scaled - whole).abs() <= _WHOLE if image.dtype != torch.float16 else (whole / 255.0).half() == image
    if not bool(fits.all()):  # NaN fits nowhere
        raise GeometryError(
            f"camera {name}: expected uint8, or its values divided by 255, got {image.dtype} from {image.min():.4g} to"
            f" {image.max():.4g} that are no multiples of 1/255 in [0, 1]: give the policy the pictures as recorded"
        )
    return whole.to(torch.uint8)
