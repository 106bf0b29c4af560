"""``geomcache probe``: run Depth Anything 3 on pictures, print shapes and ranges, and save a picture of what it gave.

A check that a model loads and works, before hours of extraction. The pictures of one call are the views of one scene.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from geomcache.encoder import DA3Encoder
from geomcache.errors import UserInputError
from geomcache.geometry import OUTPUTS, Camera, Geometry

PICTURE_NAME = "probe.png"
LEGEND = "Depth and confidences: dark is small, bright is large (logarithm). Rays: x, y, z as red, green, blue."
PANEL, MARGIN, TEXT = 232, 8, 14  # pixels

# Anchors of the colour map viridis (Nathaniel Smith and Stéfan van der Walt, CC0), evenly spaced.
_VIRIDIS = np.array(
    [(68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
     (110, 206, 88), (181, 222, 43), (253, 231, 37)]
)  # fmt: skip

Panel = tuple[str, str, NDArray[np.uint8]]  # title, caption, picture [h, w, 3]


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
    _draw(rows, f"{spec.model_id} at process-res {process_res}.  {LEGEND}").save(output / PICTURE_NAME)
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
    shown: list[tuple[str, NDArray[np.float32], NDArray[np.uint8]]] = [
        ("depth", native["depth"], _scalar_colours(native["depth"])),
        ("depth_conf", native["depth_conf"], _scalar_colours(native["depth_conf"])),
        ("ray direction", native["ray"][..., :3], _vector_colours(native["ray"][..., :3])),
        ("ray origin", native["ray"][..., 3:], _vector_colours(native["ray"][..., 3:])),
        ("ray_conf", native["ray_conf"], _scalar_colours(native["ray_conf"])),
    ]
    cells = f"{tokens['ray'].shape[1]}x{tokens['ray'].shape[2]}"
    directions = tokens["ray"][..., :3]
    shown.append((f"tokens {cells}, direction", directions, _vector_colours(directions)))
    return [
        [
            (names[view], f"{picture.shape[0]}x{picture.shape[1]}", picture),
            *((title, _caption(values[view]), colours[view]) for title, values, colours in shown),
        ]
        for view, picture in enumerate(pictures)
    ]


def _caption(values: NDArray[np.float32]) -> str:
    """Range of one view's map; of each component, where there are three."""
    if values.ndim == 2:
        return f"{values.min():.3g} to {values.max():.3g}"
    flat = values.reshape(-1, 3)
    return "  ".join(
        f"{axis} {low:.2f}..{high:.2f}" for axis, low, high in zip("xyz", flat.min(0), flat.max(0), strict=True)
    )


def _scalar_colours(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[V, h, w] -> uint8 [V, h, w, 3]: dark to bright from the 1st to the 99th percentile of the logarithm."""
    logarithm = np.log(np.maximum(values, 1e-6))
    unit = _to_unit(logarithm, axis=None)
    places = np.linspace(0.0, 1.0, len(_VIRIDIS))
    return np.stack([np.interp(unit, places, _VIRIDIS[:, channel]) for channel in range(3)], axis=-1).astype(np.uint8)


def _vector_colours(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[V, h, w, 3] -> uint8 [V, h, w, 3]: x, y, z as red, green, blue, each over its own range."""
    return (_to_unit(values, axis=(0, 1, 2)) * 255).astype(np.uint8)


def _to_unit(values: NDArray[Any], axis: tuple[int, ...] | None) -> NDArray[Any]:
    low, high = np.percentile(values, (1, 99), axis=axis)
    unit: NDArray[Any] = np.clip((values - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
    return unit


def _draw(rows: list[list[Panel]], title: str) -> Image.Image:
    """Rows of panels, each with its title above and its caption below."""
    heights = [max(round(PANEL * p.shape[0] / p.shape[1]) for _, _, p in row) for row in rows]
    cell = 2 * (TEXT + 4) + MARGIN
    width = MARGIN + len(rows[0]) * (PANEL + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + TEXT + 8 + sum(heights) + len(rows) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT - 2)
    draw.text((MARGIN, MARGIN), title, fill="black", font=ImageFont.load_default(size=TEXT))
    top = MARGIN + TEXT + 8
    for row, height in zip(rows, heights, strict=True):
        for column, (name, caption, pixels) in enumerate(row):
            left = MARGIN + column * (PANEL + MARGIN)
            shown = Image.fromarray(pixels).resize(
                (PANEL, round(PANEL * pixels.shape[0] / pixels.shape[1])),
                Image.Resampling.NEAREST if pixels.shape[1] < PANEL else Image.Resampling.BOX,
            )
            draw.text((left, top), _fit(name, font), fill="black", font=font)
            sheet.paste(shown, (left, top + TEXT + 4))
            draw.text((left, top + TEXT + 6 + height), _fit(caption, font), fill="dimgray", font=font)
        top += height + cell
    return sheet


def _fit(text: str, font: Any) -> str:
    while font.getlength(text) > PANEL:
        text = text[:-4] + "..."
    return text
