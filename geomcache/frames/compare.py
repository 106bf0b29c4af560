"""Compare the episodes and the pictures of a dataset with those that a cache was made of.

The pictures' signatures decide. Identities of episodes, which the dataset's metadata give without a look at a picture,
say at once what has changed, and where.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.commands import update_command
from geomcache.cache.signatures import TOLERANCE, Signatures
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError
from geomcache.frames.signature import sign_pictures
from geomcache.ranges import format_ranges

logger = logging.getLogger(__name__)

SAMPLED_EPISODES, SAMPLE_S = 500, 20.0
_SAMPLED_ROWS = 8  # at least, where the episodes have as many
_SEARCH_S = 10.0  # for pictures in other episodes of the cache, once some are wrong

Pictures = Sequence[NDArray[np.uint8]]
"""The pictures of one row, [H, W, 3] of each view."""


@dataclass(frozen=True, kw_only=True)
class EpisodeDifferences:
    """Episodes of a dataset that are not those of a cache at the same place, by kind: ascending numbers, [n] each."""

    order: NDArray[np.int64]
    """Episodes that the cache has at another place."""
    length: NDArray[np.int64]
    """Episodes of another length than the cache's of this number."""
    content: NDArray[np.int64]
    """Episodes of the same length with other pictures."""
    new: NDArray[np.int64]
    """Episodes behind the cache's last one."""
    unknown: NDArray[np.int64]
    """Episodes of the right length whose metadata do not tell them from others. No difference by itself."""
    rows: int
    """Frames of the first four kinds together."""

    def describe(self) -> str:
        """Return what differs, in words; empty if nothing does."""
        kinds = {"order": self.order, "length": self.length, "content": self.content, "new": self.new}
        return "; ".join(f"{kind}: episodes {_listed(numbers)}" for kind, numbers in kinds.items() if len(numbers))


def _listed(numbers: NDArray[np.int64]) -> str:
    text = format_ranges(numbers).replace(",", ", ")
    return text if len(text) <= 60 else f"{text[:57]}..."


def find_differences(
    cached: tuple[NDArray[np.int64], NDArray[np.uint64]],
    current: tuple[NDArray[np.int64], NDArray[np.uint64]],
    episodes: NDArray[np.int64],
) -> EpisodeDifferences:
    """Compare episodes of a dataset with those of a cache at the same place.

    Args:
        cached: lengths and identities of the cache's episodes, [E] each.
        current: the same of the dataset.
        episodes: the ones to compare, ascending, [n].
    """
    (cached_lengths, cached_identities), (lengths, identities) = cached, current
    cached_starts, starts = np.cumsum(cached_lengths) - cached_lengths, np.cumsum(lengths) - lengths
    known = np.isin(identities[episodes], cached_identities) & (identities[episodes] != 0)
    kinds: dict[str, list[int]] = {kind: [] for kind in ("order", "length", "content", "new", "unknown")}
    for episode, in_cache in zip(episodes.tolist(), known.tolist(), strict=True):
        if episode >= len(cached_lengths):
            kinds["order" if in_cache else "new"].append(episode)
            continue
        same_length = cached_lengths[episode] == lengths[episode]
        in_place = same_length and cached_starts[episode] == starts[episode]
        compared = identities[episode] != 0 and cached_identities[episode] != 0
        if compared and in_place and identities[episode] == cached_identities[episode]:
            continue
        if in_cache and (compared or not in_place):
            kinds["order"].append(episode)
        elif not same_length:
            kinds["length"].append(episode)
        elif compared:
            kinds["content"].append(episode)
        else:
            kinds["unknown" if in_place else "order"].append(episode)
    numbers = {kind: np.array(each, np.int64) for kind, each in kinds.items()}
    differing = [each for kind, each in numbers.items() if kind != "unknown"]
    return EpisodeDifferences(**numbers, rows=int(lengths[np.concatenate(differing)].sum()))


def map_episodes(
    cached: tuple[NDArray[np.int64], NDArray[np.uint64]], current: tuple[NDArray[np.int64], NDArray[np.uint64]]
) -> NDArray[np.int64]:
    """Guess which of a cache's episodes each episode of a dataset is: the one of its identity, equal ones in order.

    An episode whose identity the cache does not have is taken for the cache's of the same number, if that has its
    length and is no other's. Only pictures tell whether a guess is right.

    Args:
        cached: lengths and identities of the cache's episodes, [E] each.
        current: the same of the dataset.

    Returns:
        Numbers of the cache's episodes, -1 where there is none, int64 [E] of the dataset.
    """
    (cached_lengths, cached_identities), (lengths, identities) = cached, current
    places: dict[int, list[int]] = {}
    for number, identity in reversed([*enumerate(cached_identities.tolist())]):
        if identity:
            places.setdefault(identity, []).append(number)
    guesses = np.array([places[each].pop() if places.get(each) else -1 for each in identities.tolist()], np.int64)
    both = np.arange(min(len(lengths), len(cached_lengths)))
    is_free = ~np.isin(both, guesses)
    at_its_place = both[is_free & (guesses[both] < 0) & (lengths[both] == cached_lengths[both])]
    guesses[at_its_place] = at_its_place
    return guesses


