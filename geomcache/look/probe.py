"""``geomcache probe``: run Depth Anything 3 on pictures, print shapes and ranges, and save a picture of what it gave.

A check that a model loads and works, before hours of extraction. The pictures of one call are the views of one scene.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import UserInputError
from geomcache.geometry import OUTPUTS, Camera, Geometry
from geomcache.look.drawing import (
    LEGEND,
    Panel,
    draw_sheet,
    limits_of,
    range_caption,
    scalar_colours,
    vector_colours,
)

PICTURE_NAME = "probe.png"


def probe(
    model: str,
    images: Sequence[Path],
    output: Path,
    *,
    process_res: int = 504,
    grid: str = "patch",
    device: str | None = None,
) -> list[str]:
    """Encode pictures as the views of one scene, and show the geometry.

    Args:
        model: a DA3 name, a Hub id or a folder.
        images: picture files; the first is the reference view.
        output: a folder, made where it is missing, for the picture.
        process_res: as in extraction.
        grid: of the tokens: as in extraction.
        device: as in extraction.

    Returns:
        Lines for the user.

    Raises:
        UserInputError: a file that is no picture, pictures whose sizes cannot be one scene's, or an option.
        ModelError: the model cannot be used.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(f"output {output}: expected a folder, cannot make it ({error.strerror})") from None
    pictures = [_read(path) for path in images]
    cameras = [
        Camera(key=_camera_key(view, path), height=picture.shape[0], width=picture.shape[1])
        for view, (path, picture) in enumerate(zip(images, pictures, strict=True))
    ]
    encoder = DA3Encoder.from_pretrained(
        model, cameras=cameras, process_res=process_res, grid="native", outputs=tuple(OUTPUTS), device=device
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
    rows = _panels(pictures, [path.name for path in images], native, tokens)
    heading = [f"{spec.model_id} at process-res {process_res}.  {LEGEND}"]
    draw_sheet(rows, heading).save(output / PICTURE_NAME)
    return [*lines, f"picture    {output / PICTURE_NAME}"]


def _read(path: Path) -> NDArray[np.uint8]:
    """A picture file, upright, as uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise UserInputError(f"image {path}: expected a picture, found something else") from None
    except OSError as error:
        raise UserInputError(f"image {path}: expected a picture, cannot read it ({error.strerror or error})") from None


def _camera_key(view: int, path: Path) -> str:
    """The file's name, as the errors of the encoder show it; the number makes it unique."""
    return f"{view}-{re.sub(r'[^A-Za-z0-9._-]', '_', path.name)}"[:200]


def _one_frame(geometry: Geometry) -> dict[str, NDArray[np.float32]]:
    """[V, h, w, ...] of each output."""
    return {name: values[0].float().cpu().numpy() for name, values in geometry.items()}


def _line(name: str, values: NDArray[np.float32]) -> str:
    shape = "[" + ", ".join(map(str, values.shape)) + "]"
    return f"{name:<12} {shape:<20} min {values.min():.4g}  mean {values.mean():.4g}  max {values.max():.4g}"


def _panels(
    pictures: list[NDArray[np.uint8]],
    names: list[str],
    native: dict[str, NDArray[np.float32]],
    tokens: dict[str, NDArray[np.float32]],
) -> list[list[Panel]]:
    """A row of panels for each view. Colours mean the same in all views."""
    shown = [
        ("depth", native["depth"]),
        ("depth_conf", native["depth_conf"]),
        ("ray direction", native["ray"][..., :3]),
        ("ray origin", native["ray"][..., 3:]),
        ("ray_conf", native["ray_conf"]),
        (f"tokens {tokens['ray'].shape[1]}x{tokens['ray'].shape[2]}, direction", tokens["ray"][..., :3]),
    ]
    colours = [
        (vector_colours if values.ndim == 4 else scalar_colours)(values, limits_of(values)) for _, values in shown
    ]
    return [
        [
            Panel(title=names[view], caption=f"{picture.shape[0]}x{picture.shape[1]}", pixels=picture),
            *(
                Panel(title=title, caption=range_caption(values[view]), pixels=pixels[view])
                for (title, values), pixels in zip(shown, colours, strict=True)
            ),
        ]
        for view, picture in enumerate(pictures)
    ]
