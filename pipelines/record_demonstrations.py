"""Record demonstrations again in LIBERO, under cameras of your choice, with a cache of their true geometry.

    python pipelines/record_demonstrations.py --demonstrations DIR --output DIR --cache PATH.zarr \
        [--suite libero_object] [--episodes 0,3] [--cameras ,45_0_100_0_0,0_15_150_0_0] [--size 256] \
        [--outputs ray,depth] [--grid 14x14] [--images]

A camera is azimuth_elevation_scale_turnz_turny, in degrees and percent, as LIBERO-Plus names its variants; an empty one
leaves it where LIBERO has it. Each demonstration is replayed under each camera, from the initial state that it began
in: the one of the column `initial_state`; without it the first one of a task from state 0, the second one from state 1,
and so on. One that does not move and succeed as recorded ends the run.
"""

import argparse
import logging
import sys
from pathlib import Path

from geomcache.errors import GeomcacheError
from geomcache.simulator import libero
from geomcache.simulator.environments import LiberoGeometry
from geomcache.simulator.record import read_demonstrations, record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demonstrations", type=Path, required=True, help="folder of a LeRobotDataset")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new LeRobotDataset")
    parser.add_argument("--cache", type=Path, required=True, help="path of the new cache")
    parser.add_argument("--suite", default="libero_object", help="%(default)s")
    parser.add_argument("--episodes", help="numbers, separated by commas; all")
    parser.add_argument("--cameras", default="", help="separated by commas; LIBERO's own")
    parser.add_argument("--size", type=int, default=256, help="of the pictures, in pixels; %(default)s")
    parser.add_argument("--outputs", default="ray,depth", help="%(default)s")
    parser.add_argument("--grid", default="14x14", help="%(default)s")
    parser.add_argument("--images", action="store_true", help="keep pictures as they are; video")
    arguments = parser.parse_args()
    logger = logging.getLogger("geomcache")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    config = LiberoGeometry(
        task=arguments.suite,
        observation_height=arguments.size,
        observation_width=arguments.size,
        oracle_outputs=arguments.outputs,
        oracle_grid=arguments.grid,
    )
    episodes = None if arguments.episodes is None else [int(number) for number in arguments.episodes.split(",")]
    try:
        libero.write_config(libero.find_package())
        demonstrations = read_demonstrations(
            "geomcache/demonstrations", arguments.demonstrations, arguments.suite, episodes
        )
        cameras, as_images = arguments.cameras.split(","), arguments.images
        record(demonstrations, cameras, config, arguments.output, arguments.cache, as_images=as_images)
    except GeomcacheError as error:
        sys.exit(f"record_demonstrations.py: {error}")


if __name__ == "__main__":
    main()
