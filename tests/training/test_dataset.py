"""GeometryDataset: every item has the geometry of its own row, whoever asks for it and in whatever order."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, StreamingLeRobotDataset
from lerobot.processor import make_default_policy_processor_steps
from lerobot.utils.collate import lerobot_collate_fn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, Subset

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError, DatasetError, MissingFrameError
from geomcache.frames.compare import check_watched, is_watched
from geomcache.training.dataset import GeometryDataset, StreamingGeometryDataset, check_sample, with_geometry
from tests.support.training import CAMERAS, REPO_ID, make_cache, make_dataset, make_spec, row_maps

LENGTHS = (5, 4, 6)
FRAMES = sum(LENGTHS)
RAY, RAY_CONF = "observation.geometry.ray", "observation.geometry.ray_conf"


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDatasetMetadata:
    return make_dataset(tmp_path_factory.mktemp("data") / "pens", LENGTHS)


@pytest.fixture(scope="module")
def cache(meta: LeRobotDatasetMetadata, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "pens.zarr", meta, make_spec(meta))


def lerobot_dataset(meta: LeRobotDatasetMetadata, **options: Any) -> LeRobotDataset:
    return LeRobotDataset(REPO_ID, root=meta.root, **options)


def expected_maps(meta: LeRobotDatasetMetadata, index: int) -> dict[str, torch.Tensor]:
    """What an item of this row must hold, from the rule that the cache was written by."""
    spec = make_spec(meta)
    maps = row_maps(spec, np.array([index]))
    return {
        f"observation.geometry.{name}": torch.from_numpy(np.stack([maps[key][name][0] for key in spec.camera_keys]))
        for name in spec.outputs
    }


def assert_geometry(meta: LeRobotDatasetMetadata, item: dict[str, Any]) -> None:
    for key, value in expected_maps(meta, int(item["index"])).items():
        assert item[key].dtype == torch.float16
        assert torch.equal(item[key], value), key


def test_an_item_is_lerobots_item_and_its_own_rows_geometry(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    plain = lerobot_dataset(meta)
    dataset = GeometryDataset(plain, GeometryStore.open(cache))
    assert len(dataset) == FRAMES
    for position in (0, 7, FRAMES - 1):
        item, bare = dataset[position], plain[position]
        assert item.keys() - bare.keys() == {RAY, RAY_CONF}
        assert item[RAY].shape == (2, 4, 4, 6)
        assert item[RAY_CONF].shape == (2, 4, 4)
        assert_geometry(meta, item)
        for key, value in bare.items():
            assert torch.equal(item[key], value) if isinstance(value, torch.Tensor) else item[key] == value


def test_depth_comes_where_it_was_cached(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    spec = make_spec(meta, outputs=("ray", "ray_conf", "depth", "depth_conf"))
    store = GeometryStore.open(make_cache(tmp_path / "deep.zarr", meta, spec))
    item = GeometryDataset(lerobot_dataset(meta), store)[3]
    maps = row_maps(spec, np.array([3]))
    for name in ("depth", "depth_conf"):
        stacked = np.stack([maps[key][name][0] for key in spec.camera_keys])
        assert torch.equal(item[f"observation.geometry.{name}"], torch.from_numpy(stacked))


def test_a_batch_is_one_read(meta: LeRobotDatasetMetadata, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    read = GeometryStore.batch

    def watched(self: GeometryStore, rows: Any) -> Any:
        reads.append(list(rows))
        return read(self, rows)

    monkeypatch.setattr(GeometryStore, "batch", watched)
    dataset = GeometryDataset(lerobot_dataset(meta), GeometryStore.open(cache))
    order = [9, 2, 2, 14, 0, 7]
    loader = DataLoader(dataset, batch_size=3, sampler=order)
    batches = list(loader)
    assert reads == [[9, 2, 2], [14, 0, 7]]
    for batch, rows in zip(batches, (order[:3], order[3:]), strict=True):
        expected = [expected_maps(meta, row) for row in rows]
        for key in (RAY, RAY_CONF):
            assert torch.equal(batch[key], torch.stack([maps[key] for maps in expected]))


def test_an_item_does_not_depend_on_its_batch(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    dataset = GeometryDataset(lerobot_dataset(meta), GeometryStore.open(cache))
    alone = dataset[6]
    among = dataset.__getitems__([11, 6, 0])[1]
    assert alone.keys() == among.keys()
    assert all(torch.equal(alone[key], among[key]) for key in alone if isinstance(alone[key], torch.Tensor))


@pytest.mark.parametrize("method", ["spawn", "fork", pytest.param("forkserver", marks=pytest.mark.slow)])
# Python 3.12 warns of fork in a process with threads, which torch's and datasets' imports start.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_every_start_method_read_the_same(meta: LeRobotDatasetMetadata, cache: Path, method: str) -> None:
    store = GeometryStore.open(cache)
    store.batch(np.array([0]))  # the parent has files open when its children start
    loader = DataLoader(
        GeometryDataset(lerobot_dataset(meta), store),
        batch_size=4,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context(method),
        collate_fn=lerobot_collate_fn,
    )
    seen = []
    for batch in loader:
        for at, index in enumerate(batch["index"].tolist()):
            seen.append(index)
            for key, value in expected_maps(meta, index).items():
                assert torch.equal(batch[key][at], value)
    assert seen == list(range(FRAMES))


def test_pickle_keeps_it_whole(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    dataset = GeometryDataset(lerobot_dataset(meta), GeometryStore.open(cache))
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == FRAMES
    assert_geometry(meta, copy[8])


def test_action_chunks_keep_working_and_geometry_is_of_the_current_frame(
    meta: LeRobotDatasetMetadata, cache: Path
) -> None:
    options = {"delta_timestamps": {"action": [0.0, 0.1, 0.2]}, "episodes": [2, 0]}
    dataset = GeometryDataset(lerobot_dataset(meta, **options), GeometryStore.open(cache))
    relative = dataset.absolute_to_relative_idx[8 + 6]  # episode 2 begins at row 9, its last frame is row 14
    item = dataset[relative]
    assert int(item["index"]) == 14
    assert item["action"].tolist() == [[14, 5]] * 3
    assert item["action_is_pad"].tolist() == [False, True, True]
    assert_geometry(meta, item)


def test_a_dataset_of_some_episodes_reads_their_rows(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    dataset = GeometryDataset(lerobot_dataset(meta, episodes=[1]), GeometryStore.open(cache))
    assert [int(dataset[position]["index"]) for position in range(len(dataset))] == [5, 6, 7, 8]
    for position in range(len(dataset)):
        assert_geometry(meta, dataset[position])


def test_what_lerobots_trainer_reads_is_the_datasets_own(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    plain = lerobot_dataset(meta, episodes=[0, 2])
    dataset = GeometryDataset(plain, GeometryStore.open(cache))
    names = ("meta", "episodes", "num_frames", "num_episodes", "absolute_to_relative_idx", "hf_dataset")
    for name in names:
        assert getattr(dataset, name) == getattr(plain, name)
    assert not hasattr(dataset, "set_epoch")  # accelerate asks
    # The sampled evaluation split is a Subset; its loader still reads a batch at once.
    subset = Subset(dataset, [3, 6])
    assert [int(item["index"]) for item in subset.__getitems__([1, 0])] == [10, 3]


def test_a_frame_that_is_not_there_is_an_error(meta: LeRobotDatasetMetadata, tmp_path: Path) -> None:
    store = GeometryStore.open(make_cache(tmp_path / "part.zarr", meta, make_spec(meta), episodes=[0, 2]))
    dataset = GeometryDataset(lerobot_dataset(meta), store)
    assert_geometry(meta, dataset[4])
    with pytest.raises(MissingFrameError, match="episode 1"):
        dataset[5]
    with pytest.raises(MissingFrameError, match="episode 1"):
        dataset.__getitems__([4, 8, 9])


def test_a_dataset_of_another_length_is_refused(cache: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", (4, 5))
    with pytest.raises(CacheMismatchError, match=r"episodes 0:2"):
        GeometryDataset(lerobot_dataset(other), GeometryStore.open(cache))


@pytest.mark.parametrize("return_uint8", [True, False])
def test_sampled_pictures_are_compared_in_both_dtypes_of_lerobot(
    meta: LeRobotDatasetMetadata, cache: Path, return_uint8: bool
) -> None:
    dataset = lerobot_dataset(meta, return_uint8=return_uint8)
    with GeometryStore.open(cache) as store:
        assert 3 <= check_sample(dataset, store) <= 8  # at least one frame of each episode


def watched_rows(count: int) -> list[int]:
    rows: list[int] = np.flatnonzero(is_watched(np.arange(count))).tolist()
    return rows


def replace_pictures(monkeypatch: pytest.MonkeyPatch, row: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let LeRobot return other pictures of a row, as of a dataset that was changed while it was read."""
    read = LeRobotDataset.__getitem__

    def changed(self: LeRobotDataset, position: int) -> dict[str, Any]:
        item: dict[str, Any] = read(self, position)
        if int(item["index"]) == row:
            item |= {key: change(item[key]) for key in CAMERAS}
        return item

    monkeypatch.setattr(LeRobotDataset, "__getitem__", changed)


