"""`geomcache view`: what the files hold, against a scene that is known, and what it refuses."""

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError, DatasetNotFoundError, MissingFrameError, UserInputError
from geomcache.geometry import Camera
from geomcache.look import video
from geomcache.look.drawing import HEADING, MARGIN, NAME, PANEL, TITLE, scalar_colours, vector_colours
from geomcache.look.episode import Frame, survey
from geomcache.look.options import ViewOptions
from geomcache.look.sheet import EpisodeSheet, map_colours, pinhole_caption
from geomcache.look.value_counts import CLIP
from geomcache.look.view import PRINT_SCALE, view
from tests.support.datasets import make_dataset
from tests.support.scene import KEYS, LENGTHS, SIZE, WALL, Scene, make_scene, scene_maps
from tests.support.stores import make_spec, make_store

needs_rerun = pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None, reason="rerun-sdk, the extra `view`, is not installed"
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "geomcache")


def run(scene: Scene, output: Path, **options: object) -> None:
    values: dict[str, Any] = {"path": scene.cache, "episode": 1, "output": output, "root": scene.root, **options}
    view(ViewOptions(**values))


def find(sheet: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Return top and left of a picture, in the width of a panel, in a sheet of twice the layout's pixels."""
    size = PANEL * PRINT_SCALE
    shown = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST))
    for left in range(NAME * PRINT_SCALE, sheet.shape[1] - size, (PANEL + MARGIN) * PRINT_SCALE):
        for top in range(sheet.shape[0] - size):
            if (sheet[top, left : left + size] == shown[0]).all() and (
                sheet[top : top + size, left : left + size] == shown
            ).all():
                return top // PRINT_SCALE, left // PRINT_SCALE
    raise AssertionError("not found")


