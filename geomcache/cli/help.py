"""Longer texts for the end of each command's `--help`, in rich's markup, and the panels that group the commands."""

from textwrap import dedent

STAGES = "The two stages, and inference"
CACHES = "Caches"
MODELS = "Models"
POLICIES = "Policies"


def epilog(text: str) -> str:
    """Join the lines of each paragraph; an indented line, a command, stays as it is."""
    paragraphs = []
    for paragraph in dedent(text).strip().split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and not line.startswith(" ") and not lines[-1].startswith(" "):
                lines[-1] += " " + line
            else:
                lines.append(line)
        paragraphs.append("\n".join(lines))
    return "\n" + "\n\n".join(paragraphs)  # without the first newline, typer removes the indentation of a command


EXTRACT = epilog("""
    [bold]Example[/bold]: LIBERO into libero.zarr, and another dataset
      geomcache extract --model DA3-LARGE-1.1
      geomcache extract --model DA3-LARGE-1.1 --dataset OWNER/NAME

    [bold]Several GPUs[/bold]
      accelerate launch -m geomcache extract --model DA3-LARGE-1.1 --dataset ...

    [bold]A Ray cluster[/bold], from its head node
      geomcache extract --cluster ray --model DA3-LARGE-1.1 --dataset ...

    [bold]Into a bucket[/bold]: shards are sent as they are made; one driver at a time
      geomcache extract --model DA3-LARGE-1.1 --output s3://my-bucket/libero.zarr

    [bold]Repeat the run that made libero.zarr[/bold]: its options are kept next to it
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
    [bold]All other options are lerobot-train's[/bold] and are passed to it: see `lerobot-train --help`, and for the
    policy's options:
      lerobot-train --discover_packages_path=geomcache.policy \\
        --policy.type=pi05_geometry --help

    What is left open is chosen, and each choice is printed: the dataset that the cache was made of, a plain Pi0.5 to
    start from (lerobot/pi05_libero_base for LIBERO, lerobot/pi05_base otherwise), bfloat16 and gradient checkpointing
    on a GPU, and the folder outputs/pi05_geometry. A plain Pi0 or SmolVLA in --policy.path gets geometry too. Nothing
    is uploaded unless --policy.repo_id or --policy.push_to_hub is given. Each logged step has the adapter's alpha, the
    norm of its gradient, and the norms of geometry and image tokens.

    --policy.geom_mode=align trains without geometry tokens: a loss aligns image tokens with the cached geometry, and
    the policy acts without DA3. Each logged step has both losses, and how their gradients agree. The target is
    geometry, or with --policy.geom_align_target=feature what `extract --outputs ray,ray_conf,feature` has cached.

    [bold]Examples[/bold]
      geomcache train
      geomcache train --cache libero.zarr --steps=2000 --batch_size=8 \\
        --policy.path=lerobot/pi05_base --output_dir=outputs/other
      geomcache train --policy.geom_mode=align

    [bold]A cache in a bucket or on the Hub[/bold]: shards are fetched when they are needed
      geomcache train --cache s3://my-bucket/libero.zarr --cache-disk 50GB

    [bold]Resume[/bold]
      LAST=outputs/pi05_geometry/checkpoints/last/pretrained_model
      geomcache train --cache libero.zarr --resume=true \\
        --config_path=$LAST/train_config.json

    [bold]Several GPUs[/bold]
      accelerate launch --num_processes=4 -m geomcache train --cache ...
""")

EVAL = epilog("""
    [bold]All other options are lerobot-eval's[/bold] and are passed to it: see `lerobot-eval --help`. Two defaults
    differ: --env.type=libero, and the simulator's pictures have the size of those in the policy's cache. DA3 is loaded
    under the name that the cache was made with; --policy.geom_model_id names another folder or Hub id.

    [bold]LIBERO[/bold]: assets come from the folder that LIBERO_ASSETS names, LIBERO's own folders, or the extra
    libero-assets, otherwise from the Hub. Rendering uses EGL on a GPU and OSMesa without one, unless MUJOCO_GL is set.

    [bold]Variants[/bold]: --env.type=libero_plus_variants runs LIBERO-Plus (--env.axis=camera, robot, language, noise
    or layout_level; --env.of_tasks=REGEX; --env.sample=N), libero_pro the suites of LIBERO-PRO, libero_geometry LIBERO
    with a moved camera (--env.camera=45_15_130_5_0) or true geometry (--env.oracle_outputs=ray,depth).

    [bold]Results[/bold]: --results gets a row for each episode as it ends. Run the same command again to resume; start
    it several times to share the work. `geomcache compare` compares two files.

    [bold]Example[/bold]
      geomcache eval --env.task=libero_10 --env.task_ids=\\[0,1] \\
        --eval.n_episodes=10 --eval.batch_size=1 \\
        --policy outputs/pi05_geometry/checkpoints/last/pretrained_model
""")

COMPARE = epilog("""
    Episodes are paired by variant and seed: files with other episodes, or of an environment with other options, are
    refused. The interval comes from a bootstrap that draws tasks and episodes in them, p from McNemar's exact test.
    Groups are the axes and, where cameras are moved, the distance by which.

    [bold]Example[/bold]: the same episodes without and with geometry
      geomcache eval --policy CHECKPOINT --results without.csv \\
        --policy.use_geom_prefix=false
      geomcache eval --policy CHECKPOINT --results with.csv
      geomcache compare without.csv with.csv --output comparison
""")

VERIFY = epilog("""
    Every shard, frame and row is compared with the hashes in manifest and journal. Exit code 0 if all is as it was
    written, 1 with a list if not. Do not write to the cache meanwhile. With --dataset or --root, episodes and a sample
    of the pictures are compared with those that the cache was made of; exit code 2 if they are others.

    [bold]Example[/bold]
      geomcache verify libero.zarr

    [bold]Repair[/bold]: then run the extract command that it prints, which makes the dropped shards again
      geomcache verify libero.zarr --repair

    [bold]Is it of this dataset?[/bold]
      geomcache verify libero.zarr --root datasets/libero

    [bold]Parity[/bold]
      geomcache verify libero.zarr --parity 32
""")
