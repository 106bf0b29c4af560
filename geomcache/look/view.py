"""``geomcache view``: what DA3 saw, beside what the camera saw: a frame's picture, an episode's video or rerun file."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomcache.cache.store import GeometryStore
from geomcache.errors import DatasetNotFoundError, UserInputError
from geomcache.frames.of_cache import open_pictures
from geomcache.frames.reader import FrameReader
from geomcache.look.episode import Episode, require_cached, require_frame, survey
from geomcache.look.output import check_output, replacing
from geomcache.look.sheet import draw_frame
from geomcache.progress import human_bytes

SUFFIXES = (".png", ".mp4", ".rrd")


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """What to show, and where it is."""

    path: Path
    """The cache."""
    episode: int
    frame: int | None = None
    """Of a picture: the first where None. Videos and rerun files have all."""
    output: Path | None = None
    """One of `SUFFIXES`; a picture in the current folder where None."""
    dataset: str | None = None
    """The dataset's name; the cache's where None."""
    root: Path | None = None
    """The dataset's folder, where it is local."""
    revision: str | None = None
    """The dataset's branch, tag or commit on the Hub; the cache's where None."""
    rgb: bool = True
    """Whether the dataset's pictures are shown."""

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
        """The file to write."""
        if self.output is not None:
            return self.output
        return Path(f"{self.path.name.removesuffix('.zarr')}-episode-{self.episode}-frame-{self.frame or 0}.png")

    @property
    def suffix(self) -> str:
        """What is written."""
        return self.target.suffix.lower()


def view(options: ViewOptions) -> Iterator[str]:
    """Write the file; lines for the user.

    Raises:
        UserInputError: an episode or frame that the dataset has not.
        CacheError: there is no such cache, it lacks the episode, is damaged, or is of another dataset.
        DatasetError: the dataset is not at hand or cannot be read.
    """
    with GeometryStore.open(options.path) as store:
        require_cached(store, options.episode)
        frame = options.frame or 0
        require_frame(store, options.episode, frame)
        episode = survey(store, options.episode, _open_pictures(store, options))
        with replacing(options.target) as partial:
            if options.suffix == ".png":
                (shown,) = episode.frames(frame, frame + 1)
                draw_frame(episode, shown).save(partial)
                what = f"frame {frame} of episode {options.episode}"
            else:
                yield from _write_episode(episode, partial)
                what = f"{len(episode)} frames of episode {options.episode}"
        yield f"{options.target}: {what}, {human_bytes(options.target.stat().st_size)}"


def _write_episode(episode: Episode, path: Path) -> Iterator[str]:
    if path.suffix.lower() == ".mp4":
        from geomcache.look.video import write_video

        sheets = (draw_frame(episode, frame) for frame in episode.frames())
        write_video(path, sheets, episode.store.dataset.fps)
    else:
        from geomcache.look.rerun_file import write_rerun

        yield from write_rerun(path, episode)


def _open_pictures(store: GeometryStore, options: ViewOptions) -> FrameReader | None:
    if not options.rgb:
        return None
    episodes = np.array([options.episode])
    try:
        return open_pictures(store, episodes, dataset=options.dataset, root=options.root, revision=options.revision)
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(f"{error}; or leave the pictures out with --no-rgb") from error
