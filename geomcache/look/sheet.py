"""A frame of an episode as a picture: for each camera its image, directions, confidences, depth and origin."""

import numpy as np
from numpy.typing import NDArray

from geomcache.geometry import FEATURE
from geomcache.look.drawing import (
    Column,
    Panel,
    Sheet,
    panel_height,
    range_caption,
    scalar_colours,
    shorten,
    vector_caption,
    vector_colours,
)
from geomcache.look.episode import FEATURE_SHOWN, SCALARS, Episode, Frame

COORDINATES = {"joint": "the first view's", "independent": "each view's own"}


class EpisodeSheet:
    """Draws an episode's frames in one layout and on one scale of colours.

    Args:
        episode: whose frames.
        scale: pixels of the picture for each pixel of the layout: 1 for videos, 2 for print.
    """

    def __init__(self, episode: Episode, *, scale: int = 1) -> None:
        spec = episode.store.spec
        self._episode = episode
        self._scalars = [name for name in SCALARS if name in episode.limits]
        columns = [
            Column(title="image"),
            Column(title="ray direction", limits=episode.limits["direction"]),
            *(Column(title=name, limits=episode.limits[name]) for name in self._scalars),
            *([Column(title="feature 2 to 4", limits=episode.limits[FEATURE])] if FEATURE in episode.limits else []),
            Column(title="ray origin over the episode"),
        ]
        title = f"{episode.store.dataset.repo_id},  episode {episode.number}"
        model = f"{shorten(spec.model_id, 60)} at {spec.process_res} px,  grid {spec.grid_hw[0]}x{spec.grid_hw[1]}."
        axes = f"Rays are in {COORDINATES[spec.views]} coordinates: x right, y down, z ahead."
        self._sheet = Sheet(
            (title, f"{model}  {axes}  Colours span the whole episode."),
            episode.views,
            [panel_height(camera.height, camera.width) for camera in spec.cameras],
            columns if episode.reader is not None else columns[1:],
            scale=scale,
        )
        low, high = float(episode.origins.min()), float(episode.origins.max())
        margin = 0.05 * max(high - low, 1e-3)  # one scale for all cameras: the reference camera hardly moves
        for view in range(len(spec.cameras)):
            paths = episode.origins[:, view]
            self._sheet.plot(view, self._sheet.columns - 1, paths, (low - margin, high + margin))

    def draw(self, frame: Frame) -> NDArray[np.uint8]:
        """Draw a frame: uint8 [height, width, 3], of one size in all frames."""
        colours = map_colours(self._episode, frame)
        panels = [self._panels(frame, view, colours) for view in range(len(self._episode.views))]
        return self._sheet.draw(panels, frame.number, f"frame {frame.number} of 0 to {len(self._episode) - 1}")

    def _panels(self, frame: Frame, view: int, colours: dict[str, NDArray[np.uint8]]) -> list[Panel]:
        camera = self._episode.store.spec.cameras[view]
        captions = {"direction": pinhole_caption(frame, view)}
        captions |= {name: range_caption(frame.maps[name][view]) for name in self._scalars}
        if FEATURE in colours:
            captions[FEATURE] = f"of {frame.maps[FEATURE].shape[-1]} numbers"
        panels = [Panel(caption=caption, pixels=colours[name][view]) for name, caption in captions.items()]
        if frame.pictures is not None:
            panels.insert(0, Panel(caption=f"{camera.height}x{camera.width}", pixels=frame.pictures[view]))
        origin = self._episode.origins[frame.number, view]
        return [*panels, Panel(caption=vector_caption(origin), pixels=None)]


def map_colours(episode: Episode, frame: Frame) -> dict[str, NDArray[np.uint8]]:
    """Return colours [V, h, w, 3] of the directions, of every map of one number a cell, and of features."""
    colours = {"direction": vector_colours(frame.directions, episode.limits["direction"])}
    for name in SCALARS:
        if name in frame.maps:
            colours[name] = scalar_colours(frame.maps[name], episode.limits[name])
    if FEATURE in episode.limits:
        colours[FEATURE] = vector_colours(frame.maps[FEATURE][..., FEATURE_SHOWN], episode.limits[FEATURE])
    return colours


def pinhole_caption(frame: Frame, view: int) -> str:
    """Say which field of view a camera with these rays has and how far off they are, or that no camera has them."""
    pinhole = frame.pinhole(view)
    if pinhole is None:
        return "no pinhole camera has these rays"
    horizontal, vertical = pinhole.fields_of_view
    return f"pinhole {horizontal:.0f} x {vertical:.0f} degrees, {100 * pinhole.residual:.1f} % off"
