"""`geomcache extract` on a dataset that has grown since, and `--follow` next to a recording."""

import queue
import shlex
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geomcache.cache import layout
from geomcache.cache.header import Header
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import CacheMismatchError, UserInputError
from geomcache.extraction import run as run_module
from geomcache.extraction.options import ExtractOptions
from geomcache.frames.of_cache import open_pictures
from geomcache.pipeline.report import ExtractReport
from geomcache.training.dataset import check_sample, with_geometry
from tests.support.cli import call
from tests.support.datasets import make_dataset, pictures
from tests.support.edits import (
    CAMERAS,
    REPO_ID,
    Episode,
    StoppedError,
    Workshop,
    committed_rows,
    frames_of,
    interrupt,
    largest_difference,
    picture_of,
    workshop,
    write_dataset,
)

SIZES = dict.fromkeys(CAMERAS, (64, 64))


def episode(first: int, length: int) -> Episode:
    return Episode(tuple((number, number + 1000) for number in range(first, first + length)), first + 1)


BEFORE = [episode(0, 32), episode(100, 20), episode(200, 18)]  # 70 rows: four shards of 16 and one of 6
AFTER = [*BEFORE, episode(300, 20), episode(400, 3)]


@pytest.fixture
def shop() -> Iterator[Workshop]:
    with workshop() as shop:
        yield shop


@pytest.fixture
def here(tmp_path: Path, shop: Workshop) -> Path:
    write_dataset(tmp_path / "data", BEFORE)
    shop.extract(tmp_path / "cache.zarr", tmp_path / "data")
    return tmp_path


def open_lerobot(root: Path) -> Any:
    from lerobot.datasets import LeRobotDataset

    return LeRobotDataset(REPO_ID, root=root)


def rewrite(here: Path, episodes: list[Episode]) -> Path:
    shutil.rmtree(here / "data")
    write_dataset(here / "data", episodes)
    return here / "data"


def assert_follows(cache: Path, episodes: list[Episode]) -> None:
    frames = [tuple(map(picture_of, frame)) for each in episodes for frame in each.frames]
    assert largest_difference(cache, frames) == 0
    with GeometryStore.open(cache) as store:
        assert store.sealed
        assert store.rows == ((0, len(frames)),)
    assert verify(cache).problems == ()
    assert not list(cache.parent.glob(".*"))


def test_a_dataset_that_has_grown_is_continued(here: Path, shop: Workshop) -> None:
    report = shop.extract(here / "cache.zarr", rewrite(here, AFTER))
    assert any("has grown" in line for line in shop.lines)
    assert (report.frames, report.frames_linked, report.frames_carried) == (93, 64, 70)
    assert shop.frames_encoded == report.frames_encoded == 23
    assert_follows(here / "cache.zarr", AFTER)
    assert shop.extract(here / "cache.zarr", here / "data").frames == 0


def test_some_of_the_new_episodes_are_enough(here: Path, shop: Workshop) -> None:
    report = shop.extract(here / "cache.zarr", rewrite(here, AFTER), episodes="4")
    assert report.frames_encoded == 3
    with GeometryStore.open(here / "cache.zarr") as store:
        assert store.episodes() == ((0, 3), (4, 5))
    assert verify(here / "cache.zarr").problems == ()
    shop.extract(here / "cache.zarr", here / "data")
    assert_follows(here / "cache.zarr", AFTER)


