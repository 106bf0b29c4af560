"""List what the simulator opens for the tasks of libero_object: packages, and files of assets, in site-packages.

    python pipelines/worth/list_files.py [--tasks 0:10]

`gpu_pack.sh` packs these: whole assets would be ten times too large for a machine that takes 64 MiB.
"""

import argparse
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

SITE = Path(sysconfig.get_path("purelib"))
OPENED: set[str] = set()


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """Remember each file that Python opens; MuJoCo's own are in the model's text."""
    if event == "open" and isinstance(arguments[0], str):
        OPENED.add(arguments[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", default="0:10", help="numbers (%(default)s)")
    arguments = parser.parse_args()
    sys.addaudithook(note_opened)

    import lerobot.scripts.lerobot_eval  # noqa: F401  # what the stages import, besides the simulator
    import matplotlib.pyplot as plt  # noqa: F401
    import scipy.stats  # noqa: F401

    import geomcache.cli.main
    import geomcache.evaluation.rollouts
    import geomcache.simulator.record
    import geomcache.training.trainer  # noqa: F401
    from geomcache.ranges import parse_episodes, rows_of
    from geomcache.simulator.environments import LiberoGeometry, make_environment

    config = LiberoGeometry(task="libero_object", observation_height=32, observation_width=32)
    config.prepare()
    for task in rows_of(parse_episodes(arguments.tasks, 10)):
        environment: Any = make_environment(config, "libero_object", int(task), 0, 1)
        environment.reset(seed=0)
        OPENED.update(re.findall(r'file="([^"]+)"', environment._env.env.model.get_xml()))
        environment.close()
    files = {Path(file).resolve() for file in OPENED}
    elsewhere = sorted(file for file in files if "assets" in file.parts and not file.is_relative_to(SITE))
    if elsewhere:
        sys.exit(
            f"list_files.py: expected all assets in {SITE}, where they are packed from, found {elsewhere[0]}: unset"
            " LIBERO_ASSETS, and delete the link libero/libero/assets there"
        )
    assets = {file.relative_to(SITE) for file in files if file.is_relative_to(SITE) and file.is_file()}
    for file in sorted(assets):
        if "assets" in file.parts:
            print("asset", file)
    modules = [Path(origin) for module in list(sys.modules.values()) if (origin := getattr(module, "__file__", None))]
    for package in sorted({file.relative_to(SITE).parts[0] for file in modules if file.is_relative_to(SITE)}):
        print("package", package)


if __name__ == "__main__":
    main()
