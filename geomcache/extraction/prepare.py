"""What every engine does before the work of stage one: the dataset, the encoder, and the cache that is opened."""

import logging
from collections.abc import Sequence

import torch

from geomcache.cache.codecs import Codec
from geomcache.cache.create import is_cache
from geomcache.cache.header import Header
from geomcache.cache.layout import SCHEMA_VERSION
from geomcache.cache.store import GeometryStore
from geomcache.cache.writer import StoreWriter
from geomcache.da3.encoder import DA3Encoder
from geomcache.errors import CacheMismatchError
from geomcache.extraction.at_address import open_at_address
from geomcache.extraction.feature_pass import BASIS_FIELD, FeatureEncoder
from geomcache.extraction.missing_shards import drop_missing_shards
from geomcache.extraction.options import ExtractOptions
from geomcache.extraction.plan import describe_shards, require_space
from geomcache.extraction.run_config import resolve, write_run_config
from geomcache.frames.of_cache import check_cached_pictures, compare_with_cache
from geomcache.frames.source import FrameDataset, describe_statistics_command, open_dataset
from geomcache.geometry import FEATURE, Camera, GeometrySpec
from geomcache.pipeline.batch_size import default_batch_size, find_batch_size
from geomcache.pipeline.process import Process
from geomcache.ranges import count_rows, merge_ranges

logger = logging.getLogger(__name__)


def find_dataset(options: ExtractOptions, episodes: str | None) -> tuple[FrameDataset, list[tuple[int, int]]]:
    """Return the dataset, with the files of these episodes, and ranges of them."""
    return open_dataset(
        options.dataset,
        root=options.root,
        revision=options.revision,
        cameras=options.cameras,
        episodes=episodes,
        tolerance_s=options.tolerance_s,
    )


def warn_of_missing_quantiles(options: ExtractOptions, dataset: FrameDataset) -> None:
    """Say what training will lack."""
    if dataset.without_quantiles:
        logger.warning(
            "dataset %s: its statistics lack quantiles of %s, by which Pi0.5 normalises: the cache does not need"
            " them, training does; compute them with %s",
            dataset.spec.repo_id,
            ", ".join(dataset.without_quantiles),
            describe_statistics_command(dataset.spec.repo_id, options.root),
        )


def load_encoder(options: ExtractOptions, cameras: Sequence[Camera], device: str | torch.device | None) -> DA3Encoder:
    """Load the encoder that the options ask for, without features: see `FeatureEncoder`."""
    return DA3Encoder.from_pretrained(
        options.model,
        cameras=cameras,
        revision=options.model_revision,
        views=options.views,
        process_res=options.process_res,
        grid=options.grid,
        outputs=tuple(name for name in options.outputs if name != FEATURE),
        device=device,
        dtype=options.dtype,
    )


def choose_batch_size(options: ExtractOptions, encoder: DA3Encoder, process: Process) -> int:
    """Return the frames per forward pass; where that is measured, say why."""
    if options.batch_size != "auto":
        return options.batch_size or default_batch_size(encoder.device)
    batch_size, reason = find_batch_size(encoder)
    if process.is_main:
        logger.info("batch size %d: %s", batch_size, reason)
    return batch_size


def open_writer(
    options: ExtractOptions,
    dataset: FrameDataset,
    episodes: Sequence[tuple[int, int]],
    spec: GeometrySpec,
    process: Process,
    features: FeatureEncoder | None = None,
) -> StoreWriter:
    """Create the cache, or open the one that exists; shards that lack a file count as missing.

    Args:
        options: of the run.
        dataset: that the cache belongs to.
        episodes: ranges of those that it is to have.
        spec: what the geometry depends on; without `features`, that of the cache.
        process: the others wait until the main one has created the cache.
        features: fits the basis of a cache that is created, and adopts that of one that exists.
    """
    if options.address is not None:
        return open_at_address(options.address, options, dataset, episodes, spec)
    codec, rows = Codec.of(options.codec), dataset.rows(episodes)
    if not options.output_path.exists():
        require_space(options.output_path, spec, count_rows(rows), codec)
        if process.is_main:
            for line in describe_shards(spec, dataset.spec.frames):
                logger.warning(line)

    def open_or_create(*, overwrite: bool) -> StoreWriter:
        return _open_or_create(options, dataset, rows, features.encoder if features else spec, overwrite=overwrite)

    with process.main_first():  # the others open what the main process has created or replaced
        overwrite = options.overwrite and process.is_main
        if features is not None:
            features.choose(dataset, merge_ranges(rows), overwrite=overwrite)
        try:
            writer = open_or_create(overwrite=overwrite)
        except CacheMismatchError as error:
            if features is None or error.field != BASIS_FIELD:
                raise
            features.adopt()  # another run created the cache while this one fitted its basis
            writer = open_or_create(overwrite=False)
        if process.is_main and drop_missing_shards(writer):
            writer.close()
            writer = open_or_create(overwrite=False)  # now it wants the rows of those shards, too
        if process.is_main:
            try:
                with GeometryStore.open_by_journal(writer.path) as store:
                    check_cached_pictures(store, dataset, episodes)
            except BaseException:
                writer.close()
                raise
        return writer


def _open_or_create(
    options: ExtractOptions,
    dataset: FrameDataset,
    rows: Sequence[tuple[int, int]],
    encoder: DA3Encoder | GeometrySpec,
    *,
    overwrite: bool,
) -> StoreWriter:
    spec, basis = (encoder.spec, encoder.feature_basis) if isinstance(encoder, DA3Encoder) else (encoder, None)
    path, version = options.output_path, SCHEMA_VERSION
    if is_cache(path) and not overwrite:
        version = Header.read(path).schema_version
        compare_with_cache(path, dataset)
    return StoreWriter.create_or_open(
        path,
        spec,
        dataset.describe(version),  # a cache of an earlier version is continued as it was begun
        dataset.reader.episode_length,
        rows,
        identities=dataset.identities,
        feature_basis=basis,
        codec=Codec.of(options.codec),
        overwrite=overwrite,
    )


def announce(writer: StoreWriter, options: ExtractOptions, process: Process) -> int:
    """Record the options, log what exists already, and require space for the rest; return the rows in total."""
    done, total = writer.frames_done(), count_rows(writer.wanted)
    if process.is_main:
        write_run_config(writer.path, resolve(options, writer.spec, writer.dataset), is_new=done == 0)
        if writer.removed_stale_files:
            logger.info("%s: removed %d stale files of an interrupted run", options.place, writer.removed_stale_files)
        if 0 < done < total:
            logger.info("%s: %d of %d frames exist; resuming with the rest", options.place, done, total)
    if options.address is None:
        require_space(writer.path, writer.spec, total - done, Codec.of(options.codec))
    return total
