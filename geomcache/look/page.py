"""The page of ``geomcache report``: one HTML file, style, pictures and charts in it, nothing fetched from anywhere."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.info import describe_rows
from geomcache.geometry import OUTPUTS
from geomcache.look.charts import histogram, legend, over_time
from geomcache.look.drawing import LEGEND, fit_width, scalar_colours, vector_colours
from geomcache.look.episode import SCALARS, short_key
from geomcache.look.gather import Outlier, Report, ShownFrame
from geomcache.look.value_counts import ValueCounts
from geomcache.progress import human_bytes

BINS = 80
TAIL = 0.1  # percent of the values on either side that a histogram leaves out
GROUPS = 240  # points of a line over time
TICKS = 60  # episodes whose starts are marked
THUMBNAIL = 192  # pixels


def write_page(report: Report) -> str:
    """The whole file."""
    spec, dataset = report.facts["spec"], report.facts["dataset"]
    title = f"{dataset['repo_id']}: geometry by {spec['model_id']}"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">Made {made} by geomcache {escape(version("geomcache"))}. {_coverage(report)}</p>',
        f"<h2>The cache</h2>{_facts(report.facts)}",
        "<h2>Confidence over time</h2>",
        *_confidence(report),
        f"<h2>Lowest confidence</h2>{_outliers(report)}",
        f"<h2>Sample frames</h2>{_samples(report)}",
        "<h2>Histograms</h2>",
        *_histograms(report),
        f"<h2>Disk use</h2>{_disk(report)}",
    ]
    style = files("geomcache.look").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n"
        "</html>\n"
    )


def _coverage(report: Report) -> str:
    present, looked = report.facts["frames_present"], len(report.rows)
    if looked == present:
        return f"All {present} frames of the cache were looked at."
    return f"{looked} of the cache's {present} frames were looked at, evenly spaced; what follows is of these."


def _facts(facts: dict[str, Any]) -> str:
    rows = (
        f'<tr><th class="{"indented" if name.startswith(" ") else ""}">{escape(name.strip())}</th>'
        f"<td>{escape(value)}</td></tr>"
        for name, value in describe_rows(facts)
    )
    return f"<table>{''.join(rows)}</table>"


def _confidence(report: Report) -> Iterator[str]:
    if report.confidence_of is None:
        yield "<p>The cache has neither ray_conf nor depth_conf.</p>"
        return
    together = -(-len(report.rows) // GROUPS)
    gaps = np.flatnonzero(np.diff(report.segments)) + 1
    groups = np.split(
        np.arange(len(report.rows)), np.union1d(np.arange(together, len(report.rows), together), gaps).astype(int)
    )
    limits = float(report.confidence.min()), float(report.confidence.max())
    span = int(report.rows[0]), int(report.rows[-1])
    starts = report.episode_start[(report.episode_start > span[0]) & (report.episode_start < span[1])].tolist()
    ticks = starts if len(starts) <= TICKS else []
    marked = " Grey lines: where an episode starts." if ticks else ""
    yield (
        f"<p>Mean {report.confidence_of} of a frame over the dataset's frame index. Line: mean of {together}"
        f" frames a point; band: lowest to highest.{marked}</p>"
    )
    yield '<div class="wide">'
    for view, camera in enumerate(report.cameras):
        values = report.confidence[:, view]
        points = [
            (
                float(report.rows[group].mean()),
                float(values[group].mean()),
                float(values[group].min()),
                float(values[group].max()),
                int(report.segments[group[0]]),
            )
            for group in groups
        ]
        yield over_time(camera, view, points, limits, span, ticks)
    yield "</div>"


def _outliers(report: Report) -> str:
    if report.confidence_of is None:
        return "<p>The cache has no confidence to choose by.</p>"
    cards = "".join(_outlier_card(report, outlier) for outlier in report.outliers)
    return (
        f"<p>The frames with the lowest mean {report.confidence_of}, at most one a second of each camera."
        f' Look at one with <code>geomcache view PATH --episode E --frame F</code>.</p><div class="cards">{cards}</div>'
    )


def _outlier_card(report: Report, outlier: Outlier) -> str:
    shown, names = outlier.shown, [str(report.confidence_of)]
    return (
        f'<figure class="card"><figcaption>{report.confidence_of} {outlier.confidence:.3f}'
        f"<small>episode {shown.episode}, frame {shown.frame}, {escape(report.cameras[outlier.view])}</small>"
        f'</figcaption><div class="pictures">{_pictures(report, shown, outlier.view, names)}</div></figure>'
    )


def _samples(report: Report) -> str:
    missing = ""
    if report.no_pictures is not None:
        missing = f"<p>Geometry alone, without the cameras' pictures: {escape(report.no_pictures)}.</p>"
    cards = []
    for shown in report.samples:
        views = "".join(
            f'<p>{escape(camera)}</p><div class="pictures">{_pictures(report, shown, view, SCALARS)}</div>'
            for view, camera in enumerate(report.cameras)
        )
        cards.append(
            f'<figure class="card"><figcaption>episode {shown.episode}, frame {shown.frame}'
            f"<small>index {shown.row}</small></figcaption>{views}</figure>"
        )
    return (
        f'<p>{LEGEND} Colours mean the same in all frames.</p>{missing}<div class="cards large">{"".join(cards)}</div>'
    )


def _pictures(report: Report, shown: ShownFrame, view: int, names: Iterable[str]) -> str:
    """One camera's picture, directions, and those of the named scalar outputs that are cached."""
    parts = []
    if shown.pictures is not None:
        parts.append(_image("RGB", _jpeg(shown.pictures[view]), "photo"))
    directions = vector_colours(shown.maps["ray"][view, ..., :3], report.limits["direction"])
    parts.append(_image("direction", _png(directions), "map"))
    scalars = {name: shown.maps[name][view] for name in names if name in shown.maps}
    parts += [
        _image(name, _png(scalar_colours(values, report.limits[name])), "map") for name, values in scalars.items()
    ]
    return "".join(parts)


