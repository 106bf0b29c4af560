"""`geomcache update`: its options are the fields of `UpdateOptions`."""

import typer

from geomcache.cli.help import CACHES, epilog
from geomcache.cli.options import with_options
from geomcache.extraction.options import UpdateOptions

UPDATE = epilog("""
    After episodes were recorded, deleted, split off, merged or re-ordered: frames whose pictures the cache knows keep
    their geometry, wherever they are now, and only the others are encoded. Every picture is decoded and compared.
    The new cache takes the place of the old one in one step, when it is complete; until then the old one stays as it
    is, and the same command resumes. A cache of schema version 1 becomes one of version 2.

    [bold]Examples[/bold]
      geomcache update libero.zarr --dataset me/libero --root data --dry-run
      geomcache update libero.zarr --dataset me/libero --root data

    [bold]Videos[/bold] that mix kept and deleted episodes are encoded again by `lerobot-edit-dataset`, which changes
    every picture a little. These frames are encoded anew, or keep their geometry:
      geomcache update libero.zarr --dataset me/libero --accept-reencoded
""")


def register(app: typer.Typer) -> None:
    """Add the command."""
    command = with_options(update, UpdateOptions)
    app.command(name="update", epilog=UPDATE, rich_help_panel=CACHES)(command)


def update(options: UpdateOptions) -> None:
    """Let a cache follow its dataset after an edit. Run the same command again to resume."""
    from geomcache.extraction.update import update as run

    report = run(options)
    if not options.dry_run:
        typer.echo("\n".join(report.lines()))
