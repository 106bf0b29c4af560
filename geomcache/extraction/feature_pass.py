"""The first pass of an extraction with features: a basis is fitted to those of a sample of frames.

Everything else of a cache follows from its settings; the basis follows from a computation, whose last bits another
device may round differently. So a cache keeps the basis that it was created with, and whoever goes on with the cache
takes it from there.
"""

import logging
import time

import numpy as np

from geomcache.cache.create import is_cache
from geomcache.cache.store import GeometryStore
from geomcache.da3.encoder import DA3Encoder
from geomcache.da3.feature_basis import DEFAULT_DIM, FeatureMoments, unfitted_basis
from geomcache.extraction.options import ExtractOptions
from geomcache.frames.source import FrameDataset
from geomcache.geometry import FEATURE
from geomcache.pipeline.decoding import BatchDecoder
from geomcache.progress import human_time
from geomcache.ranges import Ranges, RowSet

logger = logging.getLogger(__name__)

SAMPLED_FRAMES = 128


def choose_feature(options: ExtractOptions, encoder: DA3Encoder, dataset: FrameDataset, rows: Ranges) -> DA3Encoder:
    """Return what `fit_feature` does for a cache that will be created, and what `known_feature` does for others."""
    path = options.output_path
    # Something else at the path is refused later; no first pass is made for that.
    creates = not path.exists() or (options.overwrite and is_cache(path))
    return fit_feature(options, encoder, dataset, rows) if creates else known_feature(options, encoder)


def known_feature(options: ExtractOptions, encoder: DA3Encoder) -> DA3Encoder:
    """Return the encoder with the output ``feature``, if that is asked for, by the basis of the cache that is there.

    Where there is none, or one with other settings, a basis of the right size stands for it: plans have the sizes, and
    the comparison of settings names what differs.

    Raises:
        UserInputError: there is no basis of so many numbers, or the grid is finer than the patches.
        CacheError: the cache cannot be read.
    """
    if FEATURE not in options.outputs:
        return encoder
    dim, width, path = options.feature_dim or DEFAULT_DIM, encoder.feature_width, options.output_path
    basis = unfitted_basis(width, dim)
    if not options.overwrite and is_cache(path):
        with GeometryStore.open_by_journal(path) as store:
            stored = store.feature_basis
        basis = basis if stored is None or stored.shape != basis.shape else stored
    return encoder.with_feature(basis)


def fit_feature(options: ExtractOptions, encoder: DA3Encoder, dataset: FrameDataset, rows: Ranges) -> DA3Encoder:
    """Return the encoder with the output ``feature``, if that is asked for, by a basis fitted to a sample of frames.

    Args:
        options: of the run.
        encoder: with or without features.
        dataset: whose frames are sampled.
        rows: merged ranges of those that the cache is to have. The sample is spread over them evenly.

    Raises:
        GeomcacheError: a frame cannot be decoded, or memory does not suffice.
    """
    if FEATURE not in options.outputs:
        return encoder
    moments, chosen, began = FeatureMoments(encoder.feature_width), RowSet(rows), time.monotonic()
    count = min(SAMPLED_FRAMES, chosen.count)
    logger.info("feature: a first pass over %d frames", count)
    decoder = BatchDecoder(dataset.reader, encoder.preprocessor)
    for row in chosen.rows_at((2 * np.arange(count) + 1) * chosen.count // (2 * count)).tolist():
        inputs = decoder.decode(row, row + 1).inputs
        assert inputs is not None
        moments.add(encoder.raw_features(inputs))
    basis = moments.basis(options.feature_dim or DEFAULT_DIM)
    logger.info(
        "feature: a basis of %d numbers keeps %.1f %% of the squared length of %d, in these frames (%s)",
        basis.shape[1],
        100 * moments.share_kept(basis),
        len(basis),
        human_time(time.monotonic() - began),
    )
    return encoder.with_feature(basis)
