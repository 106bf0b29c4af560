"""Carry geometry over from earlier caches: find the rows that belong to the same pictures, and read their maps.

The geometry of a frame is a function of its pictures alone, so that a row belongs to pictures, and not to a number. The
signatures of the pictures decide. An index over all rows finds them, wherever they were in the dataset of that time.

Legend of shapes:  n rows   m rows that are carried over   V views   E episodes
A *place* is the number of a row among those of all earlier caches: those of the first cache, then those of the next.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.header import Header
from geomcache.cache.journal import Commit, Journal
from geomcache.cache.manifest import JOURNAL
from geomcache.cache.signatures import Signatures
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.errors import CacheCorruptError
from geomcache.ranges import clip_ranges, count_rows, rows_of

logger = logging.getLogger(__name__)

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, and far from a power of two
_SHARDS_AT_HAND = 4  # whose signatures a decoding process keeps


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Which of n consecutive rows are carried over, and their maps."""

    places: NDArray[np.int64]
    """[n], -1 for a row that has to be encoded."""
    maps: dict[str, NDArray[np.float16]]
    """Output -> [m, V, h, w(, 6)], in the order of the rows. Empty where m is 0."""
    damage: tuple[str, ...] = ()
    """What kept rows from being carried over: files of the earlier cache that are not as they were written."""

    @property
    def is_carried(self) -> NDArray[np.bool_]:
        """Return which rows are carried over, bool [n]."""
        return self.places >= 0


class EarlierCaches:
    """Caches of one spec, as one sequence of places. Pickles by their paths."""

    def __init__(self, stores: Sequence[GeometryStore]) -> None:
        self.stores = tuple(stores)
        ends = np.cumsum([store.dataset.frames for store in self.stores])
        self.first_place = ends - [store.dataset.frames for store in self.stores]  # of each cache, int64

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of the cache, and the row in it, of each place."""
        numbers: NDArray[np.int64] = self.first_place.searchsorted(places, "right") - 1
        return numbers, places - self.first_place[numbers]

    def present(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return for each place, or -1, whether a cache has it, bool [n]."""
        found = np.zeros(len(places), bool)
        for positions, store, rows in self._by_cache(places):
            found[positions] = store.covers(rows)
        return found

    def equal_signatures(
        self, places: NDArray[np.int64], signatures: Signatures
    ) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
        """Compare signatures with those of places.

        Returns:
            For each place, or -1, whether its pictures have these signatures, bool [n]: not where they are damaged, or
            in a cache of schema version 1, which has none. And what is damaged, a line for each file.
        """
        equal, damage = np.zeros(len(places), bool), list[str]()
        for positions, store, rows in self._by_cache(places):
            if store.schema_version == 1:
                continue
            shards = rows // store.shard_frames
            for shard in np.unique(shards).tolist():
                here = shards == shard
                try:
                    held, stored = self._signatures_of_shard(store, shard)
                except CacheCorruptError as error:
                    damage.append(_first_part(error))
                else:
                    equal[positions[here]] = stored[held.searchsorted(rows[here])].equal(signatures[positions[here]])
        return equal, tuple(damage)

    def distances(self, places: NDArray[np.int64], signatures: Signatures) -> NDArray[np.int64]:
        """Return how far these pictures are from those of places, as `Signatures.distances`, [n, V].

        The places are of caches of schema version 2, which have them.
        """
        distances = np.empty(signatures.hashes.shape, np.int64)
        for positions, store, rows in self._by_cache(places):
            distances[positions] = signatures[positions].distances(store.signatures(rows))
        return distances

    def read(
        self, places: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[np.float16]], NDArray[np.bool_], tuple[str, ...]]:
        """Read the maps of places that the caches have.

        Returns:
            Output -> [m, V, h, w(, 6)] of those that are as they were written; which of the n these are, bool [n]; and
            what is wrong with the others, a line for each file.
        """
        good, damage = np.ones(len(places), bool), dict[str, None]()
        spec = self.stores[0].spec
        shapes = {name: (len(places), len(spec.cameras), *spec.map_shape(name)) for name in spec.outputs}
        maps = {name: np.empty(shape, np.float16) for name, shape in shapes.items()}

        def fill(store: GeometryStore, positions: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
            for name, values in store.batch(rows).items():
                maps[name][positions] = values

        for positions, store, rows in self._by_cache(places):
            try:
                fill(store, positions, rows)
            except CacheCorruptError:
                for position, row in zip(positions[:, None], rows[:, None], strict=True):
                    try:
                        fill(store, position, row)
                    except CacheCorruptError as error:
                        good[position] = False
                        damage[_first_part(error)] = None
        return {name: values[good] for name, values in maps.items()}, good, tuple(damage)

    def find_shard(self, places: NDArray[np.int64], claim: Claim, shard_frames: int) -> tuple[int, Commit] | None:
        """Return the number of the cache, and the record of its shard, that has the maps of a whole claim.

        Args:
            places: of the claim's rows, or -1, in order.
            claim: a shard and its rows.
            shard_frames: K of the claim's cache, whose codec is that of the first of these caches.

        Returns:
            None where the rows are not all of one shard, at the same places in it.
        """
        starts = places - (rows_of(claim.rows) - claim.shard * shard_frames)
        if (places < 0).any() or (starts != starts[0]).any():
            return None
        number = int(self.locate(places[:1])[0][0])
        first_row = int(starts[0] - self.first_place[number])
        store = self.stores[number]
        same_cut = store.shard_frames == shard_frames and store.codec == self.stores[0].codec
        if not same_cut or first_row < 0 or first_row % shard_frames:
            return None
        commit = self._journals[number].commits.get(first_row // shard_frames)
        return (number, commit) if commit and count_rows(commit.rows) == len(places) else None

    @functools.cached_property
    def _journals(self) -> tuple[Journal, ...]:
        """The caches' journals: a manifest does not have the statistics of each shard."""
        journals = []
        for store in self.stores:
            header = Header.read(store.path)
            journals.append(Journal(store.path / JOURNAL, header.layout, header.fingerprint))
            journals[-1].read()
        return tuple(journals)

    def _by_cache(self, places: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], GeometryStore, NDArray[np.int64]]]:
        """Return by cache the positions of the places that are not -1, the cache, and the rows in it."""
        positions = np.flatnonzero(places >= 0)
        numbers, rows = self.locate(places[positions])
        return [
            (positions[numbers == number], self.stores[number], rows[numbers == number])
            for number in np.unique(numbers).tolist()
        ]

    @functools.cached_property
    def _signatures_of_shard(self) -> "Callable[[GeometryStore, int], tuple[NDArray[np.int64], Signatures]]":
        @functools.lru_cache(maxsize=_SHARDS_AT_HAND)
        def read(store: GeometryStore, shard: int) -> tuple[NDArray[np.int64], Signatures]:
            """Return the rows that a shard has, and their signatures."""
            rows = _rows_of_shard(store, shard)
            return rows, store.signatures(rows)

        return read

    def __getstate__(self) -> dict[str, Any]:
        return {"stores": self.stores, "first_place": self.first_place}


