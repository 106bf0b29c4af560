"""The options of ``geomcache view`` and ``report``: two dataclasses, from which the command line is made.

Options are checked before the work. The command line imports this module to print help, so it imports no NumPy.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from geomcache.errors import UserInputError

SUFFIXES = (".png", ".mp4", ".rrd")


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Where a cache's pictures are found.

    Raises:
        UserInputError: a dataset is named, and its pictures are to be left out.
    """

    path: Annotated[Path | str, Argument(help="A cache, or its address.", metavar="PATH")]
    dataset: Annotated[str | None, Option(help="The dataset's name.", show_default="as in the cache")] = None
    root: Annotated[Path | None, Option(help="The folder of a local dataset.", metavar="DIR")] = None
    revision: Annotated[str | None, Option(help="The dataset's branch, tag or commit.", metavar="REV")] = None
    rgb: Annotated[bool, Option("--rgb/--no-rgb", help="Show the dataset's pictures next to the geometry.")] = True

    def __post_init__(self) -> None:
        if not self.rgb:
            for name in ("dataset", "root", "revision"):
                if getattr(self, name) is not None:
                    raise UserInputError(f"--{name}: expected none with --no-rgb, got one: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class ViewOptions(PictureOptions):
    """What `geomcache view` shows.

    Raises:
        UserInputError: the file cannot be written, or the options contradict each other.
    """

    episode: Annotated[int, Option(help="Number of the episode.")]
    frame: Annotated[
        int | None, Option(help="Number of the frame within the episode, for a picture.", show_default="0")
    ] = None
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            help="FILE.png: one frame. FILE.mp4: the episode. FILE.rrd: the episode for rerun, in 3D.",
            metavar="FILE",
            show_default="a .png in the current folder",
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
        name = Path(self.path).name.removesuffix(".zarr")
        return Path(f"{name}-episode-{self.episode}-frame-{self.frame or 0}.png")

    @property
    def suffix(self) -> str:
        """Kind of the file, one of `SUFFIXES`."""
        return self.target.suffix.lower()


@dataclass(frozen=True, kw_only=True)
class ReportOptions(PictureOptions):
    """What `geomcache report` reads, and where the page goes.

    Raises:
        UserInputError: the file cannot be written, or the options contradict each other.
    """

    output: Annotated[Path, Option("--output", "-o", help="FILE.html.", metavar="FILE")]
    max_frames: Annotated[int, Option(help="Read at most this many frames, evenly spaced.")] = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_output(self.output, (".html",))
        if self.max_frames < 1:
            raise UserInputError(f"max-frames: expected at least 1, got {self.max_frames}")


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Check that a file can be written.

    Raises:
        UserInputError: its name ends in none of the suffixes, or its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise UserInputError(
            f"output {path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix or 'no suffix'}"
        )
    if path.is_dir():
        raise UserInputError(f"output {path}: expected a file, found a folder: choose a file in it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserInputError(f"output {path}: expected the folder {folder}, found none: create it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserInputError(
            f"output {path}: expected a writable folder, found {folder} without permission: choose another"
        )
