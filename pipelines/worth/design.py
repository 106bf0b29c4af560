"""What is compared, and on what: arms, cameras, demonstrations.

    python pipelines/worth/design.py parts --demonstrations DIR   a line for each recording: name, episode, cameras
    python pipelines/worth/design.py variants                     numbers of the variants of the closed loop
    python pipelines/worth/design.py arms                         names of the arms

Cameras and variants are LIBERO-Plus's, at equal distances in its own order. None that is measured on was trained on.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from geomcache.simulator import libero, plus
from geomcache.simulator.record import read_demonstrations

SUITE = "libero_object"
TRAINED_CAMERAS = UNSEEN_CAMERAS = 12
SEEN_CAMERAS = 4  # of the trained ones, that held-out demonstrations are also measured under
HELD_OUT_STATE = 0  # initial state of the held-out demonstrations, and of the closed loop


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
}
CLOSED_LOOP = ("none", "rays", "rays_depth")


def camera_moves() -> list[str]:
    """Return the numbers of all cameras of the suite's camera axis, in LIBERO-Plus's order."""
    variants = (plus.VariantName.parse(name) for name in plus.variant_names(SUITE))
    return list(dict.fromkeys(str(variant.camera) for variant in variants if variant.axis == "camera"))


def cameras() -> tuple[list[str], list[str]]:
    """Return the cameras to train on, and those to measure on."""
    moves, count = camera_moves(), TRAINED_CAMERAS + UNSEEN_CAMERAS
    chosen = [moves[(2 * number + 1) * len(moves) // (2 * count)] for number in range(count)]
    return chosen[::2], chosen[1::2]


def closed_loop_variants(count: int) -> list[int]:
    """Return the numbers of so many variants of the camera axis whose cameras were not trained on, in order."""
    trained = {*cameras()[0]}
    variants = [plus.VariantName.parse(name) for name in plus.variant_names(SUITE)]
    numbers = [
        number
        for number, variant in enumerate(variants)
        if variant.axis == "camera" and str(variant.camera) not in trained
    ]
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One demonstration, seen by several cameras."""

    name: str
    episode: int
    cameras: tuple[str, ...]

    @property
    def is_held_out(self) -> bool:
        return self.name.startswith("test")


def parts(demonstrations: Path, every: int) -> Iterator[Part]:
    """Yield what is to be recorded; with `every` over 1, of each list of cameras only one of so many."""
    trained, unseen = (each[::every] for each in cameras())
    for number, demonstration in enumerate(
        read_demonstrations("geomcache/demonstrations", demonstrations, SUITE, None)
    ):
        held_out = demonstration.initial_state == HELD_OUT_STATE
        yield Part(
            name=f"{'test' if held_out else 'train'}_{number:02d}",
            episode=number,
            cameras=tuple([*unseen, *trained[:SEEN_CAMERAS]] if held_out else trained),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("parts", "variants", "arms"))
    parser.add_argument("--demonstrations", type=Path)
    parser.add_argument("--every", type=int, default=1, help="take one of so many cameras (%(default)s)")
    parser.add_argument("--variants", type=int, default=36, help="how many (%(default)s)")
    options = parser.parse_args(arguments)
    libero.write_config(libero.find_package())
    if options.what == "arms":
        print(*ARMS, sep="\n")
    elif options.what == "variants":
        print(f"[{','.join(map(str, closed_loop_variants(options.variants)))}]")
    else:
        for part in parts(options.demonstrations, options.every):
            print(part.name, part.episode, ",".join(part.cameras))


if __name__ == "__main__":
    main()
