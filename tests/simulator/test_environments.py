"""LIBERO varied, in the simulator: cameras where their names say, true geometry where the picture shows it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from geomcache.errors import UserInputError
from geomcache.simulator import plus, pro
from geomcache.simulator.camera import CameraMove, Pose
from geomcache.simulator.environments import LiberoGeometry, LiberoPlusVariants, LiberoPro, make_environment
from geomcache.simulator.oracle import in_first_view, metres, views_of
from geomcache.simulator.simulation import FIRST_CAMERA, maps_of
from tests.support.simulator import libero_config, needs_plus, needs_simulator, simulator

__all__ = ["libero_config", "simulator"]

SIZE = 64
GRID = 16  # cells a side: 4 pixels each
VIEWS = (FIRST_CAMERA, "robot0_eye_in_hand")
MOVE = "20_15_130_5_0"


def small(kind: type[LiberoGeometry], **options: Any) -> LiberoGeometry:
    return kind(observation_height=SIZE, observation_width=SIZE, **options)


@pytest.fixture(scope="module")
def moved(simulator: None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A task with a moved camera and true geometry, and its first observation."""
    config = small(
        LiberoGeometry,
        task="libero_object",
        task_ids=[0],
        camera=MOVE,
        oracle_outputs="ray,depth",
        oracle_grid=f"{GRID}x{GRID}",
    )
    environment = make_environment(config, "libero_object", 0, 0, 1)
    yield environment, environment.reset(seed=0)[0]
    environment.close()


# ---- options, without a simulator ----


@needs_plus
def test_names_of_variants_say_what_differs(libero_config: Any) -> None:
    counted = dict.fromkeys((*plus.AXES, *plus.WITHOUT_FILES), 0)
    for suite in plus.SUITES:
        for name in plus.variant_names(suite):
            counted[plus.VariantName.parse(name).axis] += 1
    # ../shared/libero_plus counted them with another parser
    assert {axis: counted[axis] for axis in plus.AXES} == {
        "camera": 1599,
        "robot": 1550,
        "language": 1537,
        "noise": 1601,
        "layout_level": 696,
    }
    assert sum(counted[axis] for axis in plus.WITHOUT_FILES) == 3047
    with pytest.raises(UserInputError, match="no_variant"):
        plus.VariantName.parse("no_variant")


@needs_plus
def test_a_choice_of_variants(libero_config: Any) -> None:
    names = plus.variant_names("libero_object")
    every = plus.select("libero_object", "camera", "", None, None)
    assert len(every) == 396
    some = plus.select("libero_object", "camera", "", None, 10)
    assert len(some) == 10
    assert set(some) < set(every)
    assert len({plus.VariantName.parse(names[number]).base_task for number in some}) > 5  # spread over the tasks
    part = f"_view_{plus.VariantName.parse(names[every[7]]).camera}_"
    named = plus.select("libero_object", "camera", part, None, None)
    assert every[7] in named
    assert all(part in names[number] for number in named)
    assert plus.select("libero_object", "camera", "", every[3:5], None) == every[3:5]


@needs_plus
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"axis": "light"}, r"'light': the \d+ variants of libero_object"),
        ({"axis": "background"}, "'background': the .* no package"),
        ({"axis": "layout_add"}, "'layout_add'"),
        ({"axis": "kamera"}, "camera"),
        ({"task": "libero_90"}, "libero_90"),
        ({"of_tasks": "("}, r"regular expression, got '\('"),
        ({"of_tasks": "nothing_like_it"}, "nothing_like_it"),
        ({"task_ids": [99999]}, "99999"),
        ({"sample": 0}, "at least 1, got 0"),
        ({"camera": MOVE}, MOVE),
    ],
)
def test_choices_that_cannot_be_run_are_named(libero_config: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserInputError, match=named):
        small(LiberoPlusVariants, **options).tasks()


@needs_plus
def test_a_number_of_another_axis_is_named(libero_config: Any) -> None:
    number = plus.select("libero_object", "robot", "", None, None)[0]
    with pytest.raises(UserInputError, match=rf"{number}, which is .* --env\.axis=robot"):
        small(LiberoPlusVariants, task_ids=[number]).tasks()


