"""Pictures as the network takes them: upstream's resizing, for decoding workers, and its normalisation."""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from depth_anything_3.utils.io.input_processor import InputProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from geomcache.da3.checks import Images, check_images
from geomcache.errors import UserInputError
from geomcache.geometry import PATCH_SIZE, Camera

NetworkInput = Tensor | list[Tensor]
"""uint8 [B, V, H, W, 3], or V of [B, H_v, W_v, 3] where the processed sizes differ: pictures before normalisation."""


class _Resizer(InputProcessor):  # type: ignore[misc]
    """Upstream's processor up to its last step: a picture of the network's size, not yet normalised."""

    def _normalize_image(self, img: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(img)).permute(2, 0, 1)  # upstream continues with its shape, [3, H, W]


def normalise(pictures: Tensor) -> Tensor:
    """Return what upstream's normalisation makes of pictures, to the bit, on every device.

    Each of a channel's 256 values is looked up among those that upstream computes on the CPU: another device's division
    rounds differently.

    Args:
        pictures: uint8 [..., H, W, 3].

    Returns:
        float32 [..., 3, H, W] on the same device, contiguous.
    """
    table = _normalised_values().to(pictures.device)  # [3, 256]
    normalised = torch.empty(*pictures.shape[:-3], 3, *pictures.shape[-3:-1], device=pictures.device)
    for channel, values in enumerate(table):
        codes = pictures[..., channel].flatten().int()
        normalised[..., channel, :, :] = values.index_select(0, codes).reshape(pictures.shape[:-1])
    return normalised


@functools.cache
def _normalised_values() -> Tensor:
    """Return upstream's normalisation of every value of each channel, float32 [3, 256]."""
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)  # [1, 256, 3]
    values: Tensor = InputProcessor()._normalize_image(Image.fromarray(ramp))
    return values[:, 0]


@dataclass(frozen=True)
class DA3Preprocessor:
    """Upstream's resizing of images to what the network sees. It holds no weights: decoding workers run it."""

    cameras: tuple[Camera, ...]
    process_res: int
    resize_method: str
    sizes: tuple[tuple[int, int], ...] = field(init=False)
    """(H, W) of each view as the network sees it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self._processed_size(camera) for camera in self.cameras))

    def __call__(self, images: Images) -> NetworkInput:
        """Resize to `process_res` and round to whole patches, image by image, in the calling thread.

        Normalisation follows on the encoder's device: a quarter of the bytes travels there.

        Args:
            images: uint8 [B, V, H, W, 3], or a sequence of V arrays [B, H_v, W_v, 3]; NumPy or torch, RGB.

        Returns:
            uint8 [B, V, H, W, 3] on the CPU; V tensors [B, H_v, W_v, 3] where the processed sizes differ.

        Raises:
            GeometryError: shapes, dtype or number of views are not those of the cameras.
        """
        views = check_images(images, self.cameras)
        batch = len(views[0])
        inputs: NetworkInput
        if len(set(self.sizes)) == 1:
            inputs = torch.empty(batch, len(views), *self.sizes[0], 3, dtype=torch.uint8)
            targets = list(inputs.unbind(1))
        else:
            inputs = targets = [torch.empty(batch, *size, 3, dtype=torch.uint8) for size in self.sizes]
        for view, target in zip(views, targets, strict=True):
            for image, row in zip(view, target, strict=True):
                row.copy_(self._process(image))
        return inputs

    def _process(self, image: NDArray[np.uint8]) -> Tensor:
        """Run the step that InputProcessor's call runs in a pool of threads: uint8 [H_v, W_v, 3] -> [H, W, 3]."""
        resized: Tensor = _Resizer()._process_one(
            image, process_res=self.process_res, process_res_method=self.resize_method
        )[0]
        return resized.permute(1, 2, 0)

    def _processed_size(self, camera: Camera) -> tuple[int, int]:
        height, width = self._process(np.zeros((camera.height, camera.width, 3), np.uint8)).shape[:2]
        if height % PATCH_SIZE or width % PATCH_SIZE:
            raise UserInputError(
                f"process-res: at {self.process_res}, {camera.key} of {camera.height}x{camera.width} becomes narrower"
                f" than a patch of {PATCH_SIZE} pixels: raise it"
            )
        return height, width
