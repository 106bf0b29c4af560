"""The command `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.cli import help as cli_help


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=cli_help.COMPARE, rich_help_panel=cli_help.STAGES)(compare)


def compare(
    results: Annotated[
        list[Path], typer.Argument(help="Files with a row for each episode; the others are compared with the first.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for comparison.md and comparison.png.", metavar="DIR", show_default="none is written"
        ),
    ] = None,
) -> None:
    """Compare evaluations of the same episodes: differences in success, with intervals and a test."""
    from geomcache.evaluation.compare import compare as run
    from geomcache.evaluation.comparison_page import lines, write_page

    comparisons = run(results)
    typer.echo("\n".join(lines(comparisons)))
    if output is not None:
        for path in write_page(comparisons, output):
            typer.echo(f"written: {path}")
