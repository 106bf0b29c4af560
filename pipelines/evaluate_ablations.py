"""Compare a checkpoint's success with its geometry, without it, and with its views swapped: does it use geometry?

    python pipelines/evaluate_ablations.py --policy DIR --output DIR [--seeds 1000,1001] [options of geomcache eval]

All three use the same weights. Each seed is one evaluation: it draws the noise that actions are denoised from. The exit
code is 1 if the policy fails in half of the episodes or more with its geometry.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from geomcache.evaluation.run import Evaluation, SuccessRate, evaluate
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
            found = evaluate(
                arguments.policy, [*lerobot_args, *more, f"--seed={seed}", f"--output_dir={output}"], say=say
            )
            show(f"{name}, seed {seed}", found)
            successes += found.suites[-1].successes
            episodes += found.suites[-1].episodes
        return SuccessRate(name=name, successes=successes, episodes=episodes)

    def say(line: str) -> None:
        print(line, flush=True)

    def show(title: str, found: Evaluation) -> None:
        say("\n".join((f"-- {title}", *found.lines())))

    rates = [
        rate("with geometry", "geometry"),
        rate("use_geom_prefix=false", "off", "--policy.use_geom_prefix=false"),
    ]
    with swapped_views():
        rates.append(rate("views swapped", "swapped"))
    say("-- success of the same weights")
    for found in rates:
        say(found.line(22))
    if 2 * rates[0].successes <= rates[0].episodes:
        sys.exit(
            "the policy does not solve the task that it was trained on: look for a difference between training and here"
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
