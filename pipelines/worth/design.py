"""What is compared, and on what: arms, cameras, demonstrations.

    python pipelines/worth/design.py parts --demonstrations DIR   a line for each recording: name, episode, cameras
    python pipelines/worth/design.py variants --tasks 0:4         numbers of the variants of the closed loop
    python pipelines/worth/design.py arms                         names of the arms that see both cameras

Cameras and variants are LIBERO-Plus's, at equal distances in its own order; cameras of every kind of move are as many.
None that is measured on was trained on.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomcache.ranges import parse_episodes, rows_of
from geomcache.simulator import libero, plus
from geomcache.simulator.camera import UNMOVED, CameraMove
from geomcache.simulator.record import read_demonstrations

SUITE, TASKS = "libero_object", 10  # "pick up ... and place it in the basket"
TRAINED_CAMERAS = UNSEEN_CAMERAS = 12
SEEN_CAMERAS = 4  # of the trained ones, that held-out demonstrations are also measured under
HELD_OUT_EVERY = 3


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to train."""

    text: str
    """What it is, in the tables."""
    source: str = ""
    """Whose geometry: ``oracle`` or ``da3``; empty for none."""
    outputs: tuple[str, ...] = ("ray",)
    mode: str = "prefix"
    of_another_frame: bool = False
    """Each frame gets the geometry of one that is drawn at random."""
    sees: bool = True
    """False: all pictures are black."""
    has_hand: bool = True
    """False: no picture from the hand, whose geometry stays. Then the moved camera alone shows the object."""

    @property
    def baseline(self) -> str:
        """Name of the arm without geometry that sees what this one sees."""
        return "none" if self.has_hand else "none_no_hand"

    @property
    def control(self) -> str:
        """Name of the arm that gets as many numbers which tell nothing; empty if this one has no true geometry."""
        if self.source != "oracle" or self.of_another_frame:
            return ""
        if not self.has_hand:
            return "other_rays_no_hand"
        return "random_da3" if self.mode == "prefix" else "random_da3_align"


ARMS = {
    "none": Arm(text="no geometry"),
    "rays": Arm(text="true rays", source="oracle"),
    "rays_depth": Arm(text="true rays and depth", source="oracle", outputs=("ray", "depth")),
    "other_rays": Arm(text="true rays of another frame", source="oracle", of_another_frame=True),
    "random_da3": Arm(text="rays of DA3 with random weights", source="da3"),
    "rays_align": Arm(text="true rays, aligned", source="oracle", mode="align"),
    "rays_depth_align": Arm(
        text="true rays and depth, aligned", source="oracle", outputs=("ray", "depth"), mode="align"
    ),
    "other_rays_align": Arm(
        text="true rays of another frame, aligned", source="oracle", mode="align", of_another_frame=True
    ),
    "random_da3_align": Arm(text="rays of DA3 with random weights, aligned", source="da3", mode="align"),
    "blind": Arm(text="no geometry, black pictures", sees=False),
    "none_no_hand": Arm(text="no picture from the hand, no geometry", has_hand=False),
    "rays_no_hand": Arm(text="no picture from the hand, true rays", source="oracle", has_hand=False),
    "rays_depth_no_hand": Arm(
        text="no picture from the hand, true rays and depth", source="oracle", outputs=("ray", "depth"), has_hand=False
    ),
    "other_rays_no_hand": Arm(
        text="no picture from the hand, true rays of another frame",
        source="oracle",
        of_another_frame=True,
        has_hand=False,
    ),
}


def camera_moves() -> dict[str, list[str]]:
    """Return the names of all cameras of the suite's camera axis by the kind of their move, in LIBERO-Plus's order."""
    moves: dict[str, list[str]] = {}
    for variant in (plus.VariantName.parse(name) for name in plus.variant_names(SUITE)):
        if variant.axis == "camera":
            moves.setdefault(kind(variant.camera), []).append(str(variant.camera))
    return {each: list(dict.fromkeys(names)) for each, names in moves.items()}


def kind(move: CameraMove) -> str:
    """Return what a move changes: ``azimuth``, ``azimuth, elevation``, ``distance`` or ``direction``."""
    changed = {
        "azimuth": move.azimuth,
        "elevation": move.elevation,
        "distance": move.scale != UNMOVED.scale,
        "direction": move.turn_z or move.turn_y,
    }
    return ", ".join(name for name, is_changed in changed.items() if is_changed)


def cameras() -> tuple[list[str], list[str]]:
    """Return the cameras to train on, and those to measure on: of every kind of move as many, at equal distances.

    The first run took them from the whole list instead: it trained on no camera that looks in another direction, and
    measured on two.
    """
    trained, unseen = list[str](), list[str]()
    moves = camera_moves()
    count = (TRAINED_CAMERAS + UNSEEN_CAMERAS) // len(moves)
    for names in moves.values():
        chosen = [names[(2 * number + 1) * len(names) // (2 * count)] for number in range(count)]
        trained += chosen[::2]
        unseen += chosen[1::2]
    return trained, unseen


def closed_loop_variants(count: int, tasks: Sequence[int]) -> list[int]:
    """Return the numbers of so many variants of these tasks, whose cameras were not trained on, in order."""
    trained = {*cameras()[0]}
    names = {libero.task_files(SUITE, task).name for task in tasks}
    variants = [plus.VariantName.parse(name) for name in plus.variant_names(SUITE)]
    numbers = [
        number
        for number, variant in enumerate(variants)
        if variant.axis == "camera" and variant.base_task in names and str(variant.camera) not in trained
    ]
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One demonstration, seen by several cameras."""

    name: str
    episode: int
    cameras: tuple[str, ...]


def is_held_out(initial_state: int) -> bool:
    """Return whether demonstrations from this initial state are measured on, not trained on: 2, 5, and so on.

    The closed loop begins in state 0, which was demonstrated: what is new there is the camera.
    """
    return initial_state % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def parts(demonstrations: Path, every: int) -> Iterator[Part]:
    """Yield what is to be recorded; with `every` over 1, each demonstration under one of so many cameras.

    Demonstrations to train on take turns, so that together they are seen by all; what is measured on has the same.
    """
    trained, unseen = cameras()
    again = trained[::every]
    again, unseen = again[:: -(-len(again) // SEEN_CAMERAS)], unseen[::every]
    turns = itertools.cycle(range(every))
    for number, demonstration in enumerate(
        read_demonstrations("geomcache/demonstrations", demonstrations, SUITE, None)
    ):
        held_out = is_held_out(demonstration.initial_state)
        yield Part(
            name=f"{'test' if held_out else 'train'}_{number:02d}",
            episode=number,
            cameras=tuple([*unseen, *again] if held_out else trained[next(turns) :: every]),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("parts", "variants", "arms"))
    parser.add_argument("--demonstrations", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take one of so many cameras (%(default)s)")
    parser.add_argument("--variants", type=int, default=36, help="how many (%(default)s)")
    parser.add_argument("--tasks", default="0:10", help="of the variants, such as 0:4,7 (%(default)s)")
    options = parser.parse_args(arguments)
    libero.write_config(libero.find_package())
    if options.what == "arms":
        print(*(name for name, arm in ARMS.items() if arm.has_hand), sep="\n")
    elif options.what == "variants":
        tasks = rows_of(parse_episodes(options.tasks, TASKS)).tolist()
        print(f"[{','.join(map(str, closed_loop_variants(options.variants, tasks)))}]")
    else:
        for part in parts(options.demonstrations, options.every):
            print(part.name, part.episode, ",".join(part.cameras))


if __name__ == "__main__":
    main()