def test_features_are_shown_by_three_of_their_numbers(tmp_path: Path) -> None:
    path = make_store(tmp_path / "cache.zarr", spec=make_spec(outputs=("ray", "feature")))
    with GeometryStore.open(path) as store:
        episode, rows = survey(store, 1, None), range(20, 50)
        features: Any = store.batch(rows).feature
        values = features[..., 1:4].astype(np.float64)  # [n, V, h, w, 3]
        frame = next(episode.frames(3))
        low, high = np.percentile(values.reshape(-1, 3), CLIP, axis=0)
        np.testing.assert_allclose(episode.limits["feature"], [low, high], rtol=0.02)
        low, high = episode.limits["feature"]
        expected = (np.clip((values[3] - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        np.testing.assert_array_equal(map_colours(episode, frame)["feature"], expected)
        with_features = EpisodeSheet(episode).draw(frame)
        del episode.limits["feature"]
        assert with_features.shape[1] == EpisodeSheet(episode).draw(frame).shape[1] + PANEL + MARGIN


def test_a_frame_shows_the_pictures_and_the_maps(
    scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(scene, tmp_path / "frame.png", frame=3)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'frame.png'}: frame 3 of episode 1, ")
    sheet = np.asarray(Image.open(tmp_path / "frame.png"))
    row = LENGTHS[0] + 3
    episode = range(LENGTHS[0], sum(LENGTHS))
    maps = [[scene_maps(view, index) for view in (0, 1)] for index in episode]
    directions = np.stack([[one["ray"][..., :3] for one in pair] for pair in maps]).astype(np.float64)
    limits = np.percentile(directions.reshape(-1, 3), (1, 99), axis=0, method="inverted_cdf")
    depth = np.percentile(
        np.stack([[one["depth"] for one in pair] for pair in maps]).astype(np.float64), (1, 99), method="inverted_cdf"
    ).astype(np.float64)
    tops = []
    for number, key in enumerate(KEYS):
        places = [
            find(sheet, scene.pictures[key][row]),
            find(sheet, vector_colours(scene_maps(number, row)["ray"][..., :3], limits)),
            find(sheet, scalar_colours(scene_maps(number, row)["depth"], depth)),
        ]
        assert len({top for top, _ in places}) == 1
        assert [left for _, left in places] == [NAME + column * (PANEL + MARGIN) for column in (0, 1, 3)]
        tops.append(places[0][0])
    assert tops[1] >= tops[0] + PANEL


def test_the_first_frame_and_no_pictures(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    view(ViewOptions(path=scene.cache, episode=0, rgb=False))
    (line,) = caplog.messages
    assert line.startswith("scene-episode-0-frame-0.png: frame 0 of episode 0")
    bare = np.asarray(Image.open("scene-episode-0-frame-0.png"))
    run(scene, tmp_path / "full.png", episode=0)
    full = np.asarray(Image.open("full.png"))
    assert full.shape[1] - bare.shape[1] == (PANEL + MARGIN) * PRINT_SCALE


def test_a_survey_knows_the_cameras_paths(scene: Scene) -> None:
    with GeometryStore.open(scene.cache) as store:
        episode = survey(store, 1, None)
        rows = range(LENGTHS[0], sum(LENGTHS))
        origins = np.array([[Scene.origin(number, row) for number in (0, 1)] for row in rows])
        np.testing.assert_allclose(episode.origins, origins, atol=1e-3)
        confidence = [[Scene.confidence(number, row) for number in (0, 1)] for row in rows]
        assert episode.confidence is not None
        np.testing.assert_allclose(episode.confidence, confidence, atol=1e-3)
        assert len(episode) == LENGTHS[1]
        assert [frame.number for frame in episode.frames(1, 4)] == [1, 2, 3]


def test_the_field_of_view_is_said(scene: Scene) -> None:
    with GeometryStore.open(scene.cache) as store:
        (frame,) = survey(store, 1, None).frames(2, 3)
    assert pinhole_caption(frame, 1) == "pinhole 77 x 67 degrees, 0.0 % off"  # 2 atan(1 / 1.25), 2 atan(1 / 1.5)
    mirrored = {"ray": frame.maps["ray"] * np.array([-1, 1, 1, 1, 1, 1], np.float16)}
    broken = Frame(number=2, maps=mirrored, pictures=None)
    assert pinhole_caption(broken, 1) == "no pinhole camera has these rays"


def test_a_video_has_every_frame(scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(scene, tmp_path / "episode.mp4")
    assert "5 frames of episode 1" in caplog.messages[-1]
    with av.open(str(tmp_path / "episode.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == ("h264" if "libx264" in av.codec.codecs_available else "mpeg4")
        assert stream.pix_fmt == "yuv420p"
        assert stream.average_rate == 10
        assert stream.frames == LENGTHS[1]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == LENGTHS[1]
    for number in (1, 4):
        shown = frames[number]
        run(scene, tmp_path / "frame.png", frame=number)
        sheet = np.asarray(Image.open(tmp_path / "frame.png").reduce(PRINT_SCALE))
        assert shown.shape == (sheet.shape[0] // 2 * 2, sheet.shape[1] // 2 * 2, 3)
        top = HEADING + TITLE  # the first view's picture and directions; letters are too fine to compare
        panels = slice(top, top + PANEL), slice(NAME, NAME + 2 * PANEL + MARGIN)
        assert np.abs(sheet[panels].astype(int) - shown[panels]).mean() < 3


def test_a_video_without_x264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av.codec, "codecs_available", {"mpeg4"})
    pictures = [np.full((33, 65, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255))]
    video.write_video(tmp_path / "a.mp4", pictures, fps=5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("mpeg4", 64, 32)
        means = [frame.to_ndarray(format="rgb24").mean(axis=(0, 1)) for frame in container.decode(video=0)]
    np.testing.assert_allclose(means, [(255, 0, 0), (0, 0, 255)], atol=12)


def read_rerun(path: Path) -> dict[str, dict[str, dict[int, Any]]]:
    """By entity, component and frame (-1 where static): what a rerun file holds."""
    from rerun.chunk import RrdReader

    found: dict[str, dict[str, dict[int, Any]]] = {}
    for chunk in RrdReader(str(path)).stream():
        table = chunk.to_record_batch().to_pydict()
        frames = [-1] * chunk.num_rows if chunk.is_static else table.get("frame", [None] * chunk.num_rows)
        for name, values in table.items():
            kept = {frame: value for frame, value in zip(frames, values, strict=True) if value is not None}
            found.setdefault(str(chunk.entity_path), {}).setdefault(name, {}).update(kept)
    return found


@needs_rerun
def test_a_rerun_file_places_cameras_and_points(scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(scene, tmp_path / "episode.rrd")
    assert "5 frames of episode 1" in caplog.messages[-1]
    found = read_rerun(tmp_path / "episode.rrd")
    for number, name in enumerate(("image", "image2")):
        camera = found[f"/world/{name}"]
        for frame in range(LENGTHS[1]):
            row = LENGTHS[0] + frame
            translation, columns = camera["Transform3D:translation"][frame], camera["Transform3D:mat3x3"][frame]
            np.testing.assert_allclose(translation[0], Scene.origin(number, row), atol=2e-3)
            np.testing.assert_allclose(np.reshape(columns[0], (3, 3)).T, Scene.rotation(number, row), atol=2e-3)
            points = np.array(found[f"/world/{name}_points"]["Points3D:positions"][frame])
            assert points.shape == (64, 3)
            np.testing.assert_allclose(points[:, 2], WALL, atol=5e-3)
            scalar = found[f"/ray_conf/{name}"]["Scalars:scalars"][frame]
            np.testing.assert_allclose(scalar, Scene.confidence(number, row), atol=1e-3)
        intrinsics = np.reshape(found[f"/world/{name}/picture"]["Pinhole:image_from_camera"][0][0], (3, 3)).T
        half = SIZE / 2
        np.testing.assert_allclose(intrinsics, [(1.25 * half, 0, half), (0, 1.5 * half, half), (0, 0, 1)], atol=0.1)
        assert set(found[f"/maps/{name}/rgb"]["EncodedImage:blob"]) == set(range(LENGTHS[1]))
    assert "log_time" not in found["/world/image"]


@needs_rerun
def test_cameras_that_were_encoded_alone_have_worlds_of_their_own(scene: Scene, tmp_path: Path) -> None:
    alone = make_scene(tmp_path, views="independent", outputs=("ray",), like=scene)
    run(alone, tmp_path / "episode.rrd", rgb=False, root=None)
    found = read_rerun(tmp_path / "episode.rrd")
    assert {"/world/image/camera", "/world/image2/camera"} <= set(found)
    assert not [name for name in found if "points" in name or "ray_conf" in name]


@needs_rerun
def test_rays_of_no_camera_are_counted(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirrored = {
        name: np.concatenate([-values[..., :1], values[..., 1:]], axis=-1) if name == "ray" else values
        for name, values in scene_maps(1, 7).items()
    }
    monkeypatch.setattr("tests.support.scene.scene_maps", lambda *_: mirrored)
    other = make_scene(tmp_path, like=scene)
    run(other, tmp_path / "episode.rrd")
    for name, line in zip(("image", "image2"), caplog.messages, strict=False):
        assert line.startswith(f"{name}: ")
        assert "5 of 5 frames" in line
    found = read_rerun(tmp_path / "episode.rrd")
    assert "Transform3D:mat3x3" not in found["/world/image"]
    assert len(found["/maps/image/rgb"]["EncodedImage:blob"]) == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "a.gif"}, UserInputError, r"\.png, \.mp4, \.rrd, .*\.gif"),
        ({"output": "none/a.png"}, UserInputError, "none"),
        ({"output": "a.mp4", "frame": 2}, UserInputError, r"--frame: .*\.mp4.* 2"),
        ({"episode": 2}, UserInputError, "episode: .*0 to 1.* 2"),
        ({"episode": -1}, UserInputError, "episode: .*0 to 1.* -1"),
        ({"frame": 5}, UserInputError, "frame: .*0 to 4 .*episode 1.* 5"),
        ({"rgb": False}, UserInputError, "--root: .*--no-rgb"),
        ({"root": "nowhere"}, DatasetNotFoundError, r"meta/info\.json.*--no-rgb"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = dict(options)
    output = Path(str(values.pop("output", "a.png")))
    if "root" in values:
        values["root"] = Path(str(values["root"]))
    with pytest.raises(error, match=message) as caught:
        run(scene, output, **values)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_episode_that_is_not_cached(scene: Scene, tmp_path: Path) -> None:
    part = make_scene(tmp_path, wanted=[(0, LENGTHS[0]), (8, 10)], like=scene)  # the first, and some of the second
    with pytest.raises(MissingFrameError, match=r"episode 1, .* 0: .*geomcache extract .*--episodes 1"):
        run(part, tmp_path / "a.png")
    run(part, tmp_path / "a.png", episode=0)
    assert (tmp_path / "a.png").is_file()


def test_another_dataset_is_refused(scene: Scene, tmp_path: Path) -> None:
    make_dataset(tmp_path / "other", (7, 6), dict.fromkeys(KEYS, (SIZE, SIZE)))
    with pytest.raises(CacheMismatchError, match=r"length: episodes 1 \(6 frames\)"):
        run(scene, tmp_path / "a.png", root=tmp_path / "other")


def test_a_missing_extra_is_named(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserInputError, match=r"rerun-sdk.*--extra view"):
        ViewOptions(path=scene.cache, episode=0, output=tmp_path / "a.rrd")


def test_a_header_does_not_size_a_picture(scene: Scene, tmp_path: Path) -> None:
    """The numbers of a hostile header: sizes of cameras, how many there are, and frames a second."""
    with GeometryStore.open(scene.cache) as store:
        episode = survey(store, 1, None)
        (frame,) = episode.frames(2, 3)
        spec = store.spec
        store.spec = dataclasses.replace(
            spec, cameras=tuple(dataclasses.replace(camera, height=16384, width=1) for camera in spec.cameras)
        )
        assert EpisodeSheet(episode).draw(frame).shape[0] < 2500  # 16384:1 would be four million lines a camera
        store.spec = dataclasses.replace(
            spec, cameras=tuple(Camera(key=f"c{number}", height=8, width=8) for number in range(33))
        )
        with pytest.raises(UserInputError, match=r"at most 32 .* 33"):
            survey(store, 1, None)
    with pytest.raises(UserInputError, match=str(1 << 40)):
        video.write_video(tmp_path / "a.mp4", [np.zeros((2, 2, 3), np.uint8)], fps=1 << 40)
    assert not (tmp_path / "a.mp4").exists()
