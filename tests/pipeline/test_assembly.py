"""A shard that is put together batch after batch."""

import numpy as np
import pytest

from geomcache.cache.writer import Claim
from geomcache.pipeline.assembly import ShardAssembly
from geomcache.pipeline.workers import batch_ranges
from tests.support.stores import make_maps, make_signatures, make_spec

CLAIM = Claim(1, ((16, 20), (24, 31)))


@pytest.mark.parametrize("size", [1, 3, 4, 11])
def test_batches_in_order_make_the_maps_of_the_claim(size: int) -> None:
    spec = make_spec()
    rows = [*range(16, 20), *range(24, 31)]
    maps, signatures = make_maps(spec, rows), make_signatures(spec, rows)
    views = {output: np.stack([maps[key][output] for key in spec.camera_keys], axis=1) for output in spec.outputs}
    shard, done = ShardAssembly(CLAIM, 2), []
    for start, stop in batch_ranges(CLAIM, size):
        part = slice(rows.index(start), rows.index(stop - 1) + 1)
        done.append(shard.add({name: values[part] for name, values in views.items()}, signatures[part]))
    assert done == [False] * (len(done) - 1) + [True]
    for key, outputs in shard.by_camera(spec.camera_keys).items():
        for output, values in outputs.items():
            np.testing.assert_array_equal(values, maps[key][output])
    np.testing.assert_array_equal(shard.signatures.hashes, signatures.hashes)
    assert (shard.places == -1).all()


def test_a_batch_spans_no_two_ranges_and_no_two_claims() -> None:
    assert list(batch_ranges(CLAIM, 3)) == [(16, 19), (19, 20), (24, 27), (27, 30), (30, 31)]
