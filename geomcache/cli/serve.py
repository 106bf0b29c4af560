"""The command ``geomcache serve``. Heavy imports stay inside it, as in `main`."""

import typer

from geomcache.cli.help import STAGES, epilog
from geomcache.cli.options import with_options
from geomcache.serving.options import ServeOptions

SERVE = epilog("""
    The protocol is LeRobot's: robots connect with its own client, unchanged. Pictures must have the names and sizes
    that the policy was trained with; a robot that has others is refused when it connects. DA3 runs once a chunk. Each
    chunk's line tells the milliseconds of its parts.

    [bold]Options of the policy[/bold] are passed to it: --policy.geom_engine=compiled, --policy.geom_model_id=DIR,
    --policy.device=cuda:1, --policy.num_inference_steps=5.

    [bold]On the machine with the GPU[/bold]
      geomcache serve --policy CHECKPOINT --policy.geom_engine=compiled

    [bold]On the robot[/bold]: a tunnel to that machine, and LeRobot's client
      ssh -N -L 8080:127.0.0.1:8080 gpu-machine &
      python -m lerobot.async_inference.robot_client \\
        --server_address=127.0.0.1:8080 --policy_type=pi05_geometry \\
        --pretrained_name_or_path=CHECKPOINT \\
        --actions_per_chunk=50 --robot.type=so101_follower ...
""")


def serve(options: ServeOptions) -> None:
    """Serve a policy to a robot over LeRobot's asynchronous protocol, with DA3 online, without unsafe pickles."""
    from geomcache.serving.server import serve as run

    run(options)


def register(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"ignore_unknown_options": True}
    app.command(name="serve", epilog=SERVE, rich_help_panel=STAGES, context_settings=settings)(
        with_options(serve, ServeOptions)
    )
