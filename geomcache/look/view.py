"""``geomcache view``: cached geometry next to the cameras' pictures, as a picture, a video or a rerun file."""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from geomcache.cache.store import GeometryStore
from geomcache.errors import DatasetNotFoundError, UserInputError
from geomcache.frames.of_cache import open_pictures
from geomcache.frames.reader import FrameReader
from geomcache.look.episode import Episode, require_cached, require_frame, survey
from geomcache.look.output import check_output, replacing
from geomcache.progress import human_bytes

SUFFIXES = (".png", ".mp4", ".rrd")
PRINT_SCALE = 2  # a picture has twice a video's pixels a side

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """What to show, and where to find it."""

    path: Path
    """The cache."""
    episode: int
    frame: int | None = None
    """The frame of a picture; None for the first. Videos and rerun files show all."""
    output: Path | None = None
    """A file with one of `SUFFIXES`; None for a picture in the current folder."""
    dataset: str | None = None
    """The dataset's name; None for the cache's."""
    root: Path | None = None
    """The folder of a local dataset."""
    revision: str | None = None
    """The dataset's branch, tag or commit on the Hub; None for the cache's."""
    rgb: bool = True
    """Whether to show the dataset's pictures."""

    def __post_init__(self) -> None:
        if not self.rgb:
            for name in ("dataset", "root", "revision"):
                if getattr(self, name) is not None:
                    raise UserInputError(f"--{name}: expected none with --no-rgb, got one: leave one of them out")
        check_output(self.target, SUFFIXES)
        if self.frame is not None and self.suffix != ".png":
            raise UserInputError(f"--frame: expected none with {self.suffix}, which has all frames, got {self.frame}")
        if self.suffix == ".rrd" and importlib.util.find_spec("rerun") is None:
            raise UserInputError(
                f"output {self.target}: expected the package rerun-sdk, found none: install the extra with"
                " `uv sync --extra view` or `pip install rerun-sdk`"
            )

    @property
    def target(self) -> Path:
        """File to write."""
        if self.output is not None:
            return self.output
        return Path(f"{self.path.name.removesuffix('.zarr')}-episode-{self.episode}-frame-{self.frame or 0}.png")

    @property
    def suffix(self) -> str:
        """Kind of the file, one of `SUFFIXES`."""
        return self.target.suffix.lower()


def view(options: ViewOptions) -> None:
    """Write the file.

    Raises:
        UserInputError: the dataset has no such episode or frame, or the cache cannot be drawn.
        CacheError: there is no such cache, it lacks the episode, is damaged, or is of another dataset.
        DatasetError: the dataset cannot be found or read.
    """
    with GeometryStore.open(options.path) as store:
        require_cached(store, options.episode)
        frame = options.frame or 0
        require_frame(store, options.episode, frame)
        episode = survey(store, options.episode, _open_pictures(store, options))
        with replacing(options.target) as partial:
            _write(options.suffix, episode, frame, partial)
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
