"""The commands ``geomcache probe-policy`` and ``export-plain``. Heavy imports stay inside them, as in `main`."""

from pathlib import Path
from typing import Annotated

import typer

from geomcache.cli.help import POLICIES, epilog

PROBE = epilog("""
    Each layer has a number between "all that changes over time can be read off" (1) and "nothing but the mean of each
    place" (0), for ray directions, ray origins and, where cached, depth. Episodes that the probe is measured on are not
    those that it is fitted to.

    [bold]Example[/bold]
      geomcache probe-policy --cache libero.zarr \\
        outputs/pi05_geometry/checkpoints/last/pretrained_model

    [bold]Before training[/bold], to compare with
      geomcache probe-policy lerobot/pi05_libero_base --cache libero.zarr
""")

EXPORT = epilog("""
    The network is equal to the bit. What the alignment loss added is left out.

    [bold]Example[/bold]
      geomcache export-plain \\
        outputs/pi05_geometry/checkpoints/last/pretrained_model pi05_aligned
      lerobot-eval --policy.path=pi05_aligned --env.type=libero
""")


def probe_policy(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of Pi0.5 or Pi0: a folder or a Hub id.")],
    cache: Annotated[Path, typer.Option(help="A cache of the dataset.", metavar="PATH")],
    dataset: Annotated[str | None, typer.Option(help="The dataset's name.", show_default="as in the cache")] = None,
    root: Annotated[Path | None, typer.Option(help="The folder of a local dataset.", metavar="DIR")] = None,
    revision: Annotated[str | None, typer.Option(help="The dataset's branch, tag or commit.", metavar="REV")] = None,
    frames: Annotated[int, typer.Option(help="Frames to take; a quarter, of other episodes, is for measuring.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Frames that go through the policy at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu.", show_default="the checkpoint's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of episodes and frames.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Measure in which layers a policy's image tokens know where the cameras are: a linear probe to cached geometry."""
    import json
    import logging

    from geomcache.training.probe_policy import probe_policy as run

    if as_json:
        logging.getLogger("geomcache").setLevel(logging.WARNING)  # standard output is the object alone
    probe = run(
        checkpoint,
        cache,
        dataset=dataset,
        root=root,
        revision=revision,
        frames=frames,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    typer.echo(json.dumps(probe.to_dict(), indent=2) if as_json else "\n".join(probe.lines()))


def export_plain(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint of geom_mode=align: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT")],
) -> None:
    """Write a checkpoint that acts without geometry as a plain folder, which stock LeRobot loads."""
    from geomcache.policy.export import export_plain as run

    typer.echo("\n".join(run(checkpoint, output)))


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(name="probe-policy", epilog=PROBE, rich_help_panel=POLICIES)(probe_policy)
    app.command(name="export-plain", epilog=EXPORT, rich_help_panel=POLICIES)(export_plain)
