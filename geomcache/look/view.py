"""``geomcache view``: cached geometry next to the cameras' pictures, as a picture, a video or a rerun file."""

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from geomcache.cache.durable import replacing
from geomcache.cache.store import GeometryStore
from geomcache.errors import DatasetNotFoundError
from geomcache.frames.of_cache import open_pictures
from geomcache.frames.reader import FrameReader
from geomcache.look.episode import Episode, require_cached, require_frame, survey
from geomcache.look.options import ViewOptions
from geomcache.progress import human_bytes
from geomcache.sharing.remote_store import open_store

PRINT_SCALE = 2  # a picture has twice a video's pixels a side

logger = logging.getLogger(__name__)


def view(options: ViewOptions) -> None:
    """Write the file.

    Raises:
        UserInputError: the dataset has no such episode or frame, or the cache cannot be drawn.
        CacheError: there is no such cache, it lacks the episode, is damaged, or is of another dataset.
        DatasetError: the dataset cannot be found or read.
    """
    with open_store(options.path) as store:
        require_cached(store, options.episode)
        frame = options.frame or 0
        require_frame(store, options.episode, frame)
        episode = survey(store, options.episode, _open_pictures(store, options))
        with replacing(options.target) as draft:
            _write(options.suffix, episode, frame, draft)
        shown = f"frame {frame}" if options.suffix == ".png" else f"{len(episode)} frames"
        size = human_bytes(options.target.stat().st_size)
        logger.info("%s: %s of episode %d, %s", options.target, shown, options.episode, size)


def _write(suffix: str, episode: Episode, frame: int, path: Path) -> None:
    if suffix == ".rrd":
        from geomcache.look.rerun_file import write_rerun

        write_rerun(path, episode)
        return
    from geomcache.look.sheet import EpisodeSheet

    if suffix == ".png":
        (shown,) = episode.frames(frame, frame + 1)
        Image.fromarray(EpisodeSheet(episode, scale=PRINT_SCALE).draw(shown)).save(path)
    else:
        from geomcache.look.video import write_video

        sheet = EpisodeSheet(episode)
        write_video(path, (sheet.draw(shown) for shown in episode.frames()), episode.store.dataset.fps)


def _open_pictures(store: GeometryStore, options: ViewOptions) -> FrameReader | None:
    if not options.rgb:
        return None
    episodes = np.array([options.episode])
    try:
        return open_pictures(store, episodes, dataset=options.dataset, root=options.root, revision=options.revision)
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(f"{error}; or use --no-rgb to leave the pictures out") from error
