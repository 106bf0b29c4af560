"""`geomcache update` after each of LeRobot's edits: what is carried over, and what the encoder sees."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geomcache.cache.header import Header
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from tests.support.datasets import make_dataset, pictures
from tests.support.edits import CAMERAS, REPO_ID, Workshop, content, frames_of, largest_difference, workshop

LENGTHS = (20, 17, 23, 9)
SIZES = dict.fromkeys(CAMERAS, (64, 64))  # smaller ones no video encoder takes


@pytest.fixture
def shop() -> Iterator[Workshop]:
    with workshop() as shop:
        yield shop


@pytest.fixture(scope="module", params=["image", "video"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets A and B, and a cache of A, for all edits of images or of videos."""
    folder = tmp_path_factory.mktemp(f"update-{request.param}")
    make_dataset(folder / "A", LENGTHS, SIZES, video=request.param == "video")
    make_dataset(folder / "B", (12, 8), SIZES, video=request.param == "video", seed=100)
    with workshop() as shop:
        shop.extract(folder / "A.zarr", folder / "A")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / made.name, symlinks=True))


def open_lerobot(root: Path) -> Any:
    from lerobot.datasets import LeRobotDataset

    return LeRobotDataset(REPO_ID, root=root, video_backend="pyav")


def delete(here: Path) -> Path:
    from lerobot.datasets.dataset_tools import delete_episodes

    delete_episodes(open_lerobot(here / "A"), [1], output_dir=here / "edited", repo_id=REPO_ID)
    return here / "edited"


def delete_last(here: Path) -> Path:
    from lerobot.datasets.dataset_tools import delete_episodes

    delete_episodes(open_lerobot(here / "A"), [3], output_dir=here / "edited", repo_id=REPO_ID)
    return here / "edited"


def split(here: Path) -> Path:
    from lerobot.datasets.dataset_tools import split_dataset

    split_dataset(open_lerobot(here / "A"), {"train": [0, 2], "val": [1, 3]}, output_dir=here / "split")
    return here / "split" / "val"


def merge(here: Path) -> Path:
    from lerobot.datasets.dataset_tools import merge_datasets

    merge_datasets([open_lerobot(here / "B"), open_lerobot(here / "A")], REPO_ID, output_dir=here / "edited")
    return here / "edited"


def aggregate(here: Path) -> Path:
    from lerobot.datasets.aggregate import aggregate_datasets

    roots = [here / "A", here / "B"]
    aggregate_datasets([REPO_ID, REPO_ID], REPO_ID, roots=roots, aggr_root=here / "edited", concatenate_videos=False)
    return here / "edited"


def record_on(here: Path) -> Path:
    record(here / "A", (11, 6), seed=200)
    return here / "A"


def record(root: Path, lengths: tuple[int, ...], seed: int) -> None:
    """Go on with a recording, as `lerobot-record --resume=true` does."""
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset.resume(REPO_ID, root=root)
    for number, length in enumerate(lengths):
        images = [pictures(length, 64, 64, seed=seed + 10 * number + view) for view in range(len(SIZES))]
        for frame in range(length):
            dataset.add_frame(
                {
                    **{key: images[view][frame] for view, key in enumerate(SIZES)},
                    "observation.state": np.zeros(8, np.float32),
                    "action": np.zeros(7, np.float32),
                    "task": "move",
                }
            )
        dataset.save_episode()
    dataset.finalize()


def modify_tasks(here: Path) -> Path:
    from lerobot.datasets.dataset_tools import modify_tasks

    modify_tasks(open_lerobot(here / "A"), new_task="another")
    return here / "A"


def recompute_stats(here: Path) -> Path:
    from lerobot.datasets.dataset_tools import recompute_stats

    recompute_stats(open_lerobot(here / "A"), skip_image_video=False)
    return here / "A"


EDITS = [delete, delete_last, split, merge, aggregate, record_on, modify_tasks, recompute_stats]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_encoder_sees_the_frames_whose_pictures_changed_and_no_others(
    here: Path, shop: Workshop, edit: Callable[[Path], Path], record_property: Callable[[str, object], None]
) -> None:
    before = {content(frame) for frame in frames_of(here / "A")}
    root = edit(here)
    frames = frames_of(root)
    changed = sum(content(frame) not in before for frame in frames)
    report = shop.update(here / "A.zarr", root)
    assert shop.frames_encoded == changed
    assert largest_difference(here / "A.zarr", frames) == 0
    store = GeometryStore.open(here / "A.zarr")
    assert store.sealed
    assert store.rows == ((0, len(frames)),)
    assert verify(here / "A.zarr").problems == ()
    assert not list(here.glob(".A.zarr*"))
    if report.frames:
        assert (report.frames_carried, report.frames_encoded) == (len(frames) - changed, changed)
    record_property(
        "figure", f"{edit.__name__}: {len(frames)} frames, carried {len(frames) - changed}, encoded {changed}"
    )
    again = shop.update(here / "A.zarr", root)
    assert (again.frames, again.frames_total) == (0, len(frames))


def reencode(here: Path) -> Path:
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.dataset_tools import reencode_dataset

    reencode_dataset(open_lerobot(here / "A"), rgb_encoder=RGBEncoderConfig(crf=22, g=4))
    return here / "A"


@pytest.mark.parametrize("edit", [delete, split, reencode], ids=lambda edit: edit.__name__)
def test_reencoded_videos_keep_their_geometry_if_they_may(
    here: Path, shop: Workshop, edit: Callable[[Path], Path]
) -> None:
    if "video" not in here.name:
        pytest.skip("images are not encoded again")
    shutil.copytree(here / "A.zarr", here / "again.zarr")
    before = frames_of(here / "A")
    root = edit(here)
    frames = frames_of(root)
    report = shop.update(here / "A.zarr", root, accept_reencoded=True)
    assert (shop.loads, report.frames_encoded, report.frames_carried) == (0, 0, len(frames))
    (line,) = [line for line in shop.lines if "frames of" in line]
    assert f"re-encoded: {len(frames)} frames" in line
    # The rows are those of the pictures as they were.
    kept = {"delete": [0, 2, 3], "split": [1, 3], "reencode": [0, 1, 2, 3]}[edit.__name__]
    starts = np.cumsum([0, *LENGTHS])
    rows = [row for episode in kept for row in range(starts[episode], starts[episode + 1])]
    assert largest_difference(here / "A.zarr", [before[row] for row in rows]) == 0
    # Without the option they are encoded, all of them.
    report = shop.update(here / "again.zarr", root)
    assert (report.frames_encoded, shop.frames_encoded) == (len(frames), len(frames))
    assert largest_difference(here / "again.zarr", frames) == 0


def test_images_that_became_videos_keep_their_geometry_if_they_may(here: Path, shop: Workshop) -> None:
    if "image" not in here.name:
        pytest.skip("they are videos already")
    from lerobot.datasets.dataset_tools import convert_image_to_video_dataset

    before = frames_of(here / "A")
    convert_image_to_video_dataset(open_lerobot(here / "A"), output_dir=here / "edited", repo_id=REPO_ID)
    report = shop.update(here / "A.zarr", here / "edited", accept_reencoded=True)
    assert Header.read(here / "A.zarr").dataset.decoder == "pyav"
    if report.frames_encoded == 0:
        assert largest_difference(here / "A.zarr", before) == 0
