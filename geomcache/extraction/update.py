"""Let a cache follow its dataset, which has grown, or whose episodes were deleted, split off, merged or re-ordered.

A new cache, of the dataset as it is now, is made next to the old one by the ordinary pipeline of stage one. Rows whose
pictures the old cache knows are carried over, wherever they were; whole shards that line up are linked. The others are
encoded. When it is complete, the two exchange their names in one step, so that a kill at any moment leaves one of them
whole, and the same command resumes.

    update            decodes every picture and compares its signature
    grow (extract)    the old episodes are the first ones of the dataset: compares identities and a sample of pictures
"""

import contextlib
import functools
import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from geomcache.cache import durable, locks
from geomcache.cache.codecs import Codec
from geomcache.cache.commands import update_command
from geomcache.cache.create import (
    is_cache,
    recover,
    remove_successors,
    set_aside,
    set_aside_by,
    succeed,
    successor_of,
)
from geomcache.cache.header import LOCK, Header
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import Claim, StoreWriter
from geomcache.da3.checks import check_device
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.preprocess import DA3Preprocessor
from geomcache.errors import CacheError, CacheLockedError, CacheNotFoundError
from geomcache.extraction.change import Change, find_change, find_reencoded, is_up_to_date
from geomcache.extraction.options import ExtractOptions, UpdateOptions
from geomcache.extraction.plan import describe_update, plan_update, require_space
from geomcache.extraction.run_config import recorded_run, resolve, write_run_config
from geomcache.frames.compare import (
    check_pictures,
    choose_sample,
    find_differences,
)
from geomcache.frames.of_cache import reads_pictures
from geomcache.frames.source import (
    FrameDataset,
)
from geomcache.geometry import GeometrySpec
from geomcache.pipeline.batch_size import default_batch_size
from geomcache.pipeline.carry import Carrier, EarlierCaches, PictureIndex
from geomcache.pipeline.encoding import EncoderOnDemand
from geomcache.pipeline.engine_choice import choose_engine
from geomcache.pipeline.pipeline import Machinery, Pipeline
from geomcache.pipeline.report import ExtractReport
from geomcache.ranges import (
    Ranges,
    clip_ranges,
    count_rows,
    merge_ranges,
    rows_of,
)

logger = logging.getLogger(__name__)

_INDEX = "pictures"  # begins the names of temporary files in the new cache
_ALONE_S = 30.0  # how long other processes are waited for when the two caches exchange their names


def update(options: UpdateOptions) -> ExtractReport:
    """Let a cache follow its dataset; what the user should know on the way is logged.

    Raises:
        GeomcacheError: the update cannot start or continue. The cache is as it was; what was made is kept, and the same
            command resumes.
    """
    machinery = Machinery.start(options.num_workers, workless=options.dry_run)
    path = options.cache.resolve()
    if not options.dry_run:
        recover(path)
    Header.read(path)  # an error, if no cache is there
    with _held(path, options.dry_run), GeometryStore.open(path) as store:
        change = find_change(options, path, store, Header.read(path))
        device = options.device or machinery.process.device
        machinery.batch_size = options.batch_size or default_batch_size(check_device(device))
        encoder = EncoderOnDemand(functools.partial(_load_encoder, options, change, machinery))
        if options.dry_run:
            _log_plan(options, change, encoder, machinery)
            return ExtractReport(path=path)
        total = count_rows(change.wanted)
        unchanged = is_up_to_date(change)
        if unchanged:
            report = ExtractReport(path=path, frames_total=total)
        else:
            if options.accept_reencoded:
                change.trusted[find_reencoded(change, machinery)] = True
            report = _make(change, encoder, machinery)
    _finish(change, machinery, is_made=not unchanged)
    if machinery.process.is_main:
        _record(options, change)
    return report


def has_grown(path: Path, dataset: FrameDataset, spec: GeometrySpec, codec: Codec) -> bool:
    """Return whether the cache at a path has these settings, and its episodes are the first ones of a dataset.

    Raises:
        CacheError: it cannot be read.
    """
    if not is_cache(path):
        return False
    header = Header.read(path)
    same = header.codec == codec and replace(header.spec, model_id=spec.model_id) == spec
    if not same or header.schema_version == 1:
        return False
    with GeometryStore.open_by_journal(path) as store:  # `extract` makes a damaged manifest again
        assert store.episode_identity is not None
        episodes, current = len(store.episode_start), (dataset.reader.episode_length, dataset.identities)
        if len(current[0]) <= episodes or header.dataset.fps != dataset.spec.fps:
            return False
        cached = store.episode_length, store.episode_identity
        return find_differences(cached, current, np.arange(episodes)).rows == 0


