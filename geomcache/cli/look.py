"""The commands ``geomcache view`` and ``geomcache report``. Heavy imports stay inside them, as in `main`."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.cli.help import CACHES, epilog

VIEW = epilog("""
    [bold]A frame[/bold]
      geomcache view libero.zarr --episode 12 --frame 80 --output frame.png

    [bold]A video of an episode[/bold]
      geomcache view libero.zarr --episode 12 --output episode.mp4

    [bold]In 3D[/bold], with the extra `view` installed
      geomcache view libero.zarr --episode 12 --output episode.rrd
      rerun episode.rrd
""")

REPORT = epilog("""
    [bold]Example[/bold]
      geomcache report libero.zarr --output report.html

    [bold]A local dataset[/bold]
      geomcache report libero.zarr --output report.html --root datasets/libero
""")

CacheArgument = Annotated[Path, typer.Argument(help="A cache.")]
DatasetOption = Annotated[str | None, typer.Option(help="The dataset's name.", show_default="as in the cache")]
RootOption = Annotated[Path | None, typer.Option(help="The folder of a local dataset.", metavar="DIR")]
RevisionOption = Annotated[str | None, typer.Option(help="The dataset's branch, tag or commit.", metavar="REV")]


def view(
    path: CacheArgument,
    episode: Annotated[int, typer.Option(help="Number of the episode.")],
    frame: Annotated[
        int | None, typer.Option(help="Number of the frame within the episode, for a picture.", show_default="0")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.png: one frame. FILE.mp4: the episode. FILE.rrd: the episode for rerun, in 3D.",
            metavar="FILE",
            show_default="a .png in the current folder",
        ),
    ] = None,
    dataset: DatasetOption = None,
    root: RootOption = None,
    revision: RevisionOption = None,
    rgb: Annotated[
        bool, typer.Option("--rgb/--no-rgb", help="Show the dataset's pictures next to the geometry.")
    ] = True,
) -> None:
    """Draw cached geometry next to the cameras' pictures: rays, confidence, depth and the cameras' paths."""
    from geomcache.look.view import ViewOptions
    from geomcache.look.view import view as run

    options = ViewOptions(
        path=path,
        episode=episode,
        frame=frame,
        output=output,
        dataset=dataset,
        root=root,
        revision=revision,
        rgb=rgb,
    )
    run(options)


def report(
    path: CacheArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.html.", metavar="FILE")],
    dataset: DatasetOption = None,
    root: RootOption = None,
    revision: RevisionOption = None,
    rgb: Annotated[
        bool, typer.Option("--rgb/--no-rgb", help="Show the dataset's pictures, if it is available.")
    ] = True,
    max_frames: Annotated[int, typer.Option(help="Read at most this many frames, evenly spaced.")] = 20_000,
) -> None:
    """Write an HTML page about a cache: facts, histograms, confidence over time, sample frames, outliers, disk use."""
    from geomcache.look.gather import ReportOptions
    from geomcache.look.report import report as run

    options = ReportOptions(
        path=path,
        output=output,
        dataset=dataset,
        root=root,
        revision=revision,
        rgb=rgb,
        max_frames=max_frames,
    )
    run(options)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(epilog=VIEW, rich_help_panel=CACHES)(view)
    app.command(epilog=REPORT, rich_help_panel=CACHES)(report)
