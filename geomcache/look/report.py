"""``geomcache report``: one page about a cache. `gather` reads the cache, `page` writes the page."""

import logging

from geomcache.cache.durable import replacing
from geomcache.look.gather import gather
from geomcache.look.options import ReportOptions
from geomcache.progress import human_bytes

logger = logging.getLogger(__name__)


def report(options: ReportOptions) -> None:
    """Write the page.

    Raises:
        UserInputError: the cache has too many cameras to draw.
        CacheError: there is no such cache, it is empty or damaged, or it is of another dataset.
        DatasetError: the dataset that was asked for cannot be found or read.
    """
    from geomcache.look.page import write_page

    gathered = gather(options)
    with replacing(options.output) as draft:
        draft.write_text(write_page(gathered), encoding="utf-8")
    if gathered.no_pictures is not None and options.rgb:
        logger.info("no pictures: %s", gathered.no_pictures)
    size, present = human_bytes(options.output.stat().st_size), gathered.facts["frames_present"]
    logger.info("%s: %d of %d frames, %s", options.output, len(gathered.rows), present, size)
