"""Ask whether a task makes a policy look: how far its object stands from one initial state to another.

    python pipelines/worth/placements.py [--suites libero_spatial,libero_object,libero_goal,libero_10] [--processes 2]

Where an object always stands at the same place, a policy can go there with its eyes shut, and success says nothing
about what it sees: the Panda's fingers open 8 cm. Prints, for each task, the first object that its goal names and that
can be moved, and the largest distance on the table between any two of its initial states.
"""

import argparse
import multiprocessing
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist

from geomcache.simulator import libero
from geomcache.simulator.environments import LiberoGeometry, make_environment


def farthest(suite: str, task: int) -> tuple[str, int, float] | None:
    """Return an object's name, the number of initial states, and the largest distance between two of them in metres.

    None for a task that names nothing but furniture.
    """
    config = LiberoGeometry(task=suite, observation_height=32, observation_width=32)
    config.prepare()
    environment: Any = make_environment(config, suite, task, 0, 1)
    try:
        environment.reset(seed=0)
        world = environment._env.env
        name = next((name for name in world.obj_of_interest if name in world.objects_dict), None)
        if name is None:
            return None
        places = []
        for state in environment._init_states:
            world.sim.set_state_from_flattened(state)
            world.sim.forward()
            places.append(world.sim.data.body_xpos[world.obj_body_id[name]][:2].copy())
        return name, len(places), float(pdist(np.stack(places)).max())
    finally:
        environment.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suites", default="libero_spatial,libero_object,libero_goal,libero_10", help="%(default)s")
    parser.add_argument("--processes", type=int, default=2, help="%(default)s")
    arguments = parser.parse_args()
    libero.write_config(libero.find_package())
    runs = [(suite, task) for suite in arguments.suites.split(",") for task in libero.task_numbers(suite, None)]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        found = pool.starmap(farthest, runs, chunksize=1)
    print("| suite | task | object | initial states | farthest apart, cm |\n| --- | --- | --- | --- | --- |")
    for (suite, task), row in zip(runs, found, strict=True):
        print(f"| {suite} | {task} | {f'{row[0]} | {row[1]} | {100 * row[2]:.1f}' if row else 'furniture alone | |'} |")


if __name__ == "__main__":
    main()
