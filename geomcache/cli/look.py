"""The commands ``geomcache view`` and ``geomcache report``. Heavy imports stay inside them, as in `main`."""

import typer

from geomcache.cli.help import CACHES, epilog
from geomcache.cli.options import with_options
from geomcache.look.options import ReportOptions, ViewOptions

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


def view(options: ViewOptions) -> None:
    """Draw cached geometry next to the cameras' pictures: rays, confidence, depth and the cameras' paths."""
    from geomcache.look.view import view as run

    run(options)


def report(options: ReportOptions) -> None:
    """Write an HTML page about a cache: facts, histograms, confidence over time, sample frames, outliers, disk use."""
    from geomcache.look.report import report as run

    run(options)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(name="view", epilog=VIEW, rich_help_panel=CACHES)(with_options(view, ViewOptions))
    app.command(name="report", epilog=REPORT, rich_help_panel=CACHES)(with_options(report, ReportOptions))