def _rows_of_shard(store: GeometryStore, shard: int) -> NDArray[np.int64]:
    start = shard * store.shard_frames
    return rows_of(clip_ranges(store.rows, start, start + store.shard_frames))


def _first_part(error: CacheCorruptError) -> str:
    """Return the message without its advice, which is not for a cache that is being replaced."""
    return str(error).partition(": the file is damaged")[0]


class PictureIndex:
    """Finds the places of pictures by their hashes: sorted, 16 bytes a row, in a file that decoding processes share."""

    def __init__(self, file: Path, count: int) -> None:
        self._file, self._count = file, count

    @classmethod
    def build(cls, caches: EarlierCaches, file: Path, begin: int = 0) -> Self:
        """Index the rows that the caches from number `begin` on have, except those whose hashes are damaged.

        That is logged. Caches of schema version 1 have no hashes, and so no place in the index.
        """
        keys: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        places: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for store, first in zip(caches.stores[begin:], caches.first_place[begin:].tolist(), strict=True):
            shards = range(-(-store.dataset.frames // store.shard_frames)) if store.schema_version >= 2 else range(0)
            for shard in shards:
                rows = _rows_of_shard(store, shard)
                try:
                    keys.append(_as_keys(store.picture_hashes(rows)))
                except CacheCorruptError as error:
                    log_damage(_first_part(error))
                else:
                    places.append(first + rows)
        all_keys, all_places = np.concatenate(keys), np.concatenate(places)
        order = np.argsort(all_keys, kind="stable")  # so that places of equal keys ascend
        with file.open("wb") as stream:
            stream.write(all_keys[order].tobytes())
            stream.write(all_places[order].tobytes())
        return cls(file, len(order))

    def find(self, hashes: NDArray[np.uint64], expected: NDArray[np.int64]) -> NDArray[np.int64]:
        """Look up pictures; where several places have them, prefer the expected one.

        Args:
            hashes: of the pictures of each row, [n, V].
            expected: a place for each row, or -1, [n].

        Returns:
            A place whose key is that of the pictures, or -1, [n]. Signatures must still be compared: keys are shorter.
        """
        if not self._count:
            return np.full(len(hashes), -1, np.int64)
        keys, places = self._arrays
        wanted = _as_keys(hashes)
        left, right = keys.searchsorted(wanted, "left"), keys.searchsorted(wanted, "right")
        found = np.where(left < right, places[np.minimum(left, self._count - 1)], -1)
        for position in np.flatnonzero(right - left > 1).tolist():
            same = places[left[position] : right[position]]
            nearest = min(int(same.searchsorted(expected[position])), len(same) - 1)
            if same[nearest] == expected[position]:
                found[position] = expected[position]
        return found

    @functools.cached_property
    def _arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The keys, sorted, and the place of each."""
        keys = np.memmap(self._file, "<u8", "r", 0, (self._count,))
        return keys, np.memmap(self._file, "<i8", "r", 8 * self._count, (self._count,))

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_count": self._count}


def _as_keys(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a number for the hashes of all views of a frame, in their order: [n, V] -> [n]."""
    keys = np.zeros(len(hashes), np.uint64)
    for view in hashes.T:
        keys = keys * _MULTIPLIER + view  # modulo 2^64
    return keys


@dataclass(kw_only=True)
class Carrier:
    """Says which rows of a new cache are carried over from earlier ones. Decoding processes get a copy of it."""

    caches: EarlierCaches
    episode_start: NDArray[np.int64]
    """Of the new dataset, [E]."""
    guesses: NDArray[np.int64]
    """The place that the first frame of each episode of the new dataset is expected at, or -1, [E]."""
    trusted: NDArray[np.bool_]
    """Episodes whose frames are taken from the expected places although their signatures are others, or are not known,
    [E]."""
    index: PictureIndex
    """Where else pictures are looked for than at the expected places."""

    def expected(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the place that each row of the new dataset is expected at; -1 where there is none, int64 [n]."""
        episodes = self.episode_start.searchsorted(rows, "right") - 1
        first = self.guesses[episodes]
        places = np.where(first < 0, -1, first + rows - self.episode_start[episodes])
        return np.where(self.caches.present(places), places, -1)

    def carry(self, start: int, signatures: Signatures) -> Carried:
        """Find the rows from `start` on whose pictures have these signatures, and read their maps."""
        rows = np.arange(start, start + len(signatures))
        expected = self.expected(rows)
        found = self.index.find(signatures.hashes, expected)
        places = np.where(found < 0, expected, found)
        equal, damage = self.caches.equal_signatures(places, signatures)
        trusted = self.trusted[self.episode_start.searchsorted(rows, "right") - 1]
        places = np.where(equal, places, np.where(trusted, expected, -1))
        is_carried = places >= 0
        if not is_carried.any():
            return Carried(places=places, maps={}, damage=damage)
        maps, good, unreadable = self.caches.read(places[is_carried])
        places[np.flatnonzero(is_carried)[~good]] = -1
        return Carried(places=places, maps=maps if good.any() else {}, damage=(*damage, *unreadable))

    def adopt(
        self,
        writer: StoreWriter,
        claim: Claim,
        places: NDArray[np.int64],
        signatures: Signatures,
        *,
        check_content: bool = True,
    ) -> int:
        """Make a shard of an earlier cache's files, if these have all of its rows at the same places in a shard.

        Args:
            writer: of the new cache.
            claim: the shard and its rows.
            places: that the rows are carried over from, or -1, [n].
            signatures: of the rows' pictures, [n].
            check_content: compare the files with their hashes; otherwise with their sizes alone.

        Returns:
            The bytes of its files; 0 where its maps have to be written instead.
        """
        found = self.caches.find_shard(places, claim, writer.shard_frames)
        if found is None:
            return 0
        number, commit = found
        try:
            path = self.caches.stores[number].path
            return writer.adopt(claim, path, commit, signatures, check_content=check_content)
        except CacheCorruptError as error:
            log_damage(_first_part(error))
            return 0

    def adopt_unseen(self, writer: StoreWriter, claim: Claim) -> int:
        """Make a shard of an earlier cache's files where its rows are expected there, without a look at their content.

        Returns:
            The bytes of its files; 0 where the pictures have to be decoded.
        """
        places = self.expected(rows_of(claim.rows))
        if (found := self.caches.find_shard(places, claim, writer.shard_frames)) is None:
            return 0
        store = self.caches.stores[found[0]]
        try:
            signatures = store.signatures(self.caches.locate(places)[1])
        except CacheCorruptError as error:
            log_damage(_first_part(error))
            return 0
        return self.adopt(writer, claim, places, signatures, check_content=False)


@functools.cache
def log_damage(problem: str) -> None:
    """Say once that a file of an earlier cache is damaged."""
    logger.warning("%s: damaged: its frames are encoded anew", problem)
