"""Finding a dataset and saying what it is."""

import dataclasses
import hashlib
import json
import shutil
import typing
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub.hf_api import RepoFile
from lerobot.datasets import LeRobotDatasetMetadata

from geomcache.errors import DatasetError, DatasetNotFoundError
from geomcache.frames.source import describe_cameras, describe_dataset, episode_lengths, open_dataset
from geomcache.geometry import DatasetSpec, canonical_json
from tests.support.datasets import DEMO, make_dataset
from tests.support.logs import logged_lines


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "demo"))


def test_the_shipped_episodes_are_described() -> None:
    dataset, episodes = open_dataset("geomcache/libero_object_demo", root=DEMO)
    info = json.loads((DEMO / "meta" / "info.json").read_text())
    lengths = pq.read_table(DEMO / "meta" / "episodes")["length"].to_numpy()
    assert episodes == [(0, 3)]
    assert dataset.spec.frames == info["total_frames"] == lengths.sum()
    assert (dataset.spec.episodes, dataset.spec.fps, dataset.spec.decoder) == (3, 10, "pyav")
    assert dataset.spec.revision is None
    assert dataset.spec.episodes_sha256 == hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()
    assert [(camera.key, camera.height, camera.width) for camera in dataset.cameras] == [
        ("observation.images.image", 256, 256),
        ("observation.images.image2", 256, 256),
    ]
    assert dataset.rows([(0, 1), (1, 3)]) == [(0, lengths[0]), (lengths[0], lengths.sum())]


def test_the_reader_locates_every_row() -> None:
    dataset, _ = open_dataset("demo", root=DEMO)
    table = pq.read_table(DEMO / "data")
    located = [dataset.reader.locate(index) for index in range(dataset.spec.frames)]
    expected = list(zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True))
    assert located == expected


def test_the_identity_is_of_the_pictures_not_of_the_name_or_place(demo: Path) -> None:
    here = describe_dataset(LeRobotDatasetMetadata("a", root=DEMO), ["observation.images.image"])
    there = describe_dataset(LeRobotDatasetMetadata("b", root=demo), ["observation.images.image"])
    assert here.identities_sha256 == there.identities_sha256
    other = describe_dataset(LeRobotDatasetMetadata("a", root=DEMO), ["observation.images.image2"])
    assert other.identities_sha256 != here.identities_sha256
    stats = json.loads((demo / "meta" / "stats.json").read_text())
    stats["observation.images.image"]["mean"][0][0][0] += 1e-6
    (demo / "meta" / "stats.json").write_text(json.dumps(stats))
    changed = describe_dataset(LeRobotDatasetMetadata("b", root=demo), ["observation.images.image"])
    assert changed == dataclasses.replace(here, repo_id="b")  # aggregated statistics do not belong to it
    assert changed.episodes_sha256 == here.episodes_sha256


def test_a_dataset_of_images_says_so(tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset", (2, 3))
    dataset, _ = open_dataset("test", root=tmp_path / "dataset")
    assert dataset.spec.decoder == "image"
    assert not dataset.reader.videos
    lengths = episode_lengths(LeRobotDatasetMetadata("test", root=tmp_path / "dataset"))
    np.testing.assert_array_equal(lengths, [2, 3])


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"no meta/info\.json"):
        open_dataset("test", root=tmp_path)


