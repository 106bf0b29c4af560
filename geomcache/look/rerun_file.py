"""An episode as a file for rerun (https://rerun.io): cameras placed by their rays, pictures, maps and points.

One timeline, ``frame``. The world is DA3's: the first view's coordinates, x right, y down, z ahead. A camera that was
encoded alone (independent views) has a world of its own.

    <world>                     3D
      <camera>                  Transform3D: the pinhole's origin and rotation, fitted to the rays of each frame
        picture                 Pinhole and Image: RGB, or the directions' colours without a dataset
      <camera>_path             the origin in all frames, static
      <camera>_points           origin + depth * direction of every cell, in the picture's colours
    maps/<camera>/<map>         RGB, directions and scalar maps, in the colours of the sheet
    origin/<camera>/{x,y,z}     over time
    ray_conf/<camera>           mean, over time
"""

import logging
from pathlib import Path

import numpy as np
import rerun as rr
import rerun.blueprint as rrb
from numpy.typing import NDArray
from PIL import Image

from geomcache.geometry import FEATURE
from geomcache.look.drawing import AXIS_COLOURS
from geomcache.look.episode import SCALARS, Episode, Frame
from geomcache.look.pinhole import Pinhole
from geomcache.look.sheet import map_colours

TIMELINE = "frame"
RGB = "rgb"
JPEG_QUALITY = 90

logger = logging.getLogger(__name__)


def write_rerun(path: Path, episode: Episode) -> None:
    """Write the file, and log how many frames have rays that are no pinhole camera's."""
    spec, dataset = episode.store.spec, episode.store.dataset
    recording = rr.RecordingStream("geomcache", recording_id=f"{episode.store.fingerprint[:16]}-{episode.number}")
    recording.set_log_time_enabled(False)
    recording.save(path, default_blueprint=_blueprint(episode))
    try:
        recording.send_recording_name(f"{dataset.repo_id} episode {episode.number}, {spec.model_id}")
        _log_static(recording, episode)
        unplaced = dict.fromkeys(episode.views, 0)
        for frame in episode.frames():
            recording.set_time(TIMELINE, sequence=frame.number)
            colours = map_colours(episode, frame)
            for view, name in enumerate(episode.views):
                if not _log_camera(recording, episode, frame, view, colours["direction"][view]):
                    unplaced[name] += 1
                if frame.pictures is not None:
                    recording.log(f"maps/{name}/{RGB}", _compressed(frame.pictures[view]))
                for kind, pixels in colours.items():
                    recording.log(f"maps/{name}/{kind}", rr.Image(pixels[view]))
    finally:
        recording.flush()
        recording.disconnect()
    for name, count in unplaced.items():
        if count:
            logger.info(
                "%s: no pinhole camera has the rays of %d of %d frames: not placed in these", name, count, len(episode)
            )


def world_of(episode: Episode, view: int) -> str:
    """Return the path of a view's world."""
    return "world" if episode.store.spec.views == "joint" else f"world/{episode.views[view]}"


def camera_path(episode: Episode, view: int) -> str:
    """Return the path of a view's camera."""
    return f"{world_of(episode, view)}/{episode.views[view] if episode.store.spec.views == 'joint' else 'camera'}"


def _log_static(recording: rr.RecordingStream, episode: Episode) -> None:
    for view, name in enumerate(episode.views):
        world, camera = world_of(episode, view), camera_path(episode, view)
        recording.log(world, rr.ViewCoordinates.RDF, static=True)
        strip = rr.LineStrips3D([episode.origins[:, view]], colors=[(128, 128, 128)])
        recording.log(f"{camera}_path", strip, static=True)
        for axis, colour in zip("xyz", AXIS_COLOURS, strict=True):
            series = rr.SeriesLines(colors=[_rgb(colour)], names=[f"{name} {axis}"])
            recording.log(f"origin/{name}/{axis}", series, static=True)


def _log_camera(
    recording: rr.RecordingStream, episode: Episode, frame: Frame, view: int, directions: NDArray[np.uint8]
) -> bool:
    """Log one view of one frame, and return whether its rays are a pinhole camera's."""
    name, camera = episode.views[view], camera_path(episode, view)
    picture = directions if frame.pictures is None else frame.pictures[view]
    origin = episode.origins[frame.number, view]
    for axis, value in zip("xyz", origin.tolist(), strict=True):
        recording.log(f"origin/{name}/{axis}", rr.Scalars(value))
    if episode.confidence is not None:
        recording.log(f"ray_conf/{name}", rr.Scalars(float(episode.confidence[frame.number, view])))
    if "depth" in frame.maps:
        points, colours = point_cloud(frame, view, picture)
        recording.log(f"{camera}_points", rr.Points3D(points, colors=colours))
    pinhole = frame.pinhole(view)
    if pinhole is None:
        recording.log(camera, rr.Clear(recursive=True))
        return False
    _log_pinhole(recording, camera, pinhole, picture)
    return True


def _log_pinhole(recording: rr.RecordingStream, camera: str, pinhole: Pinhole, picture: NDArray[np.uint8]) -> None:
    height, width = picture.shape[:2]
    recording.log(camera, rr.Transform3D(translation=pinhole.origin, mat3x3=pinhole.rotation))
    intrinsics = pinhole.pixel_intrinsics(height, width)
    intrinsics[0, 1] = 0.0  # rerun's camera has square corners
    recording.log(
        f"{camera}/picture",
        rr.Pinhole(image_from_camera=intrinsics, resolution=[width, height], camera_xyz=rr.ViewCoordinates.RDF),
        _compressed(picture),
    )


def point_cloud(frame: Frame, view: int, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return points [h * w, 3] of a view's cells, origin + depth * direction, and their colours [h * w, 3]."""
    ray, depth = frame.maps["ray"][view].astype(np.float32), frame.maps["depth"][view].astype(np.float32)
    points = ray[..., 3:] + depth[..., None] * ray[..., :3]
    cells = Image.fromarray(picture).resize((depth.shape[1], depth.shape[0]), Image.Resampling.BOX)
    return points.reshape(-1, 3), np.asarray(cells).reshape(-1, 3)


def _blueprint(episode: Episode) -> rrb.Blueprint:
    worlds = dict.fromkeys(world_of(episode, view) for view in range(len(episode.views)))
    spaces = [rrb.Spatial3DView(origin=world, name=world) for world in worlds]
    kinds = [RGB] if episode.reader is not None else []
    kinds += ["direction", *(kind for kind in (*SCALARS, FEATURE) if kind in episode.limits)]
    strips = [
        rrb.Horizontal(
            *(rrb.Spatial2DView(origin=f"maps/{name}/{kind}", name=f"{name}: {kind}") for kind in kinds),
        )
        for name in episode.views
    ]
    series = [rrb.TimeSeriesView(origin="origin", name="ray origin")]
    if episode.confidence is not None:
        series.append(rrb.TimeSeriesView(origin="ray_conf", name="mean ray_conf"))
    return rrb.Blueprint(
        rrb.Vertical(
            rrb.Horizontal(*spaces, rrb.Vertical(*series), column_shares=[2] * len(spaces) + [1]),
            *strips,
            row_shares=[2] + [1] * len(strips),
        ),
        rrb.TimePanel(timeline=TIMELINE, fps=episode.store.dataset.fps, state="collapsed"),
        collapse_panels=True,
    )


def _compressed(picture: NDArray[np.uint8]) -> rr.EncodedImage | rr.Image:
    return rr.Image(picture).compress(jpeg_quality=JPEG_QUALITY)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
