"""``geomcache probe``: run Depth Anything 3 on pictures, print shapes and ranges, and save a picture of the maps.

A check that a model loads and works, before hours of extraction. The pictures of one call are the views of one scene.
"""

import logging
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import UserInputError, one_line
from geomcache.geometry import HEAD_OUTPUTS, Camera, Geometry

logger = logging.getLogger(__name__)

PICTURE_NAME = "probe.png"
DAMAGED_PICTURE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what Pillow raises
SCALE = 2  # for print
CONVENTION = "Rays are in the first view's coordinates: x right, y down, z ahead."


def probe(
    model: str,
    images: Sequence[Path],
    output: Path,
    *,
    process_res: int = 504,
    grid: str = "patch",
    device: str | None = None,
) -> None:
    """Encode pictures as the views of one scene, save a picture of the geometry, and log its shapes and ranges.

    Args:
        model: a DA3 name, a Hub id or a folder.
        images: picture files; the first is the reference view.
        output: a folder for the picture, created if it is missing.
        process_res: longest side of the network's input, in pixels, as in extraction.
        grid: of the tokens, as in extraction.
        device: as in extraction.

    Raises:
        UserInputError: a file is not a picture, the pictures' shapes differ, or an option is wrong.
        ModelError: the model cannot be loaded.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(f"output {output}: expected a folder, cannot create it ({error.strerror})") from None
    pictures = [_read(path) for path in images]
    cameras = [
        Camera(key=_camera_key(view, path), height=picture.shape[0], width=picture.shape[1])
        for view, (path, picture) in enumerate(zip(images, pictures, strict=True))
    ]
    encoder = DA3Encoder.from_pretrained(
        model, cameras=cameras, process_res=process_res, grid="native", outputs=HEAD_OUTPUTS, device=device
    )
    tokens_encoder = encoder.with_grid(grid)
    inputs = encoder.preprocess([picture[None] for picture in pictures])
    native = _one_frame(encoder.forward(inputs))
    tokens = _one_frame(tokens_encoder.forward(inputs))

    spec, size = encoder.spec, encoder.preprocessor.sizes[0]
    views = "1 view" if len(pictures) == 1 else f"{len(pictures)} views"
    lines = [
        f"model      {spec.model_id} ({spec.model_name}), weights sha256 {spec.weights_sha256[:12]}...",
        f"input      {views}, seen as {size[0]}x{size[1]}, {spec.compute_dtype} on {encoder.device}",
        *(_line(name, values) for name, values in native.items()),
        f"tokens     {grid} grid, {' x '.join(map(str, tokens['ray'].shape[:3]))} (views x h x w)",
        *(_line(f"  {name}", values) for name, values in tokens.items()),
    ]
    title = f"{spec.model_id} at process-res {process_res}"
    _draw(title, pictures, [path.name for path in images], native, tokens).save(output / PICTURE_NAME)
    for line in (*lines, f"picture    {output / PICTURE_NAME}"):
        logger.info(line)


def _read(path: Path) -> NDArray[np.uint8]:
    """Read a picture file as uint8 [H, W, 3], turned upright."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise UserInputError(f"image {path}: expected a picture, found something else") from None
    except DAMAGED_PICTURE as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserInputError(f"image {path}: expected a picture, cannot read it ({reason})") from None


def _camera_key(view: int, path: Path) -> str:
    """Return a key with the file's name, for the encoder's errors, and a number that makes it unique."""
    return f"{view}-{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)}"[:200]


def _one_frame(geometry: Geometry) -> dict[str, NDArray[np.float32]]:
    """Return [V, h, w, ...] of each output."""
    return {name: values[0].float().cpu().numpy() for name, values in geometry.items()}


def _line(name: str, values: NDArray[np.float32]) -> str:
    shape = "[" + ", ".join(map(str, values.shape)) + "]"
    return f"{name:<12} {shape:<20} min {values.min():.4g}  mean {values.mean():.4g}  max {values.max():.4g}"


def _draw(
    title: str,
    pictures: list[NDArray[np.uint8]],
    names: list[str],
    native: dict[str, NDArray[np.float32]],
    tokens: dict[str, NDArray[np.float32]],
) -> Image.Image:
    """Draw a line of panels for each view. Colours mean the same in all views."""
    from geomcache.look.drawing import (
        Column,
        Panel,
        Sheet,
        limits_of,
        panel_height,
        range_caption,
        scalar_colours,
        vector_colours,
    )

    maps = {
        "depth": native["depth"],
        "depth_conf": native["depth_conf"],
        "ray direction": native["ray"][..., :3],
        "ray origin": native["ray"][..., 3:],
        "ray_conf": native["ray_conf"],
        f"tokens {tokens['ray'].shape[1]}x{tokens['ray'].shape[2]}: direction": tokens["ray"][..., :3],
    }
    columns = [Column(title="image"), *(Column(title=name, limits=limits_of(maps[name])) for name in maps)]
    colours = [
        (vector_colours if values.ndim == 4 else scalar_colours)(values, limits_of(values)) for values in maps.values()
    ]
    panels = [
        [
            Panel(caption=f"{picture.shape[0]}x{picture.shape[1]}", pixels=picture),
            *(
                Panel(caption=range_caption(values[view]), pixels=pixels[view])
                for values, pixels in zip(maps.values(), colours, strict=True)
            ),
        ]
        for view, picture in enumerate(pictures)
    ]
    heights = [panel_height(*picture.shape[:2]) for picture in pictures]
    sheet = Sheet((title, CONVENTION), names, heights, columns, scale=SCALE)
    return Image.fromarray(sheet.draw(panels))