@pytest.mark.parametrize("return_uint8", [True, False])
def test_a_watched_item_of_other_pictures_ends_training(
    meta: LeRobotDatasetMetadata, cache: Path, monkeypatch: pytest.MonkeyPatch, return_uint8: bool
) -> None:
    """Row 0 is watched, row 1 is not: 1 in 256."""
    assert watched_rows(FRAMES) == [0]
    dataset = GeometryDataset(lerobot_dataset(meta, return_uint8=return_uint8), GeometryStore.open(cache))
    replace_pictures(monkeypatch, 1, lambda image: 0 * image)
    dataset.__getitems__([0, 1])
    replace_pictures(monkeypatch, 0, lambda image: 0 * image)
    with pytest.raises(CacheMismatchError) as caught:
        dataset.__getitems__([1, 0])
    for part in ("content: episodes 0", "1 of 1 compared frames", "episode 0 frame 0", CAMERAS[0]):
        assert part in str(caught.value)


def test_a_watched_item_is_compared_in_a_worker_and_without_its_transforms(
    meta: LeRobotDatasetMetadata, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[list[NDArray[np.uint8]]] = []
    monkeypatch.setattr(
        "geomcache.training.dataset.check_watched",
        lambda store, read, rows, command: compared.extend(map(read, rows.tolist())),
    )
    plain = lerobot_dataset(meta, image_transforms=lambda image: 1 - image)
    item = GeometryDataset(plain, GeometryStore.open(cache)).__getitems__([0])[0]
    for key, picture in zip(CAMERAS, compared[0], strict=True):
        shown = (255 * item[key]).round().to(torch.uint8).permute(1, 2, 0).numpy()
        assert np.array_equal(255 - shown, picture)
    assert plain.image_transforms is not None


@pytest.mark.slow
def test_a_watched_item_ends_training_from_a_spawned_worker_with_its_message(
    meta: LeRobotDatasetMetadata, tmp_path: Path
) -> None:
    """The cache of another dataset with the same lengths, taken for this one's."""
    other = make_dataset(tmp_path / "other", LENGTHS, seed=1)
    store = GeometryStore.open(make_cache(tmp_path / "other.zarr", other, make_spec(other)))
    dataset = GeometryDataset(lerobot_dataset(other), store)
    dataset._dataset = lerobot_dataset(meta)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(CacheMismatchError, match="episode 0 frame 0"):
        next(iter(loader))


def test_one_in_256_rows_is_watched_and_they_are_spread() -> None:
    rows = watched_rows(256_000)
    assert 990 <= len(rows) <= 1010
    assert max(np.diff(rows)) <= 512


def test_a_picture_that_lerobot_cannot_decode_is_one_line(
    meta: LeRobotDatasetMetadata, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("time stamps violate the tolerance\nand so on")

    monkeypatch.setattr(LeRobotDataset, "__getitem__", fail)
    with GeometryStore.open(cache) as store, pytest.raises(DatasetError) as caught:
        check_sample(lerobot_dataset(meta), store)
    assert "--tolerance_s" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataset_with_the_first_episodes_alone_is_taken(cache: Path, tmp_path: Path) -> None:
    shorter = make_dataset(tmp_path / "shorter", (5, 4))
    dataset = GeometryDataset(lerobot_dataset(shorter), GeometryStore.open(cache))
    assert len(dataset) == 9


def test_geometry_passes_lerobots_processor_steps_untouched(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi05.configuration_pi05 import PI05Config
    from lerobot.processor import PolicyProcessorPipeline, batch_to_transition, transition_to_batch

    dataset = GeometryDataset(lerobot_dataset(meta), GeometryStore.open(cache))
    config = PI05Config(
        device="cpu",
        input_features={"observation.state": PolicyFeature(type=FeatureType.STATE, shape=(2,))},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(2,))},
    )
    steps = make_default_policy_processor_steps(config, meta.stats)
    pipeline = PolicyProcessorPipeline(
        steps=[steps.rename_observations, steps.add_batch_dim, steps.normalize, steps.to_device],
        to_transition=batch_to_transition,
        to_output=transition_to_batch,
    )
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    processed = pipeline(dict(batch))
    for key in (RAY, RAY_CONF):
        assert processed[key].dtype == torch.float16
        assert torch.equal(processed[key], batch[key])
    assert not torch.equal(processed["observation.state"], batch["observation.state"])  # the steps did run


# ---- streaming -------------------------------------------------------------------------------------------------------


def streaming_dataset(meta: LeRobotDatasetMetadata) -> StreamingLeRobotDataset:
    return StreamingLeRobotDataset(
        REPO_ID, root=meta.root, buffer_size=4, max_num_shards=1, delta_timestamps={"action": [0.0, 0.1]}
    )


def test_streamed_items_have_their_own_rows_geometry(
    meta: LeRobotDatasetMetadata, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def watched(store: GeometryStore, read: Callable[[int], Any], rows: Any, command: str) -> None:
        compared.extend(rows[is_watched(rows)].tolist())
        check_watched(store, read, rows, command)

    monkeypatch.setattr("geomcache.training.dataset.check_watched", watched)
    dataset = with_geometry(streaming_dataset(meta), GeometryStore.open(cache))
    assert isinstance(dataset, StreamingGeometryDataset)
    assert isinstance(dataset, IterableDataset)
    assert dataset.num_frames == FRAMES
    order = []
    for item in dataset:
        order.append(int(item["index"]))
        assert_geometry(meta, item)
        assert item["action"].shape == (2, 2)
    assert sorted(order) == list(range(FRAMES))
    assert order != sorted(order)  # LeRobot's shuffling buffer was at work
    assert compared == [0]


@pytest.mark.slow
def test_streaming_works_in_a_spawned_worker(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    dataset = with_geometry(streaming_dataset(meta), GeometryStore.open(cache))
    loader = DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context="spawn")
    indices = []
    for batch in loader:
        for at, index in enumerate(batch["index"].tolist()):
            indices.append(index)
            assert torch.equal(batch[RAY][at], expected_maps(meta, index)[RAY])
    assert sorted(indices) == list(range(FRAMES))


def test_with_geometry_picks_the_form(meta: LeRobotDatasetMetadata, cache: Path) -> None:
    dataset = with_geometry(lerobot_dataset(meta), GeometryStore.open(cache))
    assert type(dataset) is GeometryDataset
    assert not isinstance(dataset, IterableDataset)