def grow(
    path: Path, dataset: FrameDataset, wanted: Sequence[tuple[int, int]], encoder: DA3Encoder, machinery: Machinery
) -> ExtractReport:
    """Add rows of a dataset that has grown to a cache of its first episodes.

    The old episodes are compared by identity before (`has_grown`), and a sample of their pictures here.

    Args:
        path: of the cache.
        dataset: as it is now.
        wanted: ranges of rows that the cache is to have, in addition to those it has.
        encoder: of the cache's spec.
        machinery: what this process works with.

    Raises:
        CacheMismatchError: a sampled picture is another one.
        GeomcacheError: as `update`.
    """
    path = path.resolve()
    with _held(path), GeometryStore.open(path) as store:
        header = Header.read(path)
        episodes = len(store.episode_start)
        guesses = np.full(dataset.spec.episodes, -1)
        guesses[:episodes] = store.episode_start
        reader = dataset.reader
        sample = choose_sample(store, [each for each in range(episodes) if reader.has_files(each)])
        command = update_command(path, dataset.spec.repo_id, dataset.root)
        check_pictures(store, reads_pictures(reader), sample, decoder=dataset.spec.decoder, command=command)
        change = Change(
            path=path,
            store=store,
            header=header,
            dataset=dataset,
            wanted=(),
            guesses=guesses,
            trusted=np.zeros(len(guesses), bool),
        )
        same_cut = change.new_header.shard_frames == store.shard_frames
        kept = store.rows if same_cut else _rows_of_episodes(store, store.episodes())
        change = replace(change, wanted=merge_ranges((*wanted, *kept)))
        report = _make(change, EncoderOnDemand(lambda: encoder), machinery, unseen=True)
    _finish(change, machinery, is_made=True)
    return report


@contextlib.contextmanager
def _held(path: Path, dry_run: bool = False) -> Iterator[None]:
    """Keep others from replacing the cache at a path."""
    if dry_run:
        yield
        return
    with contextlib.closing(locks.LockFile(path / LOCK)):
        yield


def _rows_of_episodes(store: GeometryStore, episodes: Ranges) -> Ranges:
    ends = store.episode_start + store.episode_length
    return merge_ranges((int(store.episode_start[first]), int(ends[last - 1])) for first, last in episodes)


def _make(change: Change, encoder: EncoderOnDemand, machinery: Machinery, *, unseen: bool = False) -> ExtractReport:
    """Make the new cache next to the old one and seal it, together with other processes that do the same."""
    dataset, spec = change.dataset, change.store.spec
    successor = successor_of(change.path)
    with machinery.process.main_first():
        if machinery.process.is_main:
            _set_aside_another(change)
        writer = StoreWriter.create_or_open(
            successor,
            spec,
            dataset.spec,
            dataset.reader.episode_length,
            change.wanted,
            identities=dataset.identities,
            feature_basis=change.store.feature_basis,
            codec=change.header.codec,
            shard_frames=change.new_header.shard_frames,
        )
    with writer, contextlib.ExitStack() as stack:
        caches = EarlierCaches([change.store, *(stack.enter_context(store) for store in _others(change))])
        index_file = successor / f"{_INDEX}-{os.getpid()}{durable.TEMPORARY}"
        stack.callback(index_file.unlink, missing_ok=True)
        # Without a look at pictures, only what interrupted runs encoded has to be searched for.
        index = PictureIndex.build(caches, index_file, begin=1 if unseen else 0)
        carrier = change.carrier(caches, index)
        done, total = writer.frames_done(), count_rows(writer.wanted)
        if machinery.process.is_main:
            _announce(change, done, total)
        require_space(change.path, spec, _frames_to_write(carrier, writer), change.header.codec)
        pipeline = Pipeline(
            dataset,
            DA3Preprocessor(spec.cameras, spec.process_res, spec.resize_method),
            encoder,
            writer,
            machinery,
            config_of=change.path,
            carrier=carrier,
            unseen=unseen,
        )
        return pipeline.until_sealed(total)


def _set_aside_another(change: Change) -> None:
    """Resume an interrupted update to the same state of the dataset; keep the rows of another one for this update."""
    try:
        begun = Header.read(successor_of(change.path))
    except CacheNotFoundError:
        return
    except CacheError:
        set_aside(change.path)
        return
    if (begun.fingerprint, begun.codec) != (change.new_header.fingerprint, change.new_header.codec):
        set_aside(change.path)


