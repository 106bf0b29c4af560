"""Find what has changed between a cache and its dataset: which episodes it has, where, and what is encoded again."""

import contextlib
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geomcache.cache.compatibility import compare_cameras, compare_datasets
from geomcache.cache.header import Header
from geomcache.cache.layout import keep_shard_frames
from geomcache.cache.manifest import MANIFEST
from geomcache.cache.signatures import TOLERANCE
from geomcache.cache.store import GeometryStore
from geomcache.errors import CacheMismatchError, UserInputError
from geomcache.extraction.options import UpdateOptions
from geomcache.extraction.run_config import recorded_run
from geomcache.frames.compare import (
    choose_sample,
    compare_pictures,
    map_episodes,
)
from geomcache.frames.of_cache import reads_pictures
from geomcache.frames.reader import FrameReader
from geomcache.frames.signature import sign_pictures
from geomcache.frames.source import (
    FrameDataset,
    describe_cameras,
    describe_dataset,
    episode_identities,
    episode_lengths,
    open_dataset,
    open_metadata,
)
from geomcache.geometry import DatasetSpec
from geomcache.pipeline.carry import Carrier, EarlierCaches, PictureIndex
from geomcache.pipeline.decoding import BatchDecoder
from geomcache.pipeline.pipeline import Machinery
from geomcache.pipeline.workers import decode
from geomcache.ranges import (
    Ranges,
    RowSet,
    common_ranges,
    format_ranges,
    merge_ranges,
    rows_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A cache, and the dataset that it is to follow."""

    path: Path
    store: GeometryStore
    """The cache as it is."""
    header: Header
    """Its header."""
    dataset: FrameDataset
    """As it is now."""
    wanted: Ranges
    """Rows of the dataset that the new cache is to have."""
    guesses: NDArray[np.int64]
    """Row of the cache that the first frame of each of the dataset's episodes is expected at, or -1, [E]."""
    trusted: NDArray[np.bool_]
    """Episodes that are taken from there, whatever their signatures are, [E]."""

    @functools.cached_property
    def new_header(self) -> Header:
        """Return the header of the new cache."""
        spec, dataset = self.store.spec, self.dataset.spec
        shard_frames = keep_shard_frames(self.store.shard_frames, spec, dataset.frames)
        return Header.new(spec, dataset, self.header.codec, shard_frames)

    def carrier(self, caches: EarlierCaches, index: PictureIndex) -> Carrier:
        """Return what finds the rows in this cache, the first of `caches`, and in the others."""
        starts = self.dataset.reader.episode_start
        return Carrier(caches=caches, episode_start=starts, guesses=self.guesses, trusted=self.trusted, index=index)

    def wanted_episodes(self) -> NDArray[np.int64]:
        """Return the numbers of the dataset's episodes that have wanted rows."""
        starts = self.dataset.reader.episode_start
        bounds = np.array(self.wanted, np.int64).reshape(-1, 2)
        first, last = starts.searchsorted(bounds[:, 0], "right") - 1, starts.searchsorted(bounds[:, 1] - 1, "right") - 1
        return np.unique(rows_of(zip(first.tolist(), (last + 1).tolist(), strict=True)))

    def is_as_it_was(self) -> bool:
        """Return whether the cache at the path is the one that was opened, with the same rows."""
        if Header.read(self.path) != self.header:
            return False
        with GeometryStore.open(self.path) as store:
            return store.rows == self.store.rows


def find_change(options: UpdateOptions, path: Path, store: GeometryStore, header: Header) -> Change:
    """Open the dataset as it is now, and guess which of its episodes the cache has."""
    name, root = _choose_dataset(options, store)
    keys = store.spec.camera_keys
    meta = open_metadata(name, root, options.revision)
    compare_cameras(store.spec, describe_cameras(meta))
    current = episode_lengths(meta), episode_identities(meta, keys)
    if store.episode_identity is None:
        _compare_version_1(store, describe_dataset(meta, keys, schema_version=1))
        mapping: NDArray[np.int64] = np.arange(len(current[0]))
    else:
        mapping = map_episodes((store.episode_length, store.episode_identity), current)
    dataset, episodes = open_dataset(
        name,
        root=root,
        revision=options.revision,
        cameras=keys,
        episodes=options.episodes or _choose_episodes(store, mapping),
        tolerance_s=options.tolerance_s,
        meta=meta,
    )
    return Change(
        path=path,
        store=store,
        header=header,
        dataset=dataset,
        wanted=merge_ranges(dataset.rows(episodes)),
        guesses=np.where(mapping < 0, -1, store.episode_start[mapping]),
        trusted=np.full(len(mapping), store.episode_identity is None),
    )


def _choose_dataset(options: UpdateOptions, store: GeometryStore) -> tuple[str, Path | None]:
    """Return name and folder of the dataset; where none is named, those that the cache was made of."""
    if options.dataset is not None or options.root is not None:
        return options.dataset or store.dataset.repo_id, options.root
    folder = recorded_run(store.path).get("root")
    where = f" in {folder}" if folder else ""
    logger.info(
        "dataset: %s%s, which the cache was made of; choose another with --dataset", store.dataset.repo_id, where
    )
    return store.dataset.repo_id, Path(folder) if folder else None


def _compare_version_1(store: GeometryStore, dataset: DatasetSpec) -> None:
    """Require that a dataset is the one that a cache without signatures was made of."""
    try:
        compare_datasets(store.dataset, dataset)
    except CacheMismatchError as error:
        raise CacheMismatchError(
            f"{store.path}: {error.field}: expected {error.cached}, as the dataset had that the cache was made of,"
            f" found {error.wanted}: a cache of schema version 1 has no signatures of pictures; update it with the"
            " dataset as it was (--root, --revision), then with the one that has changed",
            error.field,
            error.cached,
            error.wanted,
        ) from None
    logger.info(
        "%s: schema version 1 has no signatures of pictures: its rows are taken for those of this dataset because"
        " names, lengths and statistics agree; `geomcache verify --parity 32` compares geometry",
        store.path,
    )


def _choose_episodes(store: GeometryStore, mapping: NDArray[np.int64]) -> str | None:
    """Return which episodes of the dataset the new cache is to have, None for all: a partial cache stays one."""
    if not store.sealed or store.frames_present == store.dataset.frames:
        return None
    complete = np.zeros(len(store.episode_start), bool)
    for start, stop in store.episodes():
        complete[start:stop] = True
    chosen = np.flatnonzero((mapping >= 0) & complete[mapping])
    if not len(chosen):
        raise UserInputError(
            f"episodes: expected some that {store.path} has, which is a cache of {complete.sum()} episodes, found none"
            " of them in the dataset: name episodes with --episodes"
        )
    logger.info(
        "episodes: the %d of the dataset that this partial cache has; choose others with --episodes", len(chosen)
    )
    return format_ranges(chosen)


def is_up_to_date(change: Change) -> bool:
    """Return whether nothing speaks for a change: identities, the age of the dataset's files, a sample of pictures."""
    store, reader = change.store, change.dataset.reader
    if change.new_header.fingerprint != change.header.fingerprint or not store.sealed:
        return False
    if common_ranges(change.wanted, store.rows) != change.wanted:
        return False
    sealed_at = (change.path / MANIFEST).stat().st_mtime_ns
    if any(file.stat().st_mtime_ns > sealed_at for file in reader.files(change.wanted_episodes())):
        return False
    sample = choose_sample(store, change.wanted_episodes().tolist())
    return not compare_pictures(store, reads_pictures(reader), sample, sample).differing.any()


def find_reencoded(change: Change, machinery: Machinery) -> NDArray[np.int64]:
    """Return the episodes whose pictures differ from those of the cache no more than another encoding makes them.

    An episode counts if that is so for all of its frames. The others have a line.
    """
    store, reader, guesses = change.store, change.dataset.reader, change.guesses
    starts, lengths = reader.episode_start, reader.episode_length
    if store.schema_version == 1:
        return np.empty(0, np.int64)
    wanted = change.wanted_episodes()
    wanted = wanted[guesses[wanted] >= 0]
    stops = guesses[wanted] + lengths[wanted]
    wanted = wanted[(stops <= store.dataset.frames) & RowSet(store.rows).covers(guesses[wanted], stops)]
    suspects = [
        episode
        for episode in wanted.tolist()
        if not _first_frame_is_same(store, reader, int(starts[episode]), int(guesses[episode]))
    ]
    largest = dict.fromkeys(suspects, 0)
    size = machinery.batch_size
    ranges = (
        (row, min(row + size, int(starts[episode] + lengths[episode])))
        for episode in suspects
        for row in range(int(starts[episode]), int(starts[episode] + lengths[episode]), size)
    )
    decoder = BatchDecoder(reader, None)
    with contextlib.closing(decode(decoder, ranges, machinery.workers, server=machinery.server)) as batches:
        for batch in batches:
            episode = reader.locate(batch.start)[0]
            stored = store.signatures(np.arange(batch.start, batch.stop) - starts[episode] + guesses[episode])
            largest[episode] = max(largest[episode], int(batch.signatures.distances(stored).max()))
    accepted = np.array([episode for episode in suspects if largest[episode] <= TOLERANCE], np.int64)
    others = np.array([episode for episode in suspects if largest[episode] > TOLERANCE], np.int64)
    if len(accepted):
        logger.info(
            "re-encoded: %d frames of %d episodes are kept: block means differ by at most %d of 255 (accepted: %d)",
            int(lengths[accepted].sum()),
            len(accepted),
            max(largest[episode] for episode in accepted.tolist()),
            TOLERANCE,
        )
    if len(others):
        logger.info(
            "re-encoded: episodes %s are encoded anew: block means differ by up to %d of 255 (accepted: %d)",
            format_ranges(others),
            max(largest[episode] for episode in others.tolist()),
            TOLERANCE,
        )
    return accepted


def _first_frame_is_same(store: GeometryStore, reader: FrameReader, row: int, stored_row: int) -> bool:
    signatures = sign_pictures(reader.read(row, row + 1).images)
    return bool(signatures.equal(store.signatures([stored_row])).all())
