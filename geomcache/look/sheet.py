"""A frame of an episode as a picture: a row for each camera, RGB beside directions, confidences, depth and origin."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geomcache.errors import GeometryError
from geomcache.look.drawing import (
    LEGEND,
    PANEL,
    Panel,
    draw_sheet,
    line_plot,
    range_caption,
    scalar_colours,
    vector_caption,
    vector_colours,
)
from geomcache.look.episode import SCALARS, Episode, Frame
from geomcache.look.pinhole import fit_pinhole


def draw_frame(episode: Episode, frame: Frame) -> Image.Image:
    """The frame's sheet. All sheets of an episode have one size and one scale of colours."""
    spec, dataset = episode.store.spec, episode.store.dataset
    heading = (
        f"{dataset.repo_id},  episode {episode.number},  frame {frame.number} of 0 to {len(episode) - 1}.  "
        f"{spec.model_id} at {spec.process_res} px,  {spec.views} views,  grid {spec.grid_hw[0]}x{spec.grid_hw[1]}.",
        f"{LEGEND}  Colours span the whole episode.",
    )
    return draw_sheet([_row(episode, frame, view) for view in range(len(episode.views))], heading)


def map_colours(episode: Episode, frame: Frame) -> dict[str, NDArray[np.uint8]]:
    """Colours [V, h, w, 3] of the directions and of every map of one number a cell."""
    colours = {"direction": vector_colours(frame.directions, episode.limits["direction"])}
    for name in SCALARS:
        if name in frame.maps:
            colours[name] = scalar_colours(frame.maps[name], episode.limits[name])
    return colours


def _row(episode: Episode, frame: Frame, view: int) -> list[Panel]:
    camera, colours = episode.store.spec.cameras[view], map_colours(episode, frame)
    panels = []
    if frame.pictures is not None:
        caption = f"{camera.height}x{camera.width}"
        panels.append(Panel(title=episode.views[view], caption=caption, pixels=frame.pictures[view]))
    caption = f"{range_caption(frame.directions[view])}  {pinhole_caption(frame, view)}"
    title = "ray direction" if panels else f"{episode.views[view]}: ray direction"
    panels.append(Panel(title=title, caption=caption, pixels=colours["direction"][view]))
    for name in SCALARS:
        if name in frame.maps:
            values = frame.maps[name][view]
            panels.append(Panel(title=name, caption=range_caption(values), pixels=colours[name][view]))
    origin = vector_caption(episode.origins[frame.number, view])
    plot = _plot(episode, frame, view, round(PANEL * camera.height / camera.width))
    panels.append(Panel(title="ray origin over the episode", caption=origin, pixels=plot))
    return panels


def _plot(episode: Episode, frame: Frame, view: int, height: int) -> NDArray[np.uint8]:
    """The origin's path, on one scale for all cameras: the reference camera hardly moves."""
    low, high = float(episode.origins.min()), float(episode.origins.max())
    margin = 0.05 * max(high - low, 1e-3)
    size = (max(height, PANEL // 2), PANEL)
    return line_plot(episode.origins[:, view], (low - margin, high + margin), frame.number, size)


def pinhole_caption(frame: Frame, view: int) -> str:
    """Field of view of the camera that has these rays, and how far they are from it; or that none has them."""
    confidence = frame.maps.get("ray_conf")
    try:
        pinhole = fit_pinhole(frame.maps["ray"][view], None if confidence is None else confidence[view])
    except GeometryError:
        return "no pinhole camera has these rays"
    horizontal, vertical = pinhole.fields_of_view
    return f"pinhole {horizontal:.0f} x {vertical:.0f} degrees  {100 * pinhole.residual:.1f} % off"