def test_an_older_version_names_the_converter(demo: Path) -> None:
    info = json.loads((demo / "meta" / "info.json").read_text())
    (demo / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(
        DatasetError, match=r"expected LeRobotDataset v3\.0, found v2\.1.*convert_dataset_v21_to_v30"
    ) as caught:
        open_dataset("test", root=demo)
    assert f"--root={demo} --push-to-hub=false`" in str(caught.value)


def test_the_converter_that_the_message_names_is_there() -> None:
    import lerobot.scripts.convert_dataset_v21_to_v30 as converter

    source = Path(converter.__file__).read_text()
    for option in ("--repo-id", "--root", "--push-to-hub"):
        assert f'"{option}"' in source


@pytest.mark.parametrize("text", ["{", "[]", '{"fps": 10}'])
def test_malformed_info_is_refused(demo: Path, text: str) -> None:
    (demo / "meta" / "info.json").write_text(text)
    with pytest.raises(DatasetError, match=r"meta/info\.json"):
        open_dataset("test", root=demo)


def test_a_camera_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(DatasetError, match=r"'front'.* observation\.images\.image, observation\.images\.image2"):
        open_dataset("test", root=DEMO, cameras=["front"])
    with pytest.raises(DatasetError, match=r"observation\.images\.image, observation\.images\.image"):
        open_dataset("test", root=DEMO, cameras=["observation.images.image"] * 2)
    with pytest.raises(DatasetError, match=r"'observation\.state'"):
        open_dataset("test", root=DEMO, cameras=["observation.state"])
    with pytest.raises(DatasetError, match=r"observation\.images\.image2\?.* 'imag2'"):
        open_dataset("test", root=DEMO, cameras=["imag2"])


@pytest.mark.parametrize(
    "name", ["videos/observation.images.image2/chunk-000/file-000.mp4", "data/chunk-000/file-000.parquet"]
)
def test_files_that_are_missing_are_named(demo: Path, name: str) -> None:
    (demo / name).unlink()
    with pytest.raises(DatasetError, match=f"1 of 3 .*{name}"):
        open_dataset("test", root=demo)


def test_metadata_that_is_missing_is_named(demo: Path) -> None:
    shutil.rmtree(demo / "meta" / "episodes")
    with pytest.raises(DatasetError, match=r"expected meta/episodes/\*/\*\.parquet, found none"):
        open_dataset("test", root=demo)


def test_a_gap_in_the_episode_table_is_refused(demo: Path) -> None:
    path = demo / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    starts = table["dataset_from_index"].to_numpy().copy()
    starts[1] += 1
    place = table.column_names.index("dataset_from_index")
    pq.write_table(table.set_column(place, "dataset_from_index", [starts]), path)
    with pytest.raises(DatasetError, match=r"0 to 380.*meta/episodes"):
        open_dataset("test", root=demo)


def test_without_a_hub_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route to the Hub\nat all")

    monkeypatch.setattr("lerobot.datasets.dataset_metadata.get_safe_version", refuse)
    monkeypatch.setattr("lerobot.datasets.dataset_metadata.HF_LEROBOT_HOME", tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"nobody/nothing: .*no route to the Hub.*--root DIR"):
        open_dataset("nobody/nothing")


def test_a_folder_given_as_a_name_gets_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lerobot.datasets.dataset_metadata.HF_LEROBOT_HOME", tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"--dataset NAME --root"):
        open_dataset(str(DEMO.parent))


def test_files_of_a_hub_dataset_are_fetched_where_lerobot_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot folder has the metadata; files of the wanted episodes are asked for by name and commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = Path(shutil.copytree(DEMO, tmp_path / "snapshots" / commit))
    video = "videos/observation.images.image/chunk-000/file-000.mp4"
    (root / video).unlink()
    asked: dict[str, object] = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        shutil.copy(DEMO / video, root / video)
        return str(root)

    monkeypatch.setattr(
        "geomcache.frames.source.open_metadata", lambda *_: LeRobotDatasetMetadata("org/demo", root=root)
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    file = typing.cast("typing.Any", RepoFile)  # huggingface_hub does not say its types
    entries = [file(path=name, size=size, oid="") for name, size in ((video, 35_200_000_000), ("other", 1_000))]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *_, **_options: entries)
    with logged_lines() as lines:
        dataset, _ = open_dataset("org/demo")
    (line,) = lines
    assert "org/demo" in line
    assert "35.2 GB" in line
    assert dataset.spec.revision == commit
    assert asked["repo_id"] == "org/demo"
    assert asked["revision"] == commit
    assert asked["allow_patterns"] == [video]


def add_features(root: Path, **features: dict[str, object]) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text())
    for name, feature in features.items():
        info["features"][f"observation.images.{name}"] = {"names": ["height", "width", "channels"], **feature}
    path.write_text(json.dumps(info))


def test_grey_and_depth_cameras_are_left_out_and_named(demo: Path) -> None:
    add_features(
        demo,
        mono={"dtype": "image", "shape": [48, 64, 1]},
        depth={"dtype": "image", "shape": [48, 64, 1], "info": {"is_depth_map": True}},
    )
    with logged_lines() as lines:
        dataset, _ = open_dataset("demo", root=demo)
    colour = ["observation.images.image", "observation.images.image2"]
    assert [camera.key for camera in dataset.cameras] == colour
    assert list(describe_cameras(LeRobotDatasetMetadata("demo", root=demo))) == colour
    (line,) = lines
    assert "observation.images.mono (1 channel)" in line
    assert "observation.images.depth (a depth map)" in line
    with logged_lines() as lines:
        open_dataset("demo", root=demo, cameras=colour[:1])
    assert lines == []  # who names cameras knows
    for name in ("mono", "depth"):
        with pytest.raises(DatasetError, match=f"camera observation.images.{name}: expected 3 channels, "):
            open_dataset("demo", root=demo, cameras=[f"observation.images.{name}"])


def test_a_frame_rate_that_is_not_whole_stays(demo: Path) -> None:
    path = demo / "meta" / "info.json"
    info = json.loads(path.read_text())
    specs = []
    for fps in (10, 10.0, 29.97):
        path.write_text(json.dumps({**info, "fps": fps}))
        specs.append(describe_dataset(LeRobotDatasetMetadata("demo", root=demo), ["observation.images.image"]))
    assert [spec.fps for spec in specs] == [10, 10, 29.97]
    assert b'"fps":10,' in canonical_json(specs[1].to_dict())
    assert DatasetSpec.from_dict(json.loads(canonical_json(specs[2].to_dict()))) == specs[2]


def test_a_folder_that_is_called_snapshots_names_no_commit(tmp_path: Path) -> None:
    root = Path(shutil.copytree(DEMO, tmp_path / "snapshots" / "mine"))
    assert open_dataset("demo", root=root)[0].spec.revision is None


@pytest.mark.parametrize("template", ["data/{no_such}.parquet", "data/{chunk_index", "data/{chunk_index.none}"])
def test_a_path_that_cannot_be_filled_in_is_refused(demo: Path, template: str) -> None:
    path = demo / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_path": template}))
    with pytest.raises(DatasetError, match=r"^meta/info\.json: .*chunk_index.*file_index"):
        open_dataset("demo", root=demo)
