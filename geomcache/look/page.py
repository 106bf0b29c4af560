"""The page of ``geomcache report``: one HTML file with its style, pictures and charts; it fetches nothing.

`page.html.j2` has the words and their order. Names in a cache may be hostile: the template escapes every value.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from geomcache.geometry import OUTPUTS
from geomcache.look.charts import histogram, over_time, series_colour
from geomcache.look.drawing import fit_width, scalar_colours, vector_colours
from geomcache.look.episode import SCALARS, short_key
from geomcache.look.gather import Report, ShownFrame
from geomcache.look.info import describe_rows
from geomcache.look.value_counts import ValueCounts
from geomcache.progress import human_bytes

BINS = 80
TAIL = 0.1  # percent of the values on either side that a histogram leaves out
GROUPS = 240  # points of a line over time
TICKS = 60  # episodes whose starts are marked
THUMBNAIL = 192  # pixels


def write_page(report: Report) -> str:
    """Return the whole file."""
    spec, dataset = report.facts["spec"], report.facts["dataset"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("geomcache.look", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text: str = environment.get_template("page.html.j2").render(
        title=f"{dataset['repo_id']}: geometry by {spec['model_id']}",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("geomcache"),
        looked_at=len(report.rows),
        present=report.facts["frames_present"],
        frames=dataset["frames"],
        facts=list(describe_rows(report.facts)),
        confidence_of=report.confidence_of,
        **({} if report.confidence_of is None else _confidence(report, report.confidence_of)),
        samples=[_sample(report, shown) for shown in report.samples],
        no_pictures=report.no_pictures,
        tail=TAIL,
        legend=[{"name": camera, "colour": series_colour(view)} for view, camera in enumerate(report.cameras)],
        histograms=_histograms(report),
        disk=_disk(report),
    )
    return text


def _confidence(report: Report, name: str) -> dict[str, Any]:
    """Return what the page says of the confidences: charts over time and the frames with the lowest."""
    size = -(-len(report.rows) // GROUPS)
    gaps = np.flatnonzero(np.diff(report.segments)) + 1
    starts = np.union1d(np.arange(size, len(report.rows), size), gaps).astype(int)
    positions = np.split(np.arange(len(report.rows)), starts)
    breaks = np.flatnonzero(np.isin(starts, gaps)) + 1  # the first point of each gapless stretch but the first
    limits = float(report.confidence.min()), float(report.confidence.max())
    span = int(report.rows[0]), int(report.rows[-1])
    episodes = report.episode_start[(report.episode_start > span[0]) & (report.episode_start < span[1])].tolist()
    ticks = episodes if len(episodes) <= TICKS else []
    charts = []
    for view, camera in enumerate(report.cameras):
        points = np.array([_point(report, view, part) for part in positions])
        chart = over_time(view, np.split(points, breaks), limits, span, name, ticks)
        charts.append({"name": camera, "address": _address(chart, "svg+xml")})
    return {
        "frames_a_point": size,
        "marked": bool(ticks),
        "over_time": charts,
        "outliers": [
            {
                "confidence": f"{outlier.confidence:.3f}",
                "episode": outlier.shown.episode,
                "frame": outlier.shown.frame,
                "camera": report.cameras[outlier.view],
                "images": _images(report, outlier.shown, outlier.view, [name]),
            }
            for outlier in report.outliers
        ],
    }


def _point(report: Report, view: int, positions: NDArray[np.int64]) -> tuple[float, ...]:
    """Return mean time, and mean, lowest and highest confidence, of neighbouring frames."""
    values = report.confidence[positions, view]
    return report.rows[positions].mean(), values.mean(), values.min(), values.max()


def _sample(report: Report, shown: ShownFrame) -> dict[str, Any]:
    return {
        "episode": shown.episode,
        "frame": shown.frame,
        "index": shown.row,
        "views": [
            {"camera": camera, "images": _images(report, shown, view, SCALARS)}
            for view, camera in enumerate(report.cameras)
        ],
    }


def _images(report: Report, shown: ShownFrame, view: int, scalars: Iterable[str]) -> list[dict[str, str]]:
    """Return one camera's picture, its directions, and those of the scalar outputs that are cached."""
    images = []
    if shown.pictures is not None:
        images.append({"name": "RGB", "address": _thumbnail(shown.pictures[view], "jpeg", quality=85), "kind": "photo"})
    maps = {"direction": vector_colours(shown.maps["ray"][view, ..., :3], report.limits["direction"])}
    for name in scalars:
        if name in shown.maps:
            maps[name] = scalar_colours(shown.maps[name][view], report.limits[name])
    for name, colours in maps.items():
        images.append({"name": name, "address": _thumbnail(colours, "png", optimize=True), "kind": "map"})
    return images


def _thumbnail(pixels: NDArray[np.uint8], kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    fit_width(pixels, min(THUMBNAIL, pixels.shape[1])).save(buffer, kind, **options)
    return _address(buffer.getvalue(), kind)


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _histograms(report: Report) -> list[dict[str, str]]:
    charts = []
    for channel in dict.fromkeys(channel for _, channel in report.counts):
        series = [report.counts[view, channel] for view in range(len(report.cameras))]
        log = channel in OUTPUTS and OUTPUTS[channel].log
        chart, note = _histogram(series, log=log)
        name = f"log {channel}" if log else channel
        charts.append({"name": name, "address": _address(chart, "svg+xml"), "note": note})
    return charts


def _histogram(series: Sequence[ValueCounts], *, log: bool) -> tuple[bytes, str]:
    """Return a channel's chart, and its range in words."""
    together = ValueCounts.merged(series)
    values = [together.percentile(percent) for percent in (TAIL, 100.0 - TAIL, 0.0, 50.0, 100.0)]
    low, high, lowest, median, highest = np.log(values).tolist() if log else values
    half = max((high - low) / 2, 1e-3 * max(abs(low), 1e-3))  # a channel may hold one value alone
    edges = np.linspace((low + high) / 2 - half, (low + high) / 2 + half, BINS + 1, dtype=np.float64)
    value_edges: NDArray[np.float64] = np.exp(edges) if log else edges
    counts = [counted.histogram(value_edges) for counted in series]
    return histogram(counts, edges), f"min {lowest:.4g}, median {median:.4g}, max {highest:.4g}"


def _disk(report: Report) -> dict[str, Any]:
    total, present = report.facts["nbytes"], report.facts["frames_present"]
    frames = report.facts["dataset"]["frames"]
    return {
        "total": human_bytes(total),
        "a_frame": human_bytes(total / present),
        "all_frames": None if present == frames else human_bytes(total / present * frames),
        "uses": [
            {
                "name": f"{short_key(camera)} {output}" if camera else "checksums",
                "nbytes": human_bytes(nbytes),
                "a_frame": human_bytes(nbytes / present),
                "percent": f"{100 * nbytes / total:.1f}",
            }
            for (camera, output), nbytes in report.nbytes.items()
        ],
    }
