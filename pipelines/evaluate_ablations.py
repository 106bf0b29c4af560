"""Compare a checkpoint's success with its geometry, without it, and with its views swapped: does it use geometry?

    python pipelines/evaluate_ablations.py --policy DIR --output DIR [--episodes 10] [--ablated 2] [--at-least 7]
        [options of geomcache eval]

All three use the same weights, and begin in the same initial states with the same noise. The exit code is 1 if fewer
than `--at-least` episodes succeed with geometry. Run the same command again to resume.
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
    parser.add_argument("--episodes", type=int, default=10, help="with geometry; %(default)s")
    parser.add_argument("--ablated", type=int, default=10, help="without, and with swapped views; %(default)s")
    parser.add_argument("--at-least", type=int, default=0, help="that must succeed with geometry; %(default)s")
    arguments, lerobot_args = parser.parse_known_args()

    def rate(name: str, folder: str, episodes: int, *more: str) -> SuccessRate:
        args = [*lerobot_args, *more, f"--eval.n_episodes={episodes}", f"--output_dir={arguments.output / folder}"]
        evaluation = evaluate(arguments.policy, args)
        print("\n".join((f"-- {name}", *evaluation.lines())), flush=True)
        whole = evaluation.suites[-1]
        return SuccessRate(name=name, successes=whole.successes, episodes=whole.episodes)

    logger = logging.getLogger("geomcache")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    rates = [rate("with geometry", "geometry", arguments.episodes)]
    if arguments.ablated:
        rates.append(rate("use_geom_prefix=false", "off", arguments.ablated, "--policy.use_geom_prefix=false"))
        with swapped_views():
            rates.append(rate("views swapped", "swapped", arguments.ablated))
    print("-- success of the same weights")
    for each in rates:
        print(each.line(22))
    if rates[0].successes < arguments.at_least:
        sys.exit(
            f"evaluate_ablations.py: expected at least {arguments.at_least} of {rates[0].episodes} episodes solved with"
            f" geometry, found {rates[0].successes}: compare what the policy sees in training and in evaluation"
        )


@contextmanager
def swapped_views() -> Iterator[None]:
    """Give policies each view's geometry in the place of the other's; the pictures stay."""
    from geomcache.policy.geometry_policy import GeometryPolicy

    geometry_of: Callable[..., Geometry] = GeometryPolicy.geometry_of

    def swapped(self: GeometryPolicy, batch: Any) -> Geometry:
        return Geometry(**{name: values.flip(1) for name, values in geometry_of(self, batch).items()})  # [B, V, ...]

    with mock.patch.object(GeometryPolicy, "geometry_of", swapped):
        yield


if __name__ == "__main__":
    main()
