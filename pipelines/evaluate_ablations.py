"""Compare a checkpoint's success with its geometry, without it, and with its views swapped: does it use geometry?

    python pipelines/evaluate_ablations.py --policy DIR --output DIR [--seeds 1000,1001] [options of geomcache eval]

All three use the same weights. Each seed is one evaluation: it draws the noise that actions are denoised from.
The exit code is 1 if the policy fails more often than it succeeds with its geometry.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from geomcache.evaluation.run import SuccessRate, evaluate
from geomcache.geometry import Geometry


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the evaluations")
    parser.add_argument("--seeds", default="1000,1001,1002", help="%(default)s")
    arguments, lerobot_args = parser.parse_known_args()

    def rate(name: str, folder: str, *more: str) -> SuccessRate:
        successes = episodes = 0
        for seed in arguments.seeds.split(","):
            output = arguments.output / folder / seed
            args = [*lerobot_args, *more, f"--seed={seed}", f"--output_dir={output}"]
            evaluation = evaluate(arguments.policy, args)
            print("\n".join((f"-- {name}, seed {seed}", *evaluation.lines())), flush=True)
            successes += evaluation.suites[-1].successes
            episodes += evaluation.suites[-1].episodes
        return SuccessRate(name=name, successes=successes, episodes=episodes)

    logger = logging.getLogger("geomcache")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    rates = [
        rate("with geometry", "geometry"),
        rate("use_geom_prefix=false", "off", "--policy.use_geom_prefix=false"),
    ]
    with swapped_views():
        rates.append(rate("views swapped", "swapped"))
    print("-- success of the same weights")
    for rate_of_all_seeds in rates:
        print(rate_of_all_seeds.line(22))
    if 2 * rates[0].successes <= rates[0].episodes:
        sys.exit(
            "the policy does not solve the task it was trained on: compare what it sees in training and in evaluation"
        )


@contextmanager
def swapped_views() -> Iterator[None]:
    """Give policies each view's geometry in the place of the other's; the pictures stay."""
    from geomcache.policy.modeling_pi05_geometry import PI05GeometryPolicy

    geometry_of: Callable[..., Geometry] = PI05GeometryPolicy.geometry_of

    def swapped(self: PI05GeometryPolicy, batch: Any) -> Geometry:
        return Geometry(**{name: values.flip(1) for name, values in geometry_of(self, batch).items()})  # [B, V, ...]

    with mock.patch.object(PI05GeometryPolicy, "geometry_of", swapped):
        yield


if __name__ == "__main__":
    main()
