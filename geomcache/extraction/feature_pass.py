"""The first pass of an extraction with features: a basis is fitted to those of a sample of frames.

Everything else of a cache follows from its settings; the basis follows from a computation, whose last bits another
device may round differently. So a cache keeps the basis that it was created with, and whoever continues the cache
takes it from there.
"""

import logging
import time
from dataclasses import replace

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
BASIS_FIELD = "spec.feature.basis_sha256"  # what a CacheMismatchError says of two runs that each fitted a basis


class FeatureEncoder:
    """The encoder of a run, whose basis of features is the cache's.

    Attributes:
        encoder: without features where none are asked for. Before `choose` has seen that a cache is to be created, a
            basis of the right size stands for the one that will be fitted.
    """

    def __init__(self, options: ExtractOptions, encoder: DA3Encoder) -> None:
        self._options = options
        self.encoder = known_feature(options, encoder)

    def choose(self, dataset: FrameDataset, rows: Ranges, *, overwrite: bool) -> None:
        """Fit a basis if this process is about to create the cache; adopt that of one that exists.

        Args:
            dataset: whose frames are sampled.
            rows: merged ranges of those that the cache is to have.
            overwrite: this process replaces a cache that exists.
        """
        path = self._options.output_path
        # Something else at the path is refused later; no first pass is made for that.
        if not path.exists() or (overwrite and is_cache(path)):
            self.encoder = fit_feature(self._options, self.encoder, dataset, rows)
        else:
            self.encoder = known_feature(replace(self._options, overwrite=overwrite), self.encoder)

    def adopt(self) -> None:
        """Take the basis of the cache that exists by now."""
        self.encoder = known_feature(replace(self._options, overwrite=False), self.encoder)


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