@needs_plus
def test_suites_of_libero_pro(libero_config: Any) -> None:
    counted = {suite: len(pro.task_names(suite)) for suite in pro.SUITES if suite != "libero_spatial_swap"}
    assert sum(counted.values()) == 150
    with pytest.raises(UserInputError, match=r"libero_spatial_swap: the files of its 10 tasks"):
        small(LiberoPro, task="libero_spatial_swap").tasks()
    assert small(LiberoPro, task="libero_goal_swap, libero_10_lan", task_ids=[0, 2]).tasks() == {
        "libero_goal_swap": [0, 2],
        "libero_10_lan": [0, 2],
    }
    for wrong in ("libero_goal", "libero_goal_swapp"):
        with pytest.raises(UserInputError, match=wrong):
            small(LiberoPro, task=wrong).tasks()
    with pytest.raises(UserInputError, match="99"):
        small(LiberoPro, task="libero_goal_swap", task_ids=[99]).tasks()


# ---- in the simulator ----


def camera_of(environment: Any) -> Pose:
    """Where MuJoCo's model has the first view's camera."""
    model = environment._env.sim.model
    camera = model.camera_name2id(FIRST_CAMERA)
    return Pose(position=np.array(model.cam_pos[camera]), quaternion=np.array(model.cam_quat[camera]))


@needs_simulator
def test_a_moved_camera_is_where_its_numbers_say(moved: tuple[Any, dict[str, Any]]) -> None:
    environment, _ = moved
    # libero_object's scene is on the floor
    unmoved = Pose(
        position=np.array([0.8965773716836134, 5.216182733499864e-07, 0.65]),
        quaternion=np.array([0.6182166934013367, 0.3432307541370392, 0.3432314395904541, 0.6182177066802979]),
    )
    expected = CameraMove(azimuth=20, elevation=15, scale=130, turn_z=5).apply(unmoved)
    found = camera_of(environment)
    np.testing.assert_allclose(found.position, expected.position, atol=1e-12)
    assert found.angle_to(expected) < 0.01  # MuJoCo normalises quaternions
    facts = environment.variation.facts
    assert facts.variant.endswith(f"_view_{MOVE}")
    assert facts.camera_moved_m == pytest.approx(expected.distance_to(unmoved), abs=2e-4)


@needs_simulator
def test_true_geometry_is_that_of_the_picture(moved: tuple[Any, dict[str, Any]]) -> None:
    """An object's place, projected, is among the pixels that change when it is hidden, in both views."""
    environment, observation = moved
    maps = maps_of(observation)
    assert {name: values.shape for name, values in maps.items()} == {
        "ray": (2, GRID, GRID, 6),
        "depth": (2, GRID, GRID),
    }
    simulation = environment._env.sim
    views = views_of(simulation, VIEWS)
    rays = np.stack([view.rays((GRID, GRID)) for view in views])
    np.testing.assert_array_equal(maps["ray"][0], rays[0].astype(np.float16))
    np.testing.assert_allclose(maps["ray"][1], rays[1], atol=4e-3)  # the hand settles; pictures are a substep old
    body = simulation.model.body_name2id("alphabet_soup_1_main")
    for view, name in zip(views, VIEWS, strict=True):
        shown = changed_pixels(simulation, name, body)
        (place,), _ = view.project(in_first_view(simulation, FIRST_CAMERA, np.array([simulation.data.xpos[body]])))
        if not shown.any():  # the wrist sees the floor alone at the start
            assert name != FIRST_CAMERA
            continue
        pixel = (place + 1) / 2 * 256 - 0.5
        assert np.hypot(*(np.argwhere(shown)[:, ::-1] - pixel).T).min() < 4
    # The maps are averages over what a larger picture shows.
    large = [
        metres(simulation, simulation.render(camera_name=name, width=256, height=256, depth=True)[1]) for name in VIEWS
    ]
    for number in range(2):
        cells = large[number].reshape(GRID, 16, GRID, 16).mean(axis=(1, 3))
        assert np.median(np.abs(maps["depth"][number] / cells - 1)) < 0.01
    # What one view sees, the other one sees at the depth that its own picture says.
    rays = views[1].rays((256, 256))
    places, depths = views[0].project((rays[..., 3:] + large[1][..., None] * rays[..., :3]).reshape(-1, 3))
    pixels = np.rint((places + 1) / 2 * 256 - 0.5).astype(int)
    inside = (pixels >= 0).all(axis=1) & (pixels < 256).all(axis=1)
    seen = large[0][tuple(pixels[inside].T[::-1])]
    assert inside.sum() > 5000
    assert np.median(np.abs(seen / depths[inside] - 1)) < 0.01


