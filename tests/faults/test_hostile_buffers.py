"""Compressed maps whose checksums are right and whose Blosc headers lie: none reaches a decoder that believes them."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from geomcache.cache.codecs import Codec
from geomcache.cache.store import GeometryStore
from geomcache.cache.verify import verify
from geomcache.errors import CacheCorruptError, RemoteError
from geomcache.sharing.remote_store import RemoteGeometryStore
from tests.faults.buffers import HEADER, STORED
from tests.faults.common import Figure, few_or_many
from tests.support.stores import CAMERAS, claim_rows, commit, make_maps, make_spec, open_writer, output_of, run_python

PROGRAM = "from tests.faults.buffers import main; main()"
SPEC = make_spec(grid_hw=(1000, 1000), outputs=("ray",), cameras=CAMERAS[:1])
NBYTES = 1000 * 1000 * 6 * 2


@few_or_many("count", 4_000, 400_000)
@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_buffers_are_refused_or_decoded_and_nothing_else(count: int, seed: int, figure: Figure) -> None:
    facts = json.loads(output_of(run_python(PROGRAM, count, seed), timeout=1800))
    assert facts["buffers"] == count
    assert facts["refused"] > count // 2
    assert facts["seen by c-blosc"] > count // 10  # or the test would be about the header alone
    figure(f"{facts}")


LIES = {
    "stored, and no content": HEADER.pack(2, 1, 0x91 | STORED, 2, NBYTES, NBYTES, NBYTES + 16),
    "more content than there is": HEADER.pack(2, 1, 0x91, 2, NBYTES, 1 << 18, 1 << 30) + bytes(400),
    "stored, with a length that is true": HEADER.pack(2, 1, 0x91 | STORED, 2, NBYTES, NBYTES, 24) + bytes(8),
    "a larger map": HEADER.pack(2, 1, 0x91, 2, 2 * NBYTES, 1 << 18, 416) + bytes(400),
    "a smaller map": HEADER.pack(2, 1, 0x91, 2, 16, 16, 416) + bytes(400),
    "no blocks": HEADER.pack(2, 1, 0x91, 2, NBYTES, 0, 416) + bytes(400),
    "blocks larger than the map": HEADER.pack(2, 1, 0x91, 2, NBYTES, NBYTES + 1, 416) + bytes(400),
    "more blocks than have places": HEADER.pack(2, 1, 0x91, 2, NBYTES, 1, 416) + bytes(400),
    "another compressor": HEADER.pack(2, 1, 0x11, 2, NBYTES, 1 << 18, 416) + bytes(400),
    "another type": HEADER.pack(2, 1, 0x91, 255, NBYTES, 1 << 18, 416) + bytes(400),
    "another version": HEADER.pack(3, 1, 0x91, 2, NBYTES, 1 << 18, 416) + bytes(400),
    "half a header": b"\x02\x01\x93",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str) -> None:
    content = np.full(NBYTES, 7, np.uint8)
    with pytest.raises(ValueError, match="a Blosc header: expected"):
        Codec("zstd").decode_into(LIES[lie], content)
    assert (content == 7).all()


def test_the_decoder_alone_believes_the_header() -> None:
    """What the check is for. When this fails, numcodecs compares the length itself."""
    script = """
import sys
import numpy as np
from numcodecs import Blosc
from tests.faults.buffers import HEADER
nbytes = 1 << 30  # more than a process has behind 16 bytes
Blosc().decode(HEADER.pack(2, 1, 0x93, 2, nbytes, 1 << 20, nbytes + 16), np.empty(nbytes, np.uint8))
"""
    process = run_python(script)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGSEGV


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed cache of two rows whose hashes are all right, and whose maps are headers without content."""
    path = tmp_path_factory.mktemp("hostile") / "cache"
    with (
        pytest.MonkeyPatch.context() as patch,
        open_writer(path, lengths=(2,), spec=SPEC, codec="zstd") as writer,
    ):
        patch.setattr(Codec, "encode", lambda codec, maps: [LIES["stored, and no content"] for _ in maps])
        claim = writer.claim()
        assert claim is not None
        commit(writer, claim, make_maps(SPEC, claim_rows(claim)))
        assert writer.seal()
    return path


def test_such_a_cache_is_refused_by_every_reader(hostile: Path) -> None:
    with GeometryStore.open(hostile) as store:
        with pytest.raises(CacheCorruptError, match="episode 0 frame 1: .*Blosc header"):
            store.batch([1])
        with pytest.raises(ValueError, match="Blosc header"):
            store.batch_plain([1])
    (problem,) = verify(hostile).problems
    assert problem.rows == ((0, 2),)
    with (
        RemoteGeometryStore.open(f"file://{hostile}") as remote,
        pytest.raises(RemoteError, match="Blosc header"),
    ):
        remote.batch([1])


def test_zarr_is_told_codecs_and_shapes_by_the_header_alone(tmp_path: Path) -> None:
    """Array metadata that names another codec, or any shape, is not what maps are read by."""
    path = tmp_path / "cache"
    with open_writer(path, [(0, 2)], spec=make_spec(), codec="zstd") as writer:
        claim = writer.claim()
        assert claim is not None
        commit(writer, claim, make_maps(writer.spec, claim_rows(claim)))
    with GeometryStore.open(path) as store:
        wanted = store.batch([0, 1])
        for file in path.glob("*/*/zarr.json"):
            shutil.copy(path / "episode_index" / "zarr.json", file)
        plain = store.batch_plain([0, 1])
    assert np.array_equal(plain.ray, wanted.ray)
