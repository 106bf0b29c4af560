"""`geomcache extract`: its options are the fields of `ExtractOptions`, and a file of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from geomcache.cli import defaults
from geomcache.cli import help as cli_help
from geomcache.cli.options import parameter, with_options
from geomcache.extraction.options import ExtractOptions, recorded_options


def register(app: typer.Typer, run: Callable[[ExtractOptions], None] | None = None) -> None:
    """Add the command.

    Args:
        app: to add it to.
        run: what is called with the options; None to extract. pipelines/slurm/extract_datatrove.py gives them to ranks.
    """
    choices = {"dataset": lambda values: defaults.choose_dataset(values["root"])}
    command = with_options(run or extract, ExtractOptions, [parameter("config", CONFIG, None)], choices)
    app.command(name="extract", epilog=cli_help.EXTRACT, rich_help_panel=cli_help.STAGES)(command)


def extract(options: ExtractOptions) -> None:
    """Run DA3 once over every frame of a dataset and write a cache. Run the same command again to resume."""
    from geomcache.extraction import run

    if options.follow:
        for report in run.follow(options):
            typer.echo("\n".join(report.lines()))
        return
    report = run.extract(options)
    if not options.dry_run:
        typer.echo("\n".join(report.lines()))


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take the options in a file as defaults, before the others are parsed: the command line wins."""
    if file is not None:
        from geomcache.extraction.run_config import read_run_config

        context.default_map = dict(read_run_config(file, recorded_options()))
    return file


CONFIG = Annotated[
    Path | None,
    typer.Option(
        help="Take options from a file, such as the .run.yaml next to a cache; those on the command line win.",
        metavar="FILE",
        callback=_read_config,
        is_eager=True,
    ),
]
