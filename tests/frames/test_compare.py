"""Which episodes differ from those of a cache, and in what; pictures compared with their signatures."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError
from geomcache.frames.compare import (
    EpisodeDifferences,
    check_pictures,
    check_watched,
    choose_sample,
    compare_episodes,
    find_differences,
    is_watched,
)
from geomcache.frames.signature import sign_pictures
from tests.support.logs import logged_lines
from tests.support.stores import CAMERAS, LENGTHS, claim_rows, make_identities, make_maps, make_spec, open_writer

Table = tuple[NDArray[np.int64], NDArray[np.uint64]]


def table(*episodes: tuple[int, int]) -> Table:
    """Episodes of these (length, identity)."""
    return np.array([each[0] for each in episodes], np.int64), np.array([each[1] for each in episodes], np.uint64)


def differences(cached: Table, current: Table, episodes: list[int] | None = None) -> EpisodeDifferences:
    return find_differences(cached, current, np.array(range(len(current[0])) if episodes is None else episodes))


CACHED = table((5, 11), (5, 12), (4, 13), (5, 14))


@pytest.mark.parametrize(
    ("current", "kind", "episodes", "rows"),
    [
        (table((5, 12), (5, 11), (4, 13), (5, 14)), "order", [0, 1], 10),
        (table((5, 11), (4, 13), (5, 14)), "order", [1, 2], 9),  # episode 1 was deleted
        (table((5, 11), (5, 12), (4, 13), (5, 15)), "content", [3], 5),
        (table((5, 11), (5, 12), (6, 16), (5, 14)), "length", [2], 6),
        (table((5, 11), (5, 12), (6, 16), (5, 14)), "order", [3], 5),  # which begins later now
        (table((5, 11), (5, 12), (4, 13), (5, 14), (7, 17)), "new", [4], 7),
        (table((5, 11), (5, 0), (4, 13), (5, 14)), "unknown", [1], 0),
        (table((5, 11), (6, 0), (4, 13)), "length", [1], 6),
    ],
)
def test_what_differs_is_named(current: Table, kind: str, episodes: list[int], rows: int) -> None:
    found = differences(CACHED, current)
    assert getattr(found, kind).tolist() == episodes
    assert found.rows >= rows
    only = differences(CACHED, current, episodes)
    assert only.rows == rows
    assert (kind in only.describe()) == (rows > 0)


def test_only_the_episodes_that_are_read_count() -> None:
    grown_and_changed = table((5, 11), (5, 12), (4, 13), (5, 19), (7, 17))
    assert differences(CACHED, grown_and_changed, [0, 1, 2]).rows == 0
    assert differences(CACHED, grown_and_changed).rows == 12


episodes_of = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=8
)  # few lengths and identities: many coincide


@settings(max_examples=1000, deadline=None)
@given(episodes_of, st.data())
def test_no_wrong_row_is_ever_taken(cached: list[tuple[int, int]], data: st.DataObject) -> None:
    """An edited dataset: what is not named has, row by row, the episode that the cache has there."""
    edited = list(cached)
    for _ in range(data.draw(st.integers(0, 4))):
        edit = data.draw(st.sampled_from(["swap", "delete", "insert", "replace", "shuffle"]))
        position = data.draw(st.integers(0, len(edited) - 1))
        new = data.draw(st.tuples(st.integers(1, 3), st.integers(0, 9)))
        if edit == "swap":
            other = data.draw(st.integers(0, len(edited) - 1))
            edited[position], edited[other] = edited[other], edited[position]
        elif edit == "delete" and len(edited) > 1:
            del edited[position]
        elif edit == "insert":
            edited.insert(position, new)
        elif edit == "replace":
            edited[position] = new
        else:
            edited = data.draw(st.permutations(edited))
    found = differences(table(*cached), table(*edited))
    refused = {*found.order, *found.length, *found.content, *found.new}
    in_cache = [(episode, frame) for episode in cached for frame in range(episode[0])]
    row = 0
    for number, episode in enumerate(edited):
        for frame in range(episode[0]):
            if number not in refused:
                held, held_frame = in_cache[row]
                assert (held[0], held_frame) == (episode[0], frame)
                assert held[1] == episode[1] or number in found.unknown  # which the pictures decide
                assert number not in found.unknown or 0 in (held[1], episode[1])
            row += 1
    if edited == cached:
        assert found.rows == 0


def pictures(row: int) -> list[NDArray[np.uint8]]:
    return [np.random.default_rng((row, view)).integers(0, 250, (12, 16, 3), np.uint8) for view in range(2)]


@pytest.fixture
def store(tmp_path: Path) -> GeometryStore:
    spec = make_spec()
    with open_writer(tmp_path / "cache") as writer:
        while (claim := writer.claim()) is not None:
            rows = claim_rows(claim)
            views = [np.stack(view) for view in zip(*map(pictures, rows), strict=True)]
            writer.commit(claim, make_maps(spec, rows), sign_pictures(views))
        assert writer.seal()
    return GeometryStore.open(tmp_path / "cache")


def test_the_stores_episodes_are_compared(store: GeometryStore) -> None:
    lengths, identities = np.array(LENGTHS), make_identities()
    assert compare_episodes(store, "me/data", (lengths, identities)).describe() == ""
    swapped = identities[[0, 1, 3, 2]]
    with pytest.raises(CacheMismatchError) as caught:
        compare_episodes(store, "me/data", (lengths[[0, 1, 3, 2]], swapped))
    for part in ("me/data", str(store.path), "order: episodes 2:4", "40 frames"):
        assert part in str(caught.value)
    compare_episodes(store, "me/data", (lengths[[0, 1, 3, 2]], swapped), [0, 1])


def test_the_sample_has_a_frame_of_each_episode(store: GeometryStore) -> None:
    for seed in range(20):
        rows = choose_sample(store, seed=seed)
        assert {store.locate(row)[0] for row in rows.tolist()} == {0, 1, 2, 3}
        assert 4 < len(rows) == len({*rows.tolist()}) <= 8
    assert {store.locate(int(row))[0] for row in choose_sample(store, [2])} == {2}


def test_pictures_are_compared_with_their_signatures(store: GeometryStore) -> None:
    rows = choose_sample(store)
    assert check_pictures(store, pictures, rows, decoder="pyav") == len(rows)
    with pytest.raises(CacheMismatchError) as caught:
        check_pictures(store, lambda row: [255 - picture for picture in pictures(row)], rows[:1], decoder="pyav")
    episode, frame = store.locate(int(rows[0]))
    for part in (f"episode {episode} frame {frame}", f"content: episodes {episode}", str(store.path)):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("decoder", "cause"),
    [
        ("image", "encoding (the pictures were encoded again)"),
        ("pyav", "decoder (image decoded them for the cache, pyav"),
    ],
)
def test_another_decoder_or_encoding_is_taken_and_said(store: GeometryStore, decoder: str, cause: str) -> None:
    """Which make a level more of every block."""
    assert store.dataset.decoder == "image"
    rows = np.array([3, 7, 60])
    with logged_lines() as lines:
        check_pictures(store, lambda row: [picture + (row > 3) for picture in pictures(row)], rows, decoder=decoder)
    (line,) = lines
    for part in ("2 of 3 sampled frames", cause, "episodes 0, 2", "at most 1 of 255"):
        assert part in line


def test_pictures_of_another_place_are_told_from_other_pictures(store: GeometryStore) -> None:
    """Rows 0 to 19 and 20 to 49 are the first two episodes: 3 now has the pictures of 23, and 25 has new ones."""

    def read(row: int) -> list[NDArray[np.uint8]]:
        return pictures({3: 23, 25: 1000}.get(row, row))

    with pytest.raises(CacheMismatchError) as caught:
        check_pictures(store, read, np.array([1, 3, 25, 60]), decoder="pyav")
    for part in ("order: episodes 0; content: episodes 1", "2 of 4 compared frames", "50 frames", "episode 0 frame 3"):
        assert part in str(caught.value)


def test_only_watched_rows_are_read(store: GeometryStore) -> None:
    rows = np.arange(90)
    read: list[int] = []

    def reads(row: int) -> list[NDArray[np.uint8]]:
        read.append(row)
        return pictures(row)

    check_watched(store, reads, rows)
    assert read == rows[is_watched(rows)].tolist() == [0]
    with pytest.raises(CacheMismatchError):
        check_watched(store, lambda _: pictures(1), rows)


def test_one_wrong_camera_is_named(store: GeometryStore) -> None:
    with pytest.raises(CacheMismatchError) as caught:
        check_pictures(store, lambda row: [pictures(row)[0], pictures(row + 1)[1]], np.array([7]), decoder="pyav")
    assert CAMERAS[1] in str(caught.value)


def test_a_slow_dataset_is_sampled_for_as_long_as_it_may(store: GeometryStore) -> None:
    assert check_pictures(store, pictures, choose_sample(store), decoder="pyav", seconds=-1) == 1