def _others(change: Change) -> Iterator[GeometryStore]:
    """Yield what interrupted updates to other states of the dataset left."""
    for folder in set_aside_by(change.path):
        try:
            store = GeometryStore.open(folder)
        except CacheError as error:
            logger.warning("%s: left by an interrupted update, cannot be used: %s", folder, error)
        else:
            if store.spec == change.store.spec:
                yield store


def _announce(change: Change, done: int, total: int) -> None:
    episodes = change.wanted_episodes()
    known = int((change.guesses[episodes] >= 0).sum())
    logger.info(
        "%s: follows dataset %s: %d episodes, %d frames; %d episodes are in the cache as far as metadata tell",
        change.path,
        change.dataset.spec.repo_id,
        len(episodes),
        total,
        known,
    )
    if 0 < done < total:
        logger.info("%s: %d of %d frames are done already; resuming with the rest", change.path, done, total)


def _frames_to_write(carrier: Carrier, writer: StoreWriter) -> int:
    """Return how many frames are not in shards that presumably can be linked."""
    frames = 0
    for shard in writer.pending():
        start = shard * writer.shard_frames
        claim = Claim(shard, clip_ranges(writer.wanted, start, start + writer.shard_frames))
        places = carrier.expected(rows_of(claim.rows))
        if carrier.caches.find_shard(places, claim, writer.shard_frames) is None:
            frames += len(places)
    return frames


def _finish(change: Change, machinery: Machinery, *, is_made: bool) -> None:
    """Put the new cache into the place of the old one, once no other process writes to one of them."""
    end = time.monotonic() + _ALONE_S
    while is_made and not succeed(change.path, change.is_as_it_was):
        if time.monotonic() > end:
            raise CacheLockedError(
                f"{change.path}: expected a cache that nobody writes, found one in use: everything is made; end the"
                " other process, then run the same command again to put the new cache into its place"
            )
        time.sleep(random.uniform(0.05, 0.3))  # noqa: S311 - so that two processes do not meet again
    if machinery.process.is_main:
        remove_successors(change.path, sealed_only=not is_made)


def _load_encoder(options: UpdateOptions, change: Change, machinery: Machinery) -> DA3Encoder:
    """Load the cache's DA3, from where it was loaded before if the user does not name another place."""
    spec = change.store.spec
    model = options.model
    if model is None and spec.model_revision is None:
        model = recorded_run(change.path).get("model")
    device, basis = options.device or machinery.process.device, change.store.feature_basis
    encoder = DA3Encoder.from_spec(spec, model=model, device=device, feature_basis=basis)
    lengths, episodes = change.dataset.reader.episode_length, change.wanted_episodes()
    unknown = int(lengths[episodes[change.guesses[episodes] < 0]].sum())
    choose_engine(None, encoder, unknown // machinery.process.count, machinery.batch_size)
    return encoder


def _log_plan(options: UpdateOptions, change: Change, encoder: EncoderOnDemand, machinery: Machinery) -> None:
    rows = [*change.wanted]
    with tempfile.TemporaryDirectory(prefix="geomcache-") as folder:
        caches = EarlierCaches([change.store])
        carrier = change.carrier(caches, PictureIndex.build(caches, Path(folder, _INDEX)))
        plan = plan_update(carrier, change.dataset, change.wanted_episodes())
        for line in describe_update(
            plan,
            change.store,
            change.dataset,
            rows,
            encoder,
            machinery,
            accept_reencoded=options.accept_reencoded,
        ):
            logger.info(line)


def _record(options: UpdateOptions, change: Change) -> None:
    """Write the options next to the cache with which `extract` would make it from the dataset as it is now."""
    spec, dataset = change.store.spec, change.dataset
    model = options.model or recorded_run(change.path).get("model") or spec.model_id
    run = ExtractOptions(
        model=model,
        dataset=dataset.spec.repo_id,
        output=change.path,
        root=dataset.root,
        revision=options.revision,
        episodes=options.episodes,
        tolerance_s=options.tolerance_s,
        views=spec.views,
        process_res=spec.process_res,
        grid=spec.grid,
        outputs=spec.outputs,
        codec=change.header.codec.name,
        device=options.device,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    write_run_config(change.path, resolve(run, spec, dataset.spec))