def compare_episodes(
    store: GeometryStore,
    repo_id: str,
    current: tuple[NDArray[np.int64], NDArray[np.uint64]],
    episodes: Sequence[int] | None = None,
    root: Path | str | None = None,
) -> EpisodeDifferences:
    """Require that episodes of a dataset are those that a cache was made of, as far as metadata tell.

    Args:
        store: a cache of schema version 2.
        repo_id: the dataset's name, for the message.
        current: lengths and identities of the dataset's episodes, [E] each.
        episodes: the ones that will be read; None for all.
        root: folder of a local dataset, for the command in the message.

    Returns:
        No differences but unknown episodes.

    Raises:
        CacheMismatchError: episodes differ; the message names which, and in what.
    """
    wanted = np.arange(len(current[0])) if episodes is None else np.unique(np.asarray(episodes, np.int64))
    assert store.episode_identity is not None
    differences = find_differences((store.episode_length, store.episode_identity), current, wanted)
    if differences.rows:
        remedy = _remedy(update_command(store.path, repo_id, root))
        raise CacheMismatchError(
            f"dataset {repo_id}: expected the episodes that cache {store.path} was made of, found others in"
            f" {differences.describe()} ({differences.rows} frames): {remedy}",
            "dataset.episodes",
            store.dataset.identities_sha256,
            differences.describe(),
        )
    return differences


