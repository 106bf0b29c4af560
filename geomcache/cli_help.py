"""The longer texts below `--help` of each command, in rich's markup."""

from textwrap import dedent


def _paragraphs(text: str) -> str:
    """Lines of a paragraph flow together; an empty line ends it."""
    return "\n\n".join(" ".join(part.split()) for part in dedent(text).strip().split("\n\n"))


EXTRACT = _paragraphs("""
    [bold]Example[/bold]  geomcache extract --model DA3-LARGE --dataset HuggingFaceVLA/libero -o libero.zarr

    [bold]Several GPUs[/bold]  accelerate launch -m geomcache extract --model DA3-LARGE --dataset ...
""")

INFO = _paragraphs("[bold]Example[/bold]  geomcache info libero.zarr")

PROBE = _paragraphs("[bold]Example[/bold]  geomcache probe --model DA3-SMALL --image front.png --image wrist.png")

TRAIN = _paragraphs("""
    [bold]All other options are lerobot-train's[/bold] and go to it as they are: `lerobot-train --help`; those of the
    policy: `lerobot-train --discover_packages_path=geomcache.policy --policy.type=pi05_geometry --help`. Two defaults
    differ: --policy.type=pi05_geometry, and nothing is uploaded unless --policy.repo_id or --policy.push_to_hub is
    given. Each logged step has the adapter's alpha, the norm of its gradient, and the norms of geometry and image
    tokens.

    [bold]Example[/bold]  geomcache train --cache libero.zarr --dataset.repo_id=HuggingFaceVLA/libero
    --policy.pretrained_path=lerobot/pi05_libero_base --policy.dtype=bfloat16 --policy.gradient_checkpointing=true
    --steps=2000 --batch_size=8 --output_dir=outputs/pi05_geometry

    [bold]Resume[/bold]  geomcache train --cache libero.zarr --resume=true
    --config_path=outputs/pi05_geometry/checkpoints/last/pretrained_model/train_config.json

    [bold]Several GPUs[/bold]  accelerate launch --num_processes=4 -m geomcache train --cache ...
""")

EVAL = _paragraphs("""
    [bold]All other options are lerobot-eval's[/bold] and go to it as they are: `lerobot-eval --help`. Two defaults
    differ: --env.type=libero, and its pictures have the size of those that the policy's cache was made of. DA3 is
    found under the name that the cache was made with; --policy.geom_model_id names another place.

    [bold]LIBERO[/bold]  assets: the folder named in LIBERO_ASSETS, else LIBERO's own download; rendering: EGL where
    there is a GPU, OSMesa elsewhere, or as MUJOCO_GL says.

    [bold]Example[/bold]  geomcache eval --policy outputs/pi05_geometry/checkpoints/last/pretrained_model
    --env.task=libero_10 --env.task_ids=\\[0,1] --eval.n_episodes=10 --eval.batch_size=1
""")

VERIFY = _paragraphs("""
    Every shard, frame and row against the hashes in manifest and journal: exit code 0 where all is as it was written,
    1 with a list where something is not. Nobody should write the cache meanwhile.

    [bold]Example[/bold]  geomcache verify libero.zarr

    [bold]Repair[/bold]  geomcache verify libero.zarr --repair, then the extract command that it prints: it makes what
    was dropped again, and seals

    [bold]Parity[/bold]  geomcache verify libero.zarr --parity 32
""")
