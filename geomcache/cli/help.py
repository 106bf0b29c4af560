"""The longer texts below `--help` of each command, in rich's markup, and the panels that group the commands."""

from textwrap import dedent

STAGES = "The two stages, and inference"
CACHES = "Caches"
MODELS = "Models"


def epilog(text: str) -> str:
    """Lines of a paragraph flow together, an empty line ends it; an indented line, a command, stays as it is."""
    paragraphs = []
    for paragraph in dedent(text).strip().split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and not line.startswith(" ") and not lines[-1].startswith(" "):
                lines[-1] += " " + line
            else:
                lines.append(line)
        paragraphs.append("\n".join(lines))
    return "\n" + "\n\n".join(paragraphs)  # without the first, typer takes the indentation of a command off


EXTRACT = epilog("""
    [bold]Example[/bold]
      geomcache extract --model DA3-LARGE --dataset HuggingFaceVLA/libero \\
        --output libero.zarr

    [bold]Several GPUs[/bold]
      accelerate launch -m geomcache extract --model DA3-LARGE --dataset ...

    [bold]The run that made libero.zarr, once more[/bold]: its options are kept beside it
      geomcache extract --config libero.run.yaml --output again.zarr
""")

INFO = epilog("""
    [bold]Example[/bold]
      geomcache info libero.zarr

    [bold]In scripts[/bold]
      geomcache info libero.zarr --json | jq .fingerprint
""")

PROBE = epilog("""
    [bold]Example[/bold]
      geomcache probe --model DA3-SMALL --image front.png --image wrist.png
""")

TRAIN = epilog("""
    [bold]All other options are lerobot-train's[/bold] and go to it as they are: `lerobot-train --help`; those of the
    policy:
      lerobot-train --discover_packages_path=geomcache.policy \\
        --policy.type=pi05_geometry --help

    Two defaults differ: --policy.type=pi05_geometry, and nothing is uploaded unless --policy.repo_id or
    --policy.push_to_hub is given. Each logged step has the adapter's alpha, the norm of its gradient, and the norms of
    geometry and image tokens.

    [bold]Example[/bold]
      geomcache train --cache libero.zarr \\
        --dataset.repo_id=HuggingFaceVLA/libero \\
        --policy.pretrained_path=lerobot/pi05_libero_base \\
        --policy.dtype=bfloat16 --policy.gradient_checkpointing=true \\
        --steps=2000 --batch_size=8 --output_dir=outputs/pi05_geometry

    [bold]Resume[/bold]
      LAST=outputs/pi05_geometry/checkpoints/last/pretrained_model
      geomcache train --cache libero.zarr --resume=true \\
        --config_path=$LAST/train_config.json

    [bold]Several GPUs[/bold]
      accelerate launch --num_processes=4 -m geomcache train --cache ...
""")

EVAL = epilog("""
    [bold]All other options are lerobot-eval's[/bold] and go to it as they are: `lerobot-eval --help`. Two defaults
    differ: --env.type=libero, and its pictures have the size of those that the policy's cache was made of. DA3 is
    found under the name that the cache was made with; --policy.geom_model_id names another place.

    [bold]LIBERO[/bold]: assets are in the folder that LIBERO_ASSETS names, else LIBERO's own download; rendering is
    EGL where there is a GPU, OSMesa elsewhere, or as MUJOCO_GL says.

    [bold]Example[/bold]
      geomcache eval --env.task=libero_10 --env.task_ids=\\[0,1] \\
        --eval.n_episodes=10 --eval.batch_size=1 \\
        --policy outputs/pi05_geometry/checkpoints/last/pretrained_model
""")

VERIFY = epilog("""
    Every shard, frame and row against the hashes in manifest and journal: exit code 0 where all is as it was written,
    1 with a list where something is not. Nobody should write the cache meanwhile.

    [bold]Example[/bold]
      geomcache verify libero.zarr

    [bold]Repair[/bold]: then the extract command that it prints makes what was dropped again, and seals
      geomcache verify libero.zarr --repair

    [bold]Parity[/bold]
      geomcache verify libero.zarr --parity 32
""")