def choose_sample(store: GeometryStore, episodes: Sequence[int] | None = None, seed: int = 0) -> NDArray[np.int64]:
    """Return a row of each of at most 500 episodes that the cache has, spread over all, in random order.

    Where there are few episodes, up to 8 rows together.

    Args:
        store: the cache.
        episodes: the ones to choose from; None for all.
        seed: of the choice.
    """
    chosen = np.arange(len(store.episode_start)) if episodes is None else np.unique(np.asarray(episodes, np.int64))
    first = np.array([store.covers(store.episode_start[chosen])]).reshape(-1)
    chosen = chosen[first]
    if len(chosen) > SAMPLED_EPISODES:
        chosen = chosen[np.linspace(0, len(chosen) - 1, SAMPLED_EPISODES).astype(np.int64)]
    generator = np.random.default_rng(seed)
    rounds = max(1, _SAMPLED_ROWS // max(1, len(chosen)))
    chosen = np.tile(chosen, rounds)
    rows = store.episode_start[chosen] + generator.integers(0, store.episode_length[chosen])
    rows = np.where(store.covers(rows), rows, store.episode_start[chosen])  # a cache may have parts of an episode
    shuffled: NDArray[np.int64] = generator.permutation(np.unique(rows))
    return shuffled


def is_watched(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each row whether its pictures are compared whenever training reads it: 1 in 256, spread evenly.

    Multiplied by 2^64 over the golden ratio, numbers in a row spread evenly over 64 bits (Knuth, The Art of Computer
    Programming, volume 3, 6.4): the first 8 bits choose.
    """
    spread = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    watched: NDArray[np.bool_] = spread >> np.uint64(56) == 0
    return watched


def check_pictures(
    store: GeometryStore,
    read: Callable[[int], Pictures],
    rows: NDArray[np.int64],
    *,
    decoder: str,
    command: str | None = None,
    seconds: float = SAMPLE_S,
) -> int:
    """Compare the pictures of rows with the signatures of those that the cache was made of.

    Pictures that differ by no more than another decoder or encoding makes them differ are taken, and said.

    Args:
        store: a cache of schema version 2.
        read: decodes the pictures of a row, in the order of the cache's views.
        rows: the ones to compare, int64 [n].
        decoder: what `read` decodes with: ``pyav``, ``torchcodec`` or ``image``.
        command: that lets the cache follow the dataset, for the message; None for the one on the cache's own dataset.
        seconds: after which the rest of the rows is left out.

    Returns:
        How many rows were compared.

    Raises:
        CacheMismatchError: pictures are other ones; the message says which episodes, in what, and names a frame.
    """
    compared = compare_pictures(store, read, rows, rows, seconds)
    if len(compared.others):
        raise _other_pictures(store, compared, command)
    differing = compared.rows[compared.differing]
    if len(differing):
        episodes = np.unique([store.locate(row)[0] for row in differing.tolist()])
        logger.info(
            "cache %s: %d of %d sampled frames differ in %s, in episodes %s: block means by at most %d of 255, so"
            " that the geometry still fits",
            store.path,
            len(differing),
            len(compared.rows),
            _name_cause(store.dataset.decoder, decoder),
            _listed(episodes),
            compared.distances.max(),
        )
    return len(compared.rows)


def check_watched(
    store: GeometryStore, read: Callable[[int], Pictures], rows: NDArray[np.int64], command: str | None = None
) -> None:
    """Compare the pictures of the watched ones of these rows, like `check_pictures`, and say nothing if they fit.

    Raises:
        CacheMismatchError: pictures are other ones.
    """
    watched = rows[is_watched(rows)]
    if len(watched) and len((compared := compare_pictures(store, read, watched, watched, float("inf"))).others):
        raise _other_pictures(store, compared, command)


@dataclass(frozen=True, kw_only=True)
class ComparedPictures:
    """Pictures of some rows, next to those that a cache was made of."""

    rows: NDArray[np.int64]
    """[n] of the dataset."""
    signatures: Signatures
    """[n] of the pictures that were read."""
    differing: NDArray[np.bool_]
    """[n] whether a hash is another one."""
    distances: NDArray[np.int64]
    """[n, V] as `Signatures.distances`."""

    @property
    def others(self) -> NDArray[np.int64]:
        """Return the numbers, in `rows`, of those that are other pictures."""
        return np.flatnonzero(self.distances.max(axis=1, initial=0) > TOLERANCE)


def compare_pictures(
    store: GeometryStore,
    read: Callable[[int], Pictures],
    rows: NDArray[np.int64],
    stored_rows: NDArray[np.int64],
    seconds: float = SAMPLE_S,
) -> ComparedPictures:
    """Compare the pictures of rows of a dataset with the signatures of rows that a cache has.

    Args:
        store: a cache of schema version 2.
        read: decodes the pictures of a row, in the order of the cache's views.
        rows: of the dataset, int64 [n].
        stored_rows: of the cache, int64 [n].
        seconds: after which the rest of the rows, but for the first one, is left out.
    """
    end, parts = time.monotonic() + seconds, list[Signatures]()
    for row in rows.tolist():
        if parts and time.monotonic() > end:
            break
        parts.append(sign_pictures([picture[None] for picture in read(row)]))
    done = rows[: len(parts)]
    expected = store.signatures(stored_rows[: len(parts)])
    signatures = Signatures.empty(len(done), len(store.spec.cameras))
    for number, part in enumerate(parts):
        signatures[number : number + 1] = part
    return ComparedPictures(
        rows=done,
        signatures=signatures,
        differing=~signatures.equal(expected),
        distances=signatures.distances(expected),
    )


def _name_cause(of_cache: str, now: str) -> str:
    if of_cache == now:
        return "encoding (the pictures were encoded again)"
    return f"decoder ({of_cache} decoded them for the cache, {now} does now) or encoding"


def _remedy(command: str) -> str:
    return f"use the dataset that the cache was made of, or let the cache follow this one with `{command}`"


def _other_pictures(store: GeometryStore, compared: ComparedPictures, command: str | None) -> CacheMismatchError:
    others, rows = compared.others, compared.rows[compared.others]
    episodes = np.array([store.locate(row)[0] for row in rows.tolist()])
    elsewhere = _is_elsewhere(store, compared.signatures[others])
    kinds = {"order": episodes[elsewhere], "content": np.setdiff1d(episodes, episodes[elsewhere])}
    which = "; ".join(f"{kind}: episodes {_listed(np.unique(of))}" for kind, of in kinds.items() if len(of))
    affected = int(store.episode_length[np.unique(episodes)].sum())
    episode, frame = store.locate(int(rows[0]))
    view = int(compared.distances[others[0]].argmax())
    distance = int(compared.distances[others[0], view])
    command = command or update_command(store.path, store.dataset.repo_id)
    return CacheMismatchError(
        f"dataset: expected the pictures that cache {store.path} was made of, found others in {which} ({len(others)} of"
        f" {len(compared.rows)} compared frames, of episodes with {affected} frames), first in episode {episode} frame"
        f" {frame} camera {store.spec.camera_keys[view]}: block means differ by {distance} of 255, another decoder or"
        f" encoding makes at most {TOLERANCE}: {_remedy(command)}",
        "pictures",
        None,
        distance,
    )


def _is_elsewhere(store: GeometryStore, signatures: Signatures) -> NDArray[np.bool_]:
    """Return for each of these frames whether the cache has just these pictures somewhere, bool [n].

    The search ends after `_SEARCH_S`: in a cache of many millions of frames some may then not be found.
    """
    found, end = np.zeros(len(signatures), bool), time.monotonic() + _SEARCH_S
    for start, stop in store.rows:
        for first in range(start, stop, store.shard_frames):
            if found.all() or time.monotonic() > end:
                return found
            cached = store.signatures(np.arange(first, min(first + store.shard_frames, stop)))
            found |= np.isin(signatures.hashes, cached.hashes).all(axis=1)
    return found