def changed_pixels(simulation: Any, name: str, body: int) -> NDArray[np.bool_]:
    """The pixels, as LeRobot's pictures lie, of which the depth changes when a body is made invisible [256, 256]."""
    model = simulation.model
    depths = []
    colours = model.geom_rgba.copy()
    for alpha in (None, 0.0):
        if alpha is not None:
            model.geom_rgba[model.geom_bodyid == body, 3] = alpha
        depths.append(simulation.render(camera_name=name, width=256, height=256, depth=True)[1])
    model.geom_rgba[:] = colours
    changed: NDArray[np.bool_] = np.abs(depths[0] - depths[1])[::-1, ::-1] > 1e-6
    return changed


@needs_simulator
def test_geometry_reaches_the_batch_and_follows_the_wrist(moved: tuple[Any, dict[str, Any]]) -> None:
    from lerobot.envs.utils import preprocess_observation
    from lerobot.processor.env_processor import LiberoProcessorStep

    environment, first = moved
    after, *_ = environment.step(np.array([0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0]))
    before, later = maps_of(first), maps_of(after)
    np.testing.assert_array_equal(before["ray"][0], later["ray"][0])  # the camera in the room stands
    assert not np.array_equal(before["ray"][1], later["ray"][1])  # the hand moves
    batch = LiberoProcessorStep().observation(preprocess_observation(as_batch(after)))
    np.testing.assert_array_equal(batch["observation.geometry.ray"][0].numpy().astype(np.float16), later["ray"])
    # The wrist's camera from the state that a policy gets, as far as float32 and a substep allow.
    state = after["robot_state"]["eef"]
    hand = np.eye(4)
    hand[:3, :3], hand[:3, 3] = rotation_of(state["quat"]), state["pos"]
    camera = hand @ np.array([[0, -1, 0, 0.05], [1, 0, 0, 0], [0, 0, 1, -0.097], [0, 0, 0, 1.0]])
    place = in_first_view(environment._env.sim, FIRST_CAMERA, camera[None, :3, 3])
    np.testing.assert_allclose(later["ray"][1, 0, 0, 3:], place[0], atol=2e-3)


def as_batch(observation: Any) -> Any:
    """An observation as a vector of one environment gives it."""
    if isinstance(observation, dict):
        return {name: as_batch(value) for name, value in observation.items()}
    return np.asarray(observation)[None]


def rotation_of(quaternion: NDArray[Any]) -> NDArray[Any]:
    from scipy.spatial.transform import Rotation

    matrix: NDArray[Any] = Rotation.from_quat(quaternion).as_matrix()
    return matrix


@needs_simulator
@needs_plus
@pytest.mark.slow
@pytest.mark.parametrize("axis", ["robot", "language", "layout_level"])
def test_a_variant_of_each_other_axis_starts_and_differs(simulator: None, axis: str) -> None:
    config = small(LiberoPlusVariants, axis=axis, of_tasks="alphabet_soup", sample=1)
    config.prepare()
    ((suite, (number,)),) = config.tasks().items()
    plain = small(LiberoGeometry, task="libero_object", task_ids=[0])
    observations = {}
    for name, environment in (
        ("variant", make_environment(config, suite, number, 0, 1)),
        ("plain", make_environment(plain, "libero_object", 0, 0, 1)),
    ):
        observations[name] = environment.reset(seed=0)[0]
        told: str = environment.get_wrapper_attr("task_description")
        if name == "variant":
            same_words = told == "pick up the alphabet soup and place it in the basket"
        environment.close()
    assert same_words == (axis != "language")
    joints = [observations[name]["robot_state"]["joints"]["pos"] for name in ("variant", "plain")]
    assert (np.abs(joints[0] - joints[1]).max() > 0.05) == (axis == "robot")
    pictures = [observations[name]["pixels"]["image"].astype(int) for name in ("variant", "plain")]
    assert pictures[0].std() > 20
    assert (np.abs(pictures[0] - pictures[1]).max() > 60) == (axis != "language")


@needs_simulator
@needs_plus
@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero_object_object", "libero_goal_swap"])
def test_a_task_of_libero_pro_starts(simulator: None, suite: str) -> None:
    config = small(LiberoPro, task=suite, task_ids=[0])
    config.prepare()
    environment = make_environment(config, suite, 0, 0, 1)
    observation, _ = environment.reset(seed=0)
    environment.close()
    assert observation["pixels"]["image"].std() > 20
