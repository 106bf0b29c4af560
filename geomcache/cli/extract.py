"""`geomcache extract`: its options are the fields of `ExtractOptions`, and a file of them."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from geomcache.cli import defaults
from geomcache.cli import help as cli_help
from geomcache.extraction.options import ExtractOptions, FromText, recorded_options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="extract", epilog=cli_help.EXTRACT, rich_help_panel=cli_help.STAGES)(_with_options(extract))


def extract(options: ExtractOptions) -> None:
    """Run DA3 once over every frame of a dataset and write a cache. Run the same command again to resume."""
    from geomcache.extraction.run import extract as run

    report = run(options)
    if not options.dry_run:
        for line in report.lines():
            typer.echo(line)


def _with_options(command: Callable[[ExtractOptions], None]) -> Callable[..., None]:
    """Turn a command that takes `ExtractOptions` into one whose signature typer can read: a parameter per field."""
    hints = get_type_hints(ExtractOptions, include_extras=True)
    parsers: dict[str, FromText] = {}
    parameters = []
    for field in fields(ExtractOptions):
        option, *markers = hints[field.name].__metadata__
        annotation, default = hints[field.name], field.default
        for marker in markers:
            parsers[field.name] = marker
            annotation = Annotated[str if default is not None else str | None, option]
        if field.name == "dataset":  # the command chooses one, and says so
            annotation, default = Annotated[str | None, option], None
        if isinstance(default, tuple):
            default = ",".join(default)
        parameters.append(_parameter(field.name, annotation, default))
    parameters.append(_parameter("config", CONFIG, None))

    def run(config: Path | None = None, **given: Any) -> None:  # noqa: ARG001 - its callback has read the file
        for name, marker in parsers.items():
            if given[name] is not None:
                given[name] = marker.parse(given[name])
        if given["dataset"] is None:
            given["dataset"] = defaults.choose_dataset(given["root"])
        command(ExtractOptions(**given))

    run.__doc__ = command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    if default is MISSING:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


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