def _image(name: str, address: str, kind: str) -> str:
    return f'<div><img class="{kind}" alt="{name}" src="{address}">{name}</div>'


def _jpeg(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    fit_width(pixels, min(THUMBNAIL, pixels.shape[1])).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    fit_width(pixels, min(THUMBNAIL, pixels.shape[1])).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _histograms(report: Report) -> Iterator[str]:
    yield (
        "<p>Share of each camera's values in each bin. Confidences are logarithms, as the adapter sees them. Left out"
        f" at either end: {TAIL} % of the values.</p>"
    )
    yield legend(report.cameras)
    yield '<div class="grid">'
    views = range(len(report.cameras))
    for channel in dict.fromkeys(channel for _, channel in report.counts):
        series = [report.counts[view, channel] for view in views]
        log = channel in OUTPUTS and OUTPUTS[channel].log
        yield _histogram(f"log {channel}" if log else channel, series, log=log)
    yield "</div>"


def _histogram(title: str, series: Sequence[ValueCounts], *, log: bool) -> str:
    together = ValueCounts.merged(series)
    low, high = (together.percentile(percent) for percent in (TAIL, 100.0 - TAIL))
    lowest, median, highest = (together.percentile(percent) for percent in (0.0, 50.0, 100.0))
    if log:
        low, high, lowest, median, highest = np.log((low, high, lowest, median, highest)).tolist()
    half = max((high - low) / 2, 1e-3 * max(abs(low), 1e-3))  # a channel may hold one value alone
    edges = np.linspace((low + high) / 2 - half, (low + high) / 2 + half, BINS + 1, dtype=np.float64)
    value_edges: NDArray[np.float64] = np.exp(edges) if log else edges
    counts = [found.histogram(value_edges) for found in series]
    return histogram(title, counts, edges, f"min {lowest:.4g}, median {median:.4g}, max {highest:.4g}")


def _disk(report: Report) -> str:
    total, present = report.facts["nbytes"], report.facts["frames_present"]
    frames = report.facts["dataset"]["frames"]
    rows = []
    for (camera, output), nbytes in report.nbytes.items():
        name = f"{short_key(camera)} {output}" if camera else "checksums"
        rows.append(
            f'<tr><th>{escape(name)}</th><td class="number">{human_bytes(nbytes)}</td>'
            f'<td class="number">{human_bytes(nbytes / present)}</td>'
            f'<td class="share"><span class="bar" style="width:{100 * nbytes / total:.1f}%"></span></td></tr>'
        )
    rest = "" if present == frames else f" All {frames} frames will take about {human_bytes(total / present * frames)}."
    return (
        f"<p>{human_bytes(total)} in shards for {present} frames: {human_bytes(total / present)} a frame.{rest}</p>"
        '<table><tr><th></th><th class="number">bytes</th><th class="number">a frame</th>'
        '<th class="share">share</th></tr>'
        f"{''.join(rows)}</table>"
    )
