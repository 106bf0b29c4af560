"""Random sequences of edits: no row is ever another picture's, and the encoder sees new pictures alone."""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import open_dataset
from geomcache.geometry import GeometrySpec
from geomcache.pipeline.carry import Carrier, EarlierCaches, PictureIndex
from tests.support.edits import (
    CAMERAS,
    Episode,
    TinyEncoder,
    Workshop,
    content,
    frames_of,
    picture_of,
    workshop,
    write_dataset,
)

PICTURES = 60  # so few that episodes share some, and views do
VIEWS = len(CAMERAS)

frames = st.tuples(*[st.integers(0, PICTURES - 1)] * VIEWS)
contents = st.lists(frames, min_size=1, max_size=10).map(tuple)
new_episodes = contents.map(lambda frames: Episode(frames, hash(frames) % 2**40))
datasets = st.lists(new_episodes, min_size=1, max_size=5)


def edited(draw: st.DrawFn, before: Sequence[Episode]) -> list[Episode]:
    """A dataset after one edit: one of LeRobot's, or one that leaves statistics behind which lie."""
    episodes = list(before)
    which = draw(st.integers(0, len(episodes) - 1))
    one = episodes[which]
    kind = draw(
        st.sampled_from(
            (
                *("delete", "keep some", "re-order", "record", "merge before", "repeat", "cut", "grow", "swap views"),
                *("change a frame", "exchange content", "lie", "lose statistics", "nothing"),
            )
        )
    )
    if kind == "delete" and len(episodes) > 1:
        del episodes[which]
    elif kind == "keep some":
        episodes = draw(st.lists(st.sampled_from(episodes), min_size=1, max_size=len(episodes), unique=True))
    elif kind == "re-order":
        episodes = draw(st.permutations(episodes))
    elif kind == "record":
        episodes += draw(datasets)
    elif kind == "merge before":
        episodes = draw(datasets) + episodes
    elif kind == "repeat":
        episodes.insert(draw(st.integers(0, len(episodes))), one)
    elif kind == "cut":
        episodes[which] = Episode(one.frames[: max(1, len(one.frames) // 2)], one.statistics)
    elif kind == "grow":
        episodes[which] = Episode(one.frames + draw(contents), one.statistics)
    elif kind == "swap views":  # another scene, of the same pictures
        episodes[which] = Episode(tuple(frame[::-1] for frame in one.frames), one.statistics)
    elif kind == "change a frame":
        at = draw(st.integers(0, len(one.frames) - 1))
        episodes[which] = Episode((*one.frames[:at], draw(frames), *one.frames[at + 1 :]), one.statistics)
    elif kind == "exchange content":  # with the statistics where they were
        other = draw(st.integers(0, len(episodes) - 1))
        episodes[which], episodes[other] = (
            Episode(episodes[other].frames, one.statistics),
            Episode(one.frames, episodes[other].statistics),
        )
    elif kind == "lie":
        episodes = [Episode(episode.frames, 1) for episode in episodes]
    elif kind == "lose statistics":
        episodes = [Episode(episode.frames, None) for episode in episodes]
    return episodes


@st.composite
def sequences(draw: st.DrawFn) -> list[list[Episode]]:
    states = [draw(datasets)]
    for _ in range(draw(st.integers(1, 4))):
        states.append(edited(draw, states[-1]))
    return states


def numbers_of(episodes: Sequence[Episode]) -> list[tuple[int, ...]]:
    return [frame for episode in episodes for frame in episode.frames]


@functools.cache
def geometry_of(spec: GeometrySpec, row: tuple[int, ...]) -> dict[str, NDArray[np.float16]]:
    """What the encoder computes of a frame alone: output -> [V, h, w(, 6)]."""
    geometry = TinyEncoder(spec).encode([picture_of(number)[None] for number in row])
    return {name: values[0].numpy() for name, values in geometry.items()}


def follow(shop: Workshop, folder: Path, states: list[list[Episode]]) -> None:
    """Make a cache of the first state and let it follow the others; compare every row of each."""
    cache, known = folder / "cache.zarr", set[tuple[int, ...]]()
    for number, episodes in enumerate(states):
        root, rows = folder / str(number), numbers_of(episodes)
        write_dataset(root, episodes)
        last = states[number - 1] if number else []
        if episodes[: len(last)] == last and len(episodes) > len(last) and number % 2 == 0:
            shop.extract(cache, root)
            assert shop.frames_encoded == len(rows) - len(numbers_of(last))
        else:
            shop.update(cache, root)
            assert shop.frames_encoded == sum(row not in known for row in rows)
        with GeometryStore.open(cache) as store:
            assert store.sealed
            assert store.rows == ((0, len(rows)),)
            for name, values in store.batch(range(len(rows))).items():
                np.testing.assert_array_equal(values, np.stack([geometry_of(store.spec, row)[name] for row in rows]))
        known = {*rows}
    assert verify(cache).problems == ()
    assert sorted(path.name for path in folder.glob(".*")) == []


COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def run(states: list[list[Episode]]) -> None:
    with workshop() as shop, tempfile.TemporaryDirectory() as folder:
        follow(shop, Path(folder), states)


@settings(COMMON, max_examples=10, derandomize=True)
@given(sequences())
def test_no_row_is_ever_of_other_pictures(states: list[list[Episode]]) -> None:
    run(states)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(COMMON, max_examples=1000)
@given(sequences())
def test_a_thousand_sequences_never_give_a_wrong_row(states: list[list[Episode]]) -> None:
    run(states)


@pytest.fixture
def shop() -> Iterator[Workshop]:
    with workshop() as shop:
        yield shop


def test_datasets_that_are_written_quickly_are_lerobots(tmp_path: Path) -> None:
    episodes = [Episode(((1, 2), (3, 4)), 7), Episode(((5, 6),), 8)]
    write_dataset(tmp_path / "data", episodes)
    found = [content(frame) for frame in frames_of(tmp_path / "data")]
    assert found == [content(tuple(map(picture_of, row))) for row in numbers_of(episodes)]
    dataset, _ = open_dataset("me/data", root=tmp_path / "data")
    assert len({*dataset.identities.tolist()} - {0}) == 2


def test_wrong_guesses_are_refused_all_of_them(tmp_path: Path, shop: Workshop) -> None:
    """Every pair of two frames that differ in a picture: none is taken for the other, whatever the guess says."""
    rows = [(number, number + 1) for number in range(100)]
    write_dataset(tmp_path / "data", [Episode(tuple(rows), 1)])
    shop.extract(tmp_path / "cache.zarr", tmp_path / "data")
    signatures = sign_pictures([np.stack([picture_of(row[view]) for row in rows]) for view in range(VIEWS)])
    refused = 0
    with GeometryStore.open(tmp_path / "cache.zarr") as store:
        caches = EarlierCaches([store])
        index, nothing = PictureIndex.build(caches, tmp_path / "index"), PictureIndex(tmp_path / "none", 0)
        for shift in range(1, len(rows)):
            wrong = np.arange(len(rows) - shift) + shift
            carrier = Carrier(
                caches=caches,
                episode_start=np.arange(len(wrong)),
                guesses=wrong,
                trusted=np.zeros(len(wrong), bool),
                index=nothing,
            )
            carried = carrier.carry(0, signatures[: len(wrong)])
            assert not carried.is_carried.any()
            refused += len(wrong)
            carrier.index = index  # finds the right ones in spite of the guesses
            assert (carrier.carry(0, signatures[: len(wrong)]).places == np.arange(len(wrong))).all()
    assert refused == 99 * 100 // 2