def test_what_an_interrupted_continuation_encoded_is_kept_although_more_was_recorded(
    here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, root = here / "cache.zarr", rewrite(here, AFTER)
    with monkeypatch.context() as patch:
        interrupt(patch, cache, encoded=10, committed=(70, 93))
        with pytest.raises(StoppedError):
            shop.extract(cache, root)
    done = committed_rows(cache, (70, 93))
    assert 0 < done < 23
    more = [*AFTER, episode(600, 7)]
    report = shop.extract(cache, rewrite(here, more))
    assert report.frames_encoded == shop.frames_encoded == 23 + 7 - done
    assert_follows(cache, more)


def test_a_cache_that_has_outgrown_its_shards_is_cut_anew(
    here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_OUTGROWN", 2)
    many = [*BEFORE, Episode(((5, 6),) * 2000, 5000)]
    shop.update(here / "cache.zarr", rewrite(here, many))
    assert Header.read(here / "cache.zarr").shard_frames == 32
    assert shop.frames_encoded == 2000
    assert largest_difference(here / "cache.zarr", [tuple(map(picture_of, f)) for e in many for f in e.frames]) == 0


@pytest.mark.parametrize("change", ["content", "order", "length"])
def test_any_other_change_is_refused_with_the_command_that_helps(
    here: Path, shop: Workshop, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    changed = {
        "content": [BEFORE[0], episode(500, 20), BEFORE[2], *AFTER[3:]],
        "order": [BEFORE[0], BEFORE[2], BEFORE[1], *AFTER[3:]],
        "length": [BEFORE[0], BEFORE[1]],
    }[change]
    root = rewrite(here, changed)
    if change == "length":
        root = rewrite(here, [BEFORE[0], Episode(BEFORE[1].frames[:9], 9), BEFORE[2]])
        changed = [BEFORE[0], Episode(BEFORE[1].frames[:9], 9), BEFORE[2]]
    with pytest.raises(CacheMismatchError) as caught:
        shop.extract(here / "cache.zarr", root)
    with GeometryStore.open(here / "cache.zarr") as store:
        with pytest.raises(CacheMismatchError) as of_pictures:
            open_pictures(store, np.arange(2), dataset=REPO_ID, root=root, revision=None)
        with pytest.raises(CacheMismatchError) as of_training:
            with_geometry(open_lerobot(root), store)
    for error in (caught.value, of_pictures.value, of_training.value):
        assert change in str(error.wanted)
        assert str(error).split("`")[1] == str(caught.value).split("`")[1]
    # What the message advises is done as it stands.
    command = str(caught.value).split("`")[1]
    words = shlex.split(command)
    assert words[:3] == ["geomcache", "update", str(here / "cache.zarr")]
    assert call(monkeypatch, *words[1:], "--num-workers", "0", "--device", "cpu") == 0
    assert_follows(here / "cache.zarr", changed)
    with GeometryStore.open(here / "cache.zarr") as store:
        assert check_sample(open_lerobot(root), store) >= len(changed)
        assert len(with_geometry(open_lerobot(root), store)) == store.dataset.frames
    assert shop.extract(here / "cache.zarr", root).frames == 0


def test_pictures_that_changed_under_the_same_statistics_stop_a_continuation(here: Path, shop: Workshop) -> None:
    lying = [BEFORE[0], Episode(episode(500, 20).frames, BEFORE[1].statistics), *AFTER[2:]]
    with pytest.raises(CacheMismatchError) as caught:
        shop.extract(here / "cache.zarr", rewrite(here, lying))
    assert caught.value.field == "pictures"
    assert "episode 1 frame" in str(caught.value)
    assert "geomcache update" in str(caught.value)
    shop.update(here / "cache.zarr", here / "data")
    assert_follows(here / "cache.zarr", lying)


class StopFollowingError(Exception):
    pass


class Follower:
    """`extract --follow` in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, root: Path) -> None:
        self.reports: queue.Queue[ExtractReport | BaseException] = queue.Queue()
        self._stop, self.waits = threading.Event(), threading.Semaphore(0)
        monkeypatch.setattr(run_module, "FOLLOW_POLL_S", 0.05)
        monkeypatch.setattr(run_module, "sleep", self._sleep)
        self._options = ExtractOptions(
            model="tiny", dataset=REPO_ID, root=root, output=cache, num_workers=0, device="cpu", follow=True
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _sleep(self, _seconds: float) -> None:
        self.waits.release()
        if self._stop.wait(0.05):
            raise StopFollowingError

    def _run(self) -> None:
        try:
            for report in run_module.follow(self._options):
                self.reports.put(report)
        except StopFollowingError:
            pass
        except BaseException as error:  # noqa: BLE001 - the test's thread looks at it
            self.reports.put(error)

    def next(self) -> ExtractReport:
        report = self.reports.get(timeout=240)
        assert isinstance(report, ExtractReport), report
        return report

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def add_episode(dataset: Any, length: int, seed: int) -> None:
    images = [pictures(length, 64, 64, seed=seed + view) for view in range(len(SIZES))]
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


def test_a_recording_is_followed(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lerobot.datasets import LeRobotDataset

    root, cache = tmp_path / "data", tmp_path / "cache.zarr"
    follower = Follower(monkeypatch, cache, root)
    follower.waits.acquire(timeout=120)  # nothing is there yet
    make_dataset(root, (9, 7), SIZES)
    assert follower.next().frames == 16
    dataset = LeRobotDataset.resume(REPO_ID, root=root)
    add_episode(dataset, 11, seed=50)  # its files stay open
    for _ in range(4):
        follower.waits.acquire(timeout=120)
    assert follower.reports.empty()
    add_episode(dataset, 5, seed=60)
    dataset.finalize()
    report = follower.next()
    assert (report.frames, report.frames_encoded) == (32, 16)
    follower.stop()
    assert follower.reports.empty()
    assert largest_difference(cache, frames_of(root)) == 0
    with GeometryStore.open(cache) as store:
        assert store.rows == ((0, 32),)


def test_following_takes_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="--root"):
        ExtractOptions(model="m", dataset="d", follow=True)
    for other in ({"dry_run": True}, {"overwrite": True}, {"episodes": "0"}):
        with pytest.raises(UserInputError, match="follow"):
            ExtractOptions(model="m", dataset="d", root=tmp_path, follow=True, **other)
