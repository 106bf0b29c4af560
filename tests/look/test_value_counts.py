"""Counting float16 values: against NumPy on the values themselves."""

import numpy as np

from geomcache.look.value_counts import ValueCounts

VALUES = np.random.default_rng(0).normal(size=(7, 5, 11)).astype(np.float16)


def test_percentiles_are_numpys() -> None:
    counts = ValueCounts()
    for part in VALUES:
        counts.add(part)
    assert counts.total == VALUES.size
    for percent in (0.0, 0.1, 1.0, 37.0, 50.0, 99.0, 100.0):
        expected = np.percentile(VALUES.astype(np.float64), percent, method="inverted_cdf")
        assert counts.percentile(percent) == expected


def test_histograms_are_numpys() -> None:
    counts = ValueCounts()
    counts.add(VALUES[..., ::2])  # not contiguous
    edges = np.linspace(-1.5, 2.0, 9, dtype=np.float64)
    expected, _ = np.histogram(VALUES[..., ::2].astype(np.float64), bins=edges)
    assert counts.histogram(edges).tolist() == expected.tolist()
    assert 0 < expected.sum() < VALUES[..., ::2].size


def test_the_ends_of_float16_count() -> None:
    counts = ValueCounts()
    counts.add(np.array([-65504, -0.0, 0.0, 6e-8, 65504], np.float16))
    assert (counts.percentile(0), counts.percentile(100)) == (-65504.0, 65504.0)
    assert counts.histogram(np.array([-65504.0, 0.0, 65504.0])).tolist() == [1, 4]


def test_parts_merge() -> None:
    parts = [ValueCounts(), ValueCounts()]
    parts[0].add(VALUES[:3])
    parts[1].add(VALUES[3:])
    merged = ValueCounts.merged(parts)
    assert merged.total == VALUES.size
    assert merged.percentile(50) == np.percentile(VALUES.astype(np.float64), 50, method="inverted_cdf")
    assert parts[0].total == VALUES[:3].size
