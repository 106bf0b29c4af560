"""``geomcache report``: a page about a cache. What is on it is gathered here, in one pass; `page` writes it.

Memory does not grow with the cache: values are counted (`ValueCounts`), frames are read a block at a time, and of a
frame its mean confidences stay. Of more frames than `ReportOptions.max_frames` so many are taken, evenly spaced.

Legend of shapes:  V views   h, w grid   n frames looked at
"""

from collections.abc import Iterator

from geomcache.look.gather import ReportOptions, gather
from geomcache.look.output import replacing
from geomcache.progress import human_bytes


def report(options: ReportOptions) -> Iterator[str]:
    """Write the page; lines for the user.

    Raises:
        CacheError: there is no such cache, it is empty or damaged, or it is not of this dataset.
        DatasetError: the dataset that was asked for cannot be had or read.
    """
    from geomcache.look.page import write_page

    gathered = gather(options)
    with replacing(options.output) as partial:
        partial.write_text(write_page(gathered), encoding="utf-8")
    if gathered.no_pictures is not None and options.rgb:
        yield f"no pictures: {gathered.no_pictures}"
    present = gathered.facts["frames_present"]
    yield f"{options.output}: {len(gathered.rows)} of {present} frames, {human_bytes(options.output.stat().st_size)}"
