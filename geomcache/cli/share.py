"""``geomcache push``, ``pull`` and ``models``. Imports stay inside the commands, as in `main`."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.cli.help import CACHES, MODELS, epilog

PUSH = epilog("""
    Files that the remote has already are not sent again: after a broken connection run the same command again to
    resume. The manifest goes last, so that an incomplete cache is never taken for a complete one. On the Hub a card
    tells model, licence, dataset and how to train. S3 needs the extra `s3`: pip install 'geomcache\\[s3]'.

    [bold]Example[/bold]
      geomcache push libero.zarr hf://datasets/me/libero-da3-large --private

    [bold]A bucket[/bold]
      geomcache push libero.zarr s3://my-bucket/libero.zarr --verify
""")

PULL = epilog("""
    PATH appears when every file has arrived and has its sha256. After a broken connection run the same command again
    to resume. More episodes can be pulled into the same PATH later.

    [bold]Example[/bold]
      geomcache pull hf://datasets/me/libero-da3-large libero.zarr

    [bold]A part[/bold], and training on it
      geomcache pull s3://my-bucket/libero.zarr libero.zarr --episodes 0:3
      geomcache train --cache libero.zarr --dataset.episodes=\\[0,1,2] ...
""")

TABLE = epilog("""
    [bold]Example[/bold]
      geomcache models

    [bold]In scripts[/bold]
      geomcache models --json | jq '.\\[] | select(.ray_head) | .name'
""")

ADDRESSES = "hf://datasets/owner/name, s3://bucket/name.zarr, or another that fsspec opens."


def push(
    path: Annotated[Path, typer.Argument(help="A sealed cache.", metavar="PATH")],
    destination: Annotated[str, typer.Argument(help=ADDRESSES, metavar="DEST")],
    revision: Annotated[
        str | None, typer.Option(help="A branch of the Hub's repository.", metavar="REV", show_default="main")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the Hub's repository a private one.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything back before the manifest is sent.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another cache at DEST.")] = False,
) -> None:
    """Send a cache to the Hugging Face Hub or an object store. Run it again to resume."""
    from geomcache.sharing.push import push as run

    report = run(path, destination, revision=revision, overwrite=overwrite, verify=verify, private=private)
    typer.echo("\n".join(report.lines()))


def pull(
    source: Annotated[str, typer.Argument(help=ADDRESSES, metavar="SRC")],
    path: Annotated[Path, typer.Argument(help="The cache to make, or to add to.", metavar="PATH")],
    episodes: Annotated[str | None, typer.Option(help="Such as 0:100 or 0,3,5:8.", show_default="all")] = None,
    revision: Annotated[
        str | None, typer.Option(help="The Hub's branch, tag or commit.", metavar="REV", show_default="main")
    ] = None,
) -> None:
    """Download a cache, or some episodes of it, and compare every file with its hash. Run it again to resume."""
    from geomcache.sharing.pull import pull as run

    typer.echo("\n".join(run(source, path, revision=revision, episodes=episodes).lines()))


def models(as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for scripts.")] = False) -> None:
    """List the published DA3 models: size, licence, rays, bytes per frame, and which are on this machine."""
    import json

    from geomcache.cli.models import describe_models, table_lines

    facts = describe_models()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(table_lines(facts)))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=PUSH, rich_help_panel=CACHES)(push)
    app.command(epilog=PULL, rich_help_panel=CACHES)(pull)
    app.command(epilog=TABLE, rich_help_panel=MODELS)(models)
